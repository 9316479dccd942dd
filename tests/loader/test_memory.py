"""Staging memory: its limit holds, buffers come back, and whoever waits is stopped."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from torchinfer.loader.memory import LARGE_PAGE, SLAB_BYTES, Slabs, Staging, allocate, buffer_bytes, padded
from torchinfer.loader.retry import Stopped

GO = threading.Event()


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, LARGE_PAGE - 1, LARGE_PAGE, 3 * LARGE_PAGE + 5])
def test_memory_is_fresh_and_of_the_right_size(num_bytes: int) -> None:
    memory = allocate(num_bytes)
    assert memory.dtype == torch.uint8 and memory.shape == (num_bytes,)
    memory.fill_(7)
    assert num_bytes < LARGE_PAGE or memory.data_ptr() % 4096 == 0


def test_a_kernel_without_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(mmap.mmap):
        def madvise(self, *_: object) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # madvise(2): MADV_HUGEPAGE, not configured

    monkeypatch.setattr(mmap, "mmap", Small)
    assert allocate(LARGE_PAGE).fill_(7).sum() == 7 * LARGE_PAGE


HOLES = """
import torch
from pathlib import Path
from torchinfer.loader.memory import trim_heap
def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])
def ones(size):
    return torch.ones(size, dtype=torch.uint8)
ones(24 << 20)  # from now on as much comes from the heap
pairs = [(ones(8 << 20), ones(4 << 20)) for _ in range(12)]  # no hole that imports left is as large
kept = [small for _, small in pairs]
del pairs
before = resident()
trim_heap()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_what_was_freed_between_small_tensors_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80 << 20


def test_parameters_lie_one_behind_the_other_and_do_not_overlap() -> None:
    slabs = Slabs(0)
    sizes = [3, 1000, 0, LARGE_PAGE, SLAB_BYTES + 1, 5, SLAB_BYTES - 100, 200]
    found = [slabs.allocate(size) for size in sizes]
    places = sorted((memory.data_ptr(), size) for memory, size in zip(found, sizes, strict=True) if size)
    assert [len(memory) for memory in found] == sizes
    assert all(memory.data_ptr() % 64 == 0 for memory in found)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(places))


def test_slabs_are_not_larger_than_what_they_are_for() -> None:
    slabs = Slabs(padded(1000) + padded(500))
    first, second = slabs.allocate(1000), slabs.allocate(500)
    assert first.untyped_storage().nbytes() == padded(1000) + padded(500)
    assert second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_a_buffer_is_used_again() -> None:
    staging = Staging(4 * LARGE_PAGE)
    first = staging.take(LARGE_PAGE, GO)
    staging.give_back(first)
    assert staging.take(LARGE_PAGE - 9, GO).data_ptr() == first.data_ptr()
    assert staging.peak == LARGE_PAGE


def test_free_buffers_make_way_for_one_of_another_size() -> None:
    staging = Staging(4 * LARGE_PAGE)
    for buffer in [staging.take(LARGE_PAGE, GO) for _ in range(4)]:
        staging.give_back(buffer)
    assert len(staging.take(4 * LARGE_PAGE, GO)) == 4 * LARGE_PAGE
    assert staging.peak == 4 * LARGE_PAGE


def test_who_finds_no_memory_waits_for_it() -> None:
    staging = Staging(2 * LARGE_PAGE)
    held = staging.take(2 * LARGE_PAGE, GO)
    threading.Timer(0.05, staging.give_back, [held]).start()
    assert len(staging.take(LARGE_PAGE, GO)) == 2 * LARGE_PAGE
    assert staging.peak == 2 * LARGE_PAGE


def test_a_stop_ends_the_wait() -> None:
    staging, stop = Staging(LARGE_PAGE), threading.Event()
    staging.take(1, stop)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        staging.take(1, stop)


def test_what_nobody_uses_can_be_freed() -> None:
    staging = Staging(2 * LARGE_PAGE)
    first, second = staging.take(1, GO), staging.take(1, GO)
    memory = StorageWeakRef(first.untyped_storage())
    staging.give_back(first)
    del first
    staging.clear()
    assert memory.expired()
    staging.give_back(second)
    assert len(staging.take(2 * LARGE_PAGE, GO)) == 2 * LARGE_PAGE  # the second makes way


@pytest.mark.parametrize(("num_pages", "pinned"), [(0, 0), (1, 1), (2, 2), (3, 4), (33, 64)])
def test_pinned_buffers_are_counted_as_torch_makes_them(num_pages: int, pinned: int) -> None:
    num_bytes = max(0, num_pages * LARGE_PAGE - 1)
    assert buffer_bytes(num_bytes, False) == num_pages * LARGE_PAGE
    assert buffer_bytes(num_bytes, True) == pinned * LARGE_PAGE
