"""Reads that go on after what passes, and stop at what does not."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchinfer.errors import CheckpointError
from torchinfer.loader.folder import TRANSIENT
from torchinfer.loader.retry import Attempts, PersistentReader, RetryPolicy, Stopped
from torchinfer.loader.source import TransientError

QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.002)
CONTENT = bytes(range(256)) * 40
Faulty = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path


def read(source: Any, attempts: Attempts | None = None) -> bytes:
    buffer = bytearray(5000)
    with PersistentReader(source, "file", source.stat("file"), attempts or Attempts(QUICK)) as reader:
        reader.read_into(1000, memoryview(buffer))
    return bytes(buffer)


def raising(*numbers: int) -> Callable[[int, int], int]:
    def fault(number: int, offset: int) -> int:
        if number in numbers:
            raise TransientError("it rains")
        return 700

    return fault


def test_a_read_goes_on_where_it_failed(folder: Path, faulty: Faulty) -> None:
    source, attempts = faulty(folder, raising(2, 3, 5)), Attempts(QUICK)
    assert read(source, attempts) == CONTENT[1000:6000]
    assert attempts.num_retries == 3
    assert len(source.opened) == 4 and source.open_handles == 0  # a new handle after each failure
    assert source.num_reads == 8 + 3


def test_the_message_after_the_last_attempt_says_what_was_tried(folder: Path, faulty: Faulty) -> None:
    source = faulty(folder, raising(*range(2, 99)))
    with pytest.raises(
        CheckpointError, match=r"cannot read .*/file from byte 1000: it rains; gave up after 4 attempts"
    ):
        read(source)
    assert source.num_reads == 1 + 4 and source.open_handles == 0


def test_progress_gives_new_attempts(folder: Path, faulty: Faulty) -> None:
    assert read(faulty(folder, raising(1, 2, 3, 5, 6, 7, 9, 10, 11))) == CONTENT[1000:6000]


def test_the_deadline_ends_it_too(folder: Path, faulty: Faulty) -> None:
    policy = RetryPolicy(attempts=1000, first_delay=0.001, max_delay=0.001, deadline=0.01)
    with pytest.raises(CheckpointError, match=r"without a byte \(limits: 1000 attempts, 0.01 s\)"):
        read(faulty(folder, raising(*range(2000))), Attempts(policy))


def test_a_stop_ends_a_wait_at_once(folder: Path, faulty: Faulty) -> None:
    attempts = Attempts(RetryPolicy(first_delay=1000.0, max_delay=1000.0))
    threading.Timer(0.05, attempts.stop.set).start()
    with pytest.raises(Stopped):
        read(faulty(folder, raising(1)), attempts)


def test_delays_double_up_to_a_limit_and_are_drawn() -> None:
    policy = RetryPolicy(first_delay=1.0, max_delay=5.0)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (50, 5.0)):
        delays = {policy.delay(failures) for _ in range(100)}
        assert len(delays) > 50 and 0.5 * longest <= min(delays) and max(delays) <= longest


@pytest.mark.parametrize("number", sorted(TRANSIENT))
def test_what_may_pass_is_tried_again(
    folder: Path, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole, numbers = os.preadv, iter([number])

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        for failure in numbers:
            raise OSError(failure, os.strerror(failure))
        return whole(descriptor, buffers, offset)

    source, attempts = faulty(folder), Attempts(QUICK)
    monkeypatch.setattr(os, "preadv", preadv)
    assert read(source, attempts) == CONTENT[1000:6000]
    assert attempts.num_retries == 1


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOTCONN, "the FUSE daemon of this mount died: mount it again"),
        (errno.EACCES, "roles/storage.objectViewer"),
        (errno.EBADF, "check that it exists and is readable"),
    ],
)
def test_what_does_not_pass_ends_the_load_with_advice(
    folder: Path, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    source, attempts = faulty(folder), Attempts(QUICK)
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=rf"cannot read byte 1000 of .*file: .* \(errno {number}\); .*{advice}"):
        read(source, attempts)
    assert attempts.num_retries == 0


def test_a_file_that_was_replaced_is_not_mixed(folder: Path, faulty: Faulty) -> None:
    source = faulty(folder)
    stat = source.stat("file")
    (folder / "new").write_bytes(CONTENT[::-1])
    os.utime(folder / "new", ns=(1, 1))
    os.replace(folder / "new", folder / "file")
    with (
        PersistentReader(source, "file", stat, Attempts(QUICK)) as reader,
        pytest.raises(CheckpointError, match="file was replaced or changed while it was read"),
    ):
        reader.read_into(0, memoryview(bytearray(10)))


def test_a_file_that_is_written_to_is_found_by_the_check(folder: Path, faulty: Faulty) -> None:
    source = faulty(folder)
    with PersistentReader(source, "file", source.stat("file"), Attempts(QUICK)) as reader:
        reader.read_into(0, memoryview(bytearray(10)))
        reader.check()
        os.utime(folder / "file", ns=(1, 1))
        with pytest.raises(CheckpointError, match="replaced or changed"):
            reader.check()
