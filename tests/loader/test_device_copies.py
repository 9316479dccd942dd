"""Copies to a device that does late what it is told: nothing is read before it is there, or overwritten before it is
copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from torchinfer.loader.device_copies import MAX_PENDING, DeviceCopies

DEVICE = torch.device("cpu")


@dataclass(eq=False)
class Stream:
    """Work that is done in its order, when somebody asks for it; `wait_stream` makes it wait for all of another's."""

    work: deque[Callable[[], object]] = field(default_factory=deque)
    num_added: int = 0
    num_done: int = 0

    def add(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        self.num_added += 1

    def run(self, until: int) -> None:
        while self.num_done < until:
            self.work.popleft()()
            self.num_done += 1

    def wait_stream(self, other: Stream) -> None:
        until = other.num_added
        self.add(lambda: other.run(until))


class Event:
    """A place in a stream."""

    def record(self, stream: Stream) -> None:
        self._stream, self._until = stream, stream.num_added

    def query(self) -> bool:
        return self._stream.num_done >= self._until

    def synchronize(self) -> None:
        self._stream.run(self._until)


class LateCuda:
    """torch.cuda, as far as copies need it."""

    def __init__(self) -> None:
        self.current = self.default = Stream()
        self.copies: Stream | None = None

    def Stream(self, device: torch.device) -> Stream:
        self.copies = Stream()
        return self.copies

    def Event(self) -> Event:
        return Event()

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@dataclass(eq=False)
class OnDevice:
    """What a copy becomes: its numbers are there when the stream has come to it."""

    stream: Stream
    users: list[Stream] = field(default_factory=list)
    numbers: list[int] | None = None

    def record_stream(self, stream: Stream) -> None:
        self.users.append(stream)


@dataclass(eq=False)
class Pinned:
    """Host memory whose copy is made when the stream comes to it, of what is in it then."""

    cuda: LateCuda
    numbers: list[int]

    def to(self, device: torch.device, non_blocking: bool) -> OnDevice:
        assert non_blocking, "a copy that is waited for"
        found = OnDevice(self.cuda.current)

        def copy() -> None:
            found.numbers = list(self.numbers)

        self.cuda.current.add(copy)
        return found


def load(cuda: LateCuda, num_buffers: int, num_extents: int, eagerness: int) -> list[Any]:
    """Copy extents through a ring of buffers, as a load does; what the current stream computes with at the end."""
    copies, used = DeviceCopies(DEVICE, cuda), list[Any]()
    free = [Pinned(cuda, []) for _ in range(num_buffers)]
    for number in range(num_extents):
        copies.collect()
        while not free:
            assert cuda.copies is not None and cuda.copies.num_done < cuda.copies.num_added, "nothing would free one"
            cuda.copies.run(cuda.copies.num_done + 1)
            copies.collect()
        buffer = free.pop(0)
        buffer.numbers = [number]  # the reader overwrites it
        for _ in range(2):  # pieces
            piece: Any = copies.to_device(buffer)  # type: ignore[arg-type]
            assert piece.stream is cuda.copies and cuda.current is cuda.default
            assert piece.users == [cuda.default], "its memory could be used again too soon"
            cuda.current.add(lambda piece=piece: used.append(piece.numbers))  # type: ignore[misc]
        copies.release(buffer, free.append)  # type: ignore[arg-type]
        assert cuda.copies is not None
        cuda.copies.run(min(cuda.copies.num_done + eagerness, cuda.copies.num_added))
    cuda.default.run(cuda.default.num_added)
    copies.collect()
    assert len(free) == num_buffers, "all buffers come back"
    return used


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 20])
@pytest.mark.parametrize("eagerness", [0, 1, 5])
def test_every_extent_is_used_as_it_was_read(num_buffers: int, eagerness: int) -> None:
    assert load(LateCuda(), num_buffers, 12, eagerness) == [[number] for number in range(12) for _ in range(2)]


def test_the_host_does_not_wait_for_a_copy() -> None:
    cuda, free = LateCuda(), list[Any]()
    copies = DeviceCopies(DEVICE, cuda)
    buffer: Any = Pinned(cuda, [1])
    copies.to_device(buffer)
    copies.release(buffer, free.append)
    assert cuda.copies is not None and cuda.copies.num_done == 0 and not free
    cuda.copies.run(1)
    copies.collect()
    assert free == [buffer]


def test_no_more_buffers_are_behind_than_the_device_has_room_for() -> None:
    cuda, free = LateCuda(), list[Any]()
    copies = DeviceCopies(DEVICE, cuda)
    for number in range(3 * MAX_PENDING):
        buffer: Any = Pinned(cuda, [number])
        copies.to_device(buffer)
        copies.release(buffer, free.append)
        assert len(free) == max(0, number + 1 - MAX_PENDING)
