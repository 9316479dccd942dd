"""The whole diagnosis, over folders of this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.loader.advice import Facts
from torchinfer.loader.doctor import Diagnosis, diagnose
from torchinfer.loader.mount import mount_of
from torchinfer.loader.stall import StalledError

HangIn = Callable[[str, Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_bytes(bytes(2 << 20))
    return tmp_path


@pytest.fixture
def diagnosis(folder: Path) -> Diagnosis:
    return diagnose(str(folder), seconds=0.5)


def test_the_facts_are_of_the_folder(diagnosis: Diagnosis, folder: Path) -> None:
    facts = diagnosis.facts
    assert (facts.address, facts.mount, facts.speed.num_bytes) == (str(folder), mount_of(folder), 4 << 20)
    assert facts.kind == mount_of(folder).kind


def test_the_text_has_a_row_for_each_number_of_readers(diagnosis: Diagnosis) -> None:
    rows = [line.split()[:2] for line in diagnosis.to_text().splitlines() if line[:1].isdigit()]
    assert rows == [["1", "reader"], ["4", "readers"], ["16", "readers"]]


def without_direct(diagnosis: Diagnosis) -> Facts:
    speed = diagnosis.facts.speed
    buffered = tuple(one for one in speed.measurements if not one.direct)
    return replace(diagnosis.facts, speed=replace(speed, measurements=buffered))


def test_the_text_says_where_direct_reads_are_not_supported(diagnosis: Diagnosis) -> None:
    text = replace(diagnosis, facts=without_direct(diagnosis)).to_text()
    assert text.count("not supported") == 3


def test_a_bucket_has_no_column_for_direct_reads(diagnosis: Diagnosis) -> None:
    text = replace(diagnosis, facts=replace(without_direct(diagnosis), mount=None, kind="gs")).to_text()
    assert "O_DIRECT" not in text.partition("advice")[0] and "not supported" not in text


def test_the_text_ends_with_settings_and_reasons(diagnosis: Diagnosis) -> None:
    *_, settings, readers, direct = diagnosis.to_text().splitlines()
    assert settings == f"loader settings: {diagnosis.settings.flags}"
    assert readers.startswith("  - readers: ") and direct.startswith("  - direct: ")


def test_the_dictionary_is_json_with_all_rates(diagnosis: Diagnosis) -> None:
    found = json.loads(json.dumps(diagnosis.to_dict()))
    rates = [one["rate"] for one in found["facts"]["speed"]["measurements"]]
    assert rates == [one.rate for one in diagnosis.facts.speed.measurements]
    assert found["settings"]["load_readers"] == diagnosis.settings.load_readers


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 601.0])
def test_seconds_out_of_range_are_refused(folder: Path, seconds: float) -> None:
    with pytest.raises(ConfigError, match=f"seconds={seconds:g} must be more than 0 and at most 600"):
        diagnose(str(folder), seconds)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere' does not exist"):
        diagnose(str(tmp_path / "nowhere"))


def test_a_folder_that_cannot_be_opened_because_its_mount_hangs_is_refused(
    folder: Path, hang_in: HangIn, short_stalls: None
) -> None:
    hang_in("stat", folder)
    with pytest.raises(StalledError, match=f"cannot open {folder}: nothing came for 0.2 s; check the storage"):
        diagnose(str(folder))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no files; doctor needs a file of at"):
        diagnose(str(tmp_path))
