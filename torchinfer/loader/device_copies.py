"""Copies from pinned staging memory to a CUDA device, on a stream of their own, beside what the device computes.

    copy stream     piece -> device    piece -> device    ...
    current stream          convert, pack, place   convert, pack, place   ...

The current stream waits for the copy of a piece before it uses it. A buffer is given back when the copies of its pieces
are done, which an event says; nobody waits for that, but where MAX_PENDING buffers are behind.

Not yet run on a GPU: written after the documentation of streams and of the caching allocator in torch (CUDA semantics,
https://docs.pytorch.org/docs/stable/notes/cuda.html), and tested with a device that does late what it is told
(tests/loader/test_device_copies.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

MAX_PENDING = 4  # buffers whose copies are under way: what they become on the device is memory that the model lacks


class Cuda(Protocol):
    """What is needed of torch.cuda."""

    def Stream(self, device: torch.device) -> Any:  # torch's name
        """A new stream."""

    def Event(self) -> Any:
        """An event that is not recorded yet."""

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside of it the stream is the current one."""

    def current_stream(self, device: torch.device) -> Any:
        """What work is added to."""


@dataclass(slots=True)
class DeviceCopies:
    """For one thread."""

    device: torch.device
    cuda: Cuda
    _stream: Any = field(init=False)
    _pending: deque[tuple[Any, Tensor, Callable[[Tensor], None]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._stream = self.cuda.Stream(self.device)

    def to_device(self, content: Tensor) -> Tensor:
        """A copy for the current stream; what is copied from pinned memory must stay until `release` gives it back."""
        with self.cuda.stream(self._stream):
            found = content.to(self.device, non_blocking=True)
        current = self.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        # Its memory is the copy stream's, which uses it again once it is freed: not before what is launched here.
        found.record_stream(current)
        return found

    def release(self, buffer: Tensor, give_back: Callable[[Tensor], None]) -> None:
        """Call `give_back` with a buffer, in a later `collect`, when all that was copied until now has left it."""
        event = self.cuda.Event()
        event.record(self._stream)
        self._pending.append((event, buffer, give_back))
        if len(self._pending) > MAX_PENDING:
            self._pending[0][0].synchronize()
        self.collect()

    def collect(self) -> None:
        """Give back what has been copied."""
        while self._pending and self._pending[0][0].query():
            _, buffer, give_back = self._pending.popleft()
            give_back(buffer)
