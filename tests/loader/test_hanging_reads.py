"""Reads of weights that hang: what they bring too late, and what they hold meanwhile, harms nobody."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import google_crc32c
import pytest
import torch
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader import LoadOptions
from torchinfer.loader.memory import LARGE_PAGE
from torchinfer.loader.readers import Readers

Bed = Any  # that of conftest.py
Read = Callable[[int, list[memoryview], int], int]
Action = Callable[[Read, int, list[memoryview], int], int]
ONE, TWO, FOUR = LoadOptions(readers=1), LoadOptions(readers=2), LoadOptions(readers=4)
STALL_SECONDS = 0.3

pytestmark = pytest.mark.parametrize("storage", ["folder"], indirect=True)


class Hang(logging.Handler):
    """The first read of weights hangs until `released`, and then brings bytes that are not the file's."""

    def __init__(self, bed: Bed) -> None:
        super().__init__()
        self.bed = bed
        self.released, self.given_up, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None  # the one that hangs
        self.num_late_reads = 0  # of its
        self.first: Action = self.hang
        self.others: Action = lambda read, *arguments: read(*arguments)

    def emit(self, record: logging.LogRecord) -> None:
        if "another reader tries again" in record.getMessage():
            self.given_up.set()

    def load(self, options: LoadOptions, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.bed.load(lambda bed: self.install(), dtype, options)
        return found

    def install(self) -> None:
        whole = os.preadv

        def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            thread = threading.current_thread()
            if flags or thread.name != "reader":
                return whole(descriptor, buffers, offset, flags)
            if self.thread is not None:
                self.num_late_reads += thread is self.thread
                return self.others(whole, descriptor, buffers, offset)
            self.thread = thread
            count = self.first(whole, descriptor, buffers, offset)
            self.ended.set()
            return count

        self.bed.patch.setattr(os, "preadv", preadv)

    def hang(self, read: Read, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.released.wait(60)
        buffers[0][:] = b"\xee" * len(buffers[0])
        return len(buffers[0])

    def let_go(self) -> None:
        self.released.set()
        if self.thread is not None:
            self.thread.join(10)
            assert not self.thread.is_alive()


@pytest.fixture
def hang(bed: Bed) -> Iterator[Hang]:
    found, logger = Hang(bed), logging.getLogger("torchinfer.loader.readers")
    logger.addHandler(found)
    bed.patch.setattr("torchinfer.loader.weights.Readers", partial(Readers, stall_seconds=STALL_SECONDS))
    bed.patch.setattr("torchinfer.loader.readers.JOIN_SECONDS", 0.1)
    yield found
    logger.removeHandler(found)
    found.let_go()


@pytest.fixture
def expected(bed: Bed) -> dict[str, Tensor]:
    """What is loaded when nothing hangs."""
    found: dict[str, Tensor] = bed.load(lambda bed: None, torch.float32, FOUR)
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("direct", [False, True])
def test_what_comes_after_the_load_reaches_no_parameter(
    bed: Bed, expected: dict[str, Tensor], hang: Hang, direct: bool
) -> None:
    found = hang.load(LoadOptions(readers=4, direct=direct))
    assert hang.given_up.is_set() and not hang.ended.is_set()
    assert same(found, expected)
    hang.let_go()
    assert hang.ended.is_set() and same(found, expected)
    assert bed.left(kept=[*found.values(), *expected.values()]) == []


def test_what_comes_after_another_reader_has_read_the_same_reaches_no_parameter(
    bed: Bed, expected: dict[str, Tensor], hang: Hang
) -> None:
    def others(read: Read, *arguments: Any) -> int:
        count = read(*arguments)
        if hang.given_up.is_set():
            hang.released.set()
            assert hang.ended.wait(10)
        return count

    hang.others = others
    assert same(hang.load(FOUR), expected) and hang.ended.is_set()


def test_what_comes_while_others_still_read_is_read_again(bed: Bed, expected: dict[str, Tensor], hang: Hang) -> None:
    def others(read: Read, *arguments: Any) -> int:
        assert hang.given_up.wait(10)
        hang.released.set()
        assert hang.ended.wait(10)
        return read(*arguments)

    hang.others = others
    assert same(hang.load(TWO), expected)


def test_what_comes_too_late_does_not_disturb_the_verification(
    bed: Bed, expected: dict[str, Tensor], hang: Hang
) -> None:
    def others(read: Read, *arguments: Any) -> int:
        hang.released.set()
        assert hang.ended.wait(10)
        return read(*arguments)

    hang.others = others
    sums = [f"{google_crc32c.value((bed.folder / shard).read_bytes()):08x}  {shard}\n" for shard in bed.shards]
    (bed.folder / "CRC32C").write_text("".join(sums))
    assert same(hang.load(LoadOptions(readers=1, verify=True)), expected)
    assert hang.given_up.is_set()


def test_a_reader_that_was_given_up_reads_no_more(bed: Bed, expected: dict[str, Tensor], hang: Hang) -> None:
    """It was only slow."""

    def some(read: Read, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return read(descriptor, [buffers[0][:100]], offset)

    def slow(read: Read, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert hang.given_up.wait(10)
        return some(read, descriptor, buffers, offset)

    hang.first, hang.others = slow, some
    assert same(hang.load(ONE), expected)
    assert hang.num_late_reads == 0


def test_a_load_goes_on_with_the_memory_that_is_left(bed: Bed, hang: Hang) -> None:
    expected = bed.load(lambda bed: None, torch.bfloat16, FOUR)
    found = hang.load(LoadOptions(readers=3, memory=2 * LARGE_PAGE), torch.bfloat16)
    assert hang.given_up.is_set() and not hang.ended.is_set()
    assert same(found, expected)
    assert [size for size in bed.live_memory() if size >= LARGE_PAGE] == [LARGE_PAGE]  # what it may still write to
    hang.let_go()
    assert bed.left(kept=[*found.values(), *expected.values()]) == []


def test_memory_that_a_hanging_read_may_write_to_is_not_taken_twice(bed: Bed, hang: Hang) -> None:
    message = rf"gave nothing of model-1.* for 0.9 s; {LARGE_PAGE} bytes of the load memory are held by reads that hang"
    with pytest.raises(CheckpointError, match=message):
        hang.load(LoadOptions(readers=3, memory=LARGE_PAGE), torch.bfloat16)
    assert hang.given_up.is_set() and not hang.ended.is_set()
    assert bed.live_memory() == [LARGE_PAGE]  # nothing else of the load lives as long
    hang.let_go()
    assert bed.left() == []


def test_ctrl_c_does_not_wait_for_a_read_that_hangs(bed: Bed, hang: Hang) -> None:
    def interrupted(*arguments: Any) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return hang.hang(*arguments)

    hang.first = interrupted
    with pytest.raises(KeyboardInterrupt):
        hang.load(FOUR)
    assert not hang.ended.is_set()
    hang.let_go()
    assert bed.left() == []


def test_a_trickle_is_an_error(bed: Bed, hang: Hang) -> None:
    def trickle(read: Read, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.02)
        return read(descriptor, [buffers[0][:1]], offset)

    hang.first = hang.others = trickle
    message = r"/model-.* gave \d+ bytes of \[\d+, \d+\) in 0.3 s; 3 readers tried, and 1048576 bytes in that time are"
    with pytest.raises(CheckpointError, match=message):
        hang.load(FOUR)
    assert bed.left() == []
