"""docs/loading.md says how long things take before they are given up: it must be what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchinfer.loader import gcs, gcs_stream, plan, readers, stall
from torchinfer.loader.retry import METADATA_POLICY, RetryPolicy

DOCS = (Path(__file__).parents[2] / "docs" / "loading.md").read_text(encoding="utf-8")
POLICY = RetryPolicy()
LIMITS = {
    "attempts at a read, in a row, that bring no byte": f"{POLICY.attempts}",
    "delay after the first of them": f"{POLICY.first_delay:g} s",
    "longest delay": f"{POLICY.max_delay:g} s",
    "attempts at a read, without a byte, where nothing below ends them": f"{POLICY.deadline:g} s",
    "attempts to list a folder or look at a file": f"{METADATA_POLICY.attempts}",
    "... in all": f"{METADATA_POLICY.deadline:g} s",
    "a stream of `gs://` without a byte": f"{gcs.STALL_SECONDS:g} s",
    "a connection that is not there": f"{gcs_stream.CONNECT_SECONDS:g} s",
    "a list of `gs://`": f"{gcs.METADATA_SECONDS:g} s",
    f"a reader, or a thread that opens a checkpoint, with less than {stall.STALL_BYTES >> 20} MiB": (
        f"{stall.STALL_SECONDS:g} s"
    ),
    "readers or threads that try one thing": f"{stall.MAX_STALLS}",
    "a load in which no reader gets a byte": f"{stall.MAX_STALLS * stall.STALL_SECONDS:g} s",
    "reads that hang, waited for when a load ends": f"{readers.JOIN_SECONDS:g} s",
}


def test_the_table_of_limits_is_the_codes() -> None:
    _, _, table = DOCS.partition("| limit | value |\n|---|---|\n")
    rows = re.findall(r"^\| (.*) \| (.*) \|$", table.partition("\n\n")[0], re.MULTILINE)
    assert dict(rows) == LIMITS


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_time_of_all_attempts_is_that_of_their_delays(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr("torchinfer.loader.retry.random.uniform", lambda low, high: {0.5: low, 1.0: high}[share])
    seconds = sum(POLICY.delay(failures) for failures in range(1, POLICY.attempts))
    least, most = re.findall(r"attempts take (\d+) to (\d+) s", DOCS.replace("\n", " "))[0]
    assert f"{seconds:.0f}" == {0.5: least, 1.0: most}[share]


def test_the_grace_and_the_longest_extents_are_the_codes() -> None:
    text = DOCS.replace("\n", " ")
    assert f"if it hangs {readers.GRACE * stall.STALL_SECONDS:.0f} s more" in text
    assert f"the longest extents, {plan.NETWORK_EXTENT_BYTES >> 20} MiB, take two hours" in text
    hours = plan.NETWORK_EXTENT_BYTES / stall.STALL_BYTES * stall.STALL_SECONDS / 3600
    assert round(hours) == 2


def test_streams_stall_before_their_reader_is_given_up() -> None:
    """Then its error is one that says what is wrong, and it ends soon after it was given up."""
    assert 2 * gcs.STALL_SECONDS < stall.STALL_SECONDS
    assert gcs.STALL_SECONDS <= readers.GRACE * stall.STALL_SECONDS
