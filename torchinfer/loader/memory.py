"""Host memory of a load: what tensors are read into, in large pages, and the staging memory with its hard limit."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchinfer.errors import DeviceError
from torchinfer.loader.retry import Stopped

logger = logging.getLogger(__name__)

LARGE_PAGE = 2 << 20
SLAB_BYTES = 512 << 20
PARAMETER_ALIGNMENT = 64


def allocate(num_bytes: int) -> Tensor:
    """Fresh memory as uint8 [num_bytes], aligned to a page; in large pages where they pay (madvise(2), THP).

    One fault for 2 MiB instead of 512 for 4 KiB each: half of the time of a load from the page cache are faults.
    """
    if num_bytes < LARGE_PAGE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DeviceError(f"the host has no {num_bytes} bytes of memory: {error}; use a machine with more") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:  # a kernel that was built without them
            logger.debug("no large pages: %s", error)
    return torch.frombuffer(memory, dtype=torch.uint8)


def trim_heap() -> None:
    """Let the system have what the C library keeps of freed memory, see malloc_trim(3).

    glibc's heap grows by nearly every large tensor of torch's that is made and freed: they are aligned, and the hole
    that one leaves is too small for the next.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@dataclass(slots=True)
class Slabs:
    """Memory for parameters, one behind the other in slabs: by itself each would end in small pages. A slab is freed
    with the last tensor in it."""

    expected: int  # bytes that all parameters take, `padded`; slabs are not larger than what is left of it
    _slab: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    _used: int = 0

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes], aligned for every dtype and instruction; raises like `allocate`."""
        if self._used + num_bytes > len(self._slab):
            self._slab, self._used = allocate(max(num_bytes, min(SLAB_BYTES, self.expected))), 0
        start, size = self._used, padded(num_bytes)
        self._used += size
        self.expected -= size
        return self._slab[start : start + num_bytes]


def padded(num_bytes: int) -> int:
    """What a parameter takes of a slab."""
    return -(-num_bytes // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT


def buffer_bytes(num_bytes: int, is_pinned: bool) -> int:
    """What a buffer for so many bytes takes: whole large pages; pinned a power of two, as torch's allocator makes it
    (ATen/core/CachingHostAllocator.h, torch 2.9)."""
    size = -(-num_bytes // LARGE_PAGE) * LARGE_PAGE
    return 1 << (size - 1).bit_length() if is_pinned and size else size


@dataclass(slots=True)
class Staging:
    """Buffers on the way from the storage to their place; together never more than `limit` bytes.

    Buffers are used again, because memory that was touched once is faster, and pinning is slow.
    """

    limit: int
    is_pinned: bool = False
    peak: int = 0  # bytes, most that were ever held
    _held: int = 0  # in use and free
    _free: list[Tensor] = field(default_factory=list)
    _condition: threading.Condition = field(default_factory=threading.Condition)

    def take(self, num_bytes: int, stop: threading.Event) -> Tensor:
        """A buffer of at least `num_bytes`, uint8, aligned to a page; waits until the limit allows it.

        Raises:
            Stopped: `stop` was set meanwhile.
        """
        size = buffer_bytes(num_bytes, self.is_pinned)
        assert size <= self.limit, f"{size} bytes at once are over the limit of {self.limit}; plan() sees to that"
        with self._condition:
            while not stop.is_set():
                fitting = [buffer for buffer in self._free if size <= len(buffer) <= 2 * size]
                if fitting:
                    buffer = min(fitting, key=len)
                    self._remove_free(buffer)
                    return buffer
                while self._free and self._held + size > self.limit:
                    self._held -= len(self._free.pop(0))
                if self._held + size <= self.limit:
                    self._held += size
                    self.peak = max(self.peak, self._held)
                    return torch.empty(size, dtype=torch.uint8, pin_memory=True) if self.is_pinned else allocate(size)
                self._condition.wait(0.1)
        raise Stopped

    def give_back(self, buffer: Tensor) -> None:
        """Return what `take` gave; nothing may read it any more."""
        with self._condition:
            self._free.append(buffer)
            self._condition.notify_all()

    def clear(self) -> None:
        """Free the buffers that nobody uses."""
        with self._condition:
            self._held -= sum(map(len, self._free))
            self._free.clear()

    def _remove_free(self, buffer: Tensor) -> None:
        self._free = [other for other in self._free if other is not buffer]
