"""Threads that read extents: each extent through a handle of its own, into its place or into staging memory.

Back-pressure is the staging memory: a reader that gets none waits until what others read has been placed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader.checksum import Checksums, Part, add_part
from torchinfer.loader.memory import Staging
from torchinfer.loader.plan import Extent, Piece
from torchinfer.loader.retry import Attempts, PersistentReader, Stopped
from torchinfer.loader.source import ALIGNMENT, DirectUnsupportedError, FileStat, Source
from torchinfer.loader.stall import MAX_STALLS, STALL_SECONDS
from torchinfer.loader.tuning import PROBE_READERS, DirectChoice, ReaderCount

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
JOIN_SECONDS = 5.0
MAX_UNPLACED = 2  # beyond, readers wait: buffers that are used again are faster than more of them


@dataclass(slots=True)
class Filled:
    """An extent that has been read. `buffer` holds the pieces in `staged`; the others are in their place."""

    extent: Extent
    buffer: Tensor | None
    staged: list[Piece]

    def bytes_of(self, piece: Piece) -> Tensor:
        """uint8 [num_bytes], a view of the staging memory."""
        assert self.buffer is not None
        start = piece.offset - _base(self.extent)
        return self.buffer[start : start + piece.num_bytes]


@dataclass(slots=True, eq=False)
class _Job:
    """One attempt at one extent."""

    extent: Extent
    num_stalls: int
    is_cached: bool = False
    is_direct: bool = False
    num_bytes: int = 0
    last_byte: float | None = None  # when bytes came last; None while the job waits for memory
    is_abandoned: bool = False
    started: float = 0.0
    buffer: Tensor | None = None
    parts: list[Part] = field(default_factory=list)  # for the checksum

    def count(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.last_byte = time.monotonic()


@dataclass(slots=True)
class Readers:
    """Reads extents side by side, as many as `count` says; iterate over `filled()` and call `close()`."""

    source: Source
    stats: Mapping[str, FileStat]
    extents: deque[Extent]
    staging: Staging
    place_of: Callable[[Piece], Tensor | None]  # uint8 memory to read a piece into; None: into staging
    count: ReaderCount
    direct: DirectChoice
    checksums: Checksums | None = None  # None: nothing is verified
    stall_seconds: float = STALL_SECONDS  # without a byte, after which an extent is read by another reader
    attempts: Attempts = field(default_factory=Attempts)
    poll_seconds: float = POLL_SECONDS  # after which `filled` gives None
    most_readers: int = 0
    _jobs: set[_Job] = field(default_factory=set)
    _stalls: dict[tuple[str, int], int] = field(default_factory=dict)  # by shard and begin of the extent
    _threads: list[threading.Thread] = field(default_factory=list)
    _num_running: int = 0  # threads that have or look for a job
    _done: queue.SimpleQueue[Filled | BaseException] = field(default_factory=queue.SimpleQueue)
    _condition: threading.Condition = field(default_factory=threading.Condition)
    _finished_bytes: int = 0
    _has_waited: bool = False  # whether anything was read that was not in the page cache
    _num_unplaced: int = 0  # extents that were read and wait, or are being placed

    @property
    def num_bytes(self) -> int:
        """Wanted bytes that have been read until now."""
        with self._condition:
            return self._finished_bytes + sum(job.num_bytes for job in self._jobs)

    @property
    def num_active(self) -> int:
        return len(self._jobs)

    def filled(self) -> Iterator[Filled | None]:
        """Each extent once, in the order in which they are ready; None now and then while there is none.

        Raises:
            CheckpointError: an extent cannot be read.
        """
        remaining = len(self.extents)
        while remaining:
            self._adapt()
            try:
                found = self._done.get(timeout=self.poll_seconds)
            except queue.Empty:
                yield None
                continue
            if isinstance(found, BaseException):
                raise found
            remaining -= 1
            yield found
            with self._condition:
                self._num_unplaced -= 1
                self._condition.notify_all()

    def close(self) -> None:
        """Stop all readers and wait for them; those that the storage does not let go end by themselves."""
        self.attempts.stop.set()
        with self._condition:
            self._condition.notify_all()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        num_alive = sum(thread.is_alive() for thread in self._threads)
        if num_alive:
            logger.warning("%d readers still wait for %s; they end when it answers", num_alive, self.source.address)

    def _adapt(self) -> None:
        """Follow the measured rate, and replace readers that hang."""
        now = time.monotonic()
        # Copies out of the page cache want as many readers as processors, no more. And while reads around it are
        # compared with others, as many must share the disk in both; streams over a network do not share much.
        is_comparing = self.direct.choice is None and not self.source.is_network
        if self._has_waited and is_comparing:
            self.count.raise_to(PROBE_READERS)
        elif self._has_waited:
            self.count.observe(now, self.num_bytes, self.attempts.num_retries)
        target = self.count.target
        with self._condition:
            for job in [job for job in self._jobs if job.last_byte and now - job.last_byte > self.stall_seconds]:
                self._abandon(job)
            num_new = min(target - self._num_running, len(self.extents))
            self._num_running += max(0, num_new)
            self._condition.notify_all()
        for _ in range(num_new):
            thread = threading.Thread(target=self._run, name="reader", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _abandon(self, job: _Job) -> None:
        """Give its extent to another reader. Whatever it still gets is thrown away."""
        if job.num_stalls + 1 >= MAX_STALLS:
            raise CheckpointError(
                f"{self.source.address}/{job.extent.shard} gave no byte of [{job.extent.begin}, {job.extent.end}) for "
                f"{self.stall_seconds:g} s, {MAX_STALLS} times; check the storage (and the mount) and load again"
            )
        logger.warning("no byte of %s for %g s: another reader tries again", job.extent.shard, self.stall_seconds)
        job.is_abandoned = True
        self._jobs.discard(job)
        self._num_running -= 1
        self._stalls[job.extent.shard, job.extent.begin] = job.num_stalls + 1
        if job.buffer is not None:
            self.staging.forget(job.buffer)
        self.attempts.num_retries += 1
        self.extents.appendleft(job.extent)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            found: Filled | BaseException
            try:
                found = self._fill(job)
            except Stopped:
                return
            except BaseException as error:  # whatever it is belongs to the thread that waits
                found = error
            with self._condition:
                if job.is_abandoned:
                    return
                self._jobs.discard(job)
                self._finished_bytes += job.num_bytes
                if self.checksums is not None:  # what an abandoned job has read is read and added by another
                    self.checksums.add(job.extent.shard, *job.parts)
                if not job.is_cached:
                    self.direct.observe(job.is_direct, job.num_bytes, time.monotonic() - job.started)
                self._num_unplaced += 1
            self._done.put(found)

    def _next(self) -> _Job | None:
        with self._condition:
            while not self.attempts.stop.is_set():
                if len(self._jobs) < self.count.target and self._num_unplaced <= MAX_UNPLACED:
                    if not self.extents:
                        break
                    extent = self.extents.popleft()
                    job = _Job(extent, self._stalls.get((extent.shard, extent.begin), 0))
                    self._jobs.add(job)
                    self.most_readers = max(self.most_readers, len(self._jobs))
                    return job
                self._condition.wait(POLL_SECONDS)
            self._num_running -= 1
        return None

    def _fill(self, job: _Job) -> Filled:
        extent = job.extent
        self._choose(job)
        places = [self.place_of(piece) for piece in extent.pieces]
        if job.is_direct or any(place is None for place in places):
            job.buffer = self.staging.take(extent.staging_bytes, self.attempts.stop)
        staged = [piece for piece, place in zip(extent.pieces, places, strict=True) if place is None]
        filled = Filled(extent, job.buffer, staged)
        job.started = job.last_byte = time.monotonic()
        try:
            self._read(job, filled, places)
        except BaseException:
            self._give_back(job)
            raise
        if not staged:
            self._give_back(job)
            filled.buffer = None
        return filled

    def _choose(self, job: _Job) -> None:
        """Around the page cache or through it; what is in it already is not read from storage again."""
        extent = job.extent
        if not self.direct.is_given:
            job.is_cached = self.source.is_cached(extent.shard, extent.begin, extent.end - extent.begin)
        with self._condition:
            self._has_waited |= not job.is_cached
            job.is_direct = not job.is_cached and self.direct.next()

    def _give_back(self, job: _Job) -> None:
        with self._condition:
            if job.buffer is not None and not job.is_abandoned:
                self.staging.give_back(job.buffer)
                job.buffer = None

    def _read(self, job: _Job, filled: Filled, places: list[Tensor | None]) -> None:
        if job.is_direct:
            try:
                self._read_direct(job, filled, places)
            except DirectUnsupportedError:
                self.direct.refuse()
                job.is_direct, job.num_bytes = False, 0
                job.parts.clear()
            else:
                return
        extent = job.extent
        stat = self.stats[extent.shard]
        with PersistentReader(self.source, extent.shard, stat, self.attempts, end=extent.end) as reader:
            for begin, memory in _targets(filled, places):
                reader.read_into(begin, memory.numpy().data, job.count)
                self._sum(job, begin, memory)
            reader.check()

    def _read_direct(self, job: _Job, filled: Filled, places: list[Tensor | None]) -> None:
        """All through the buffer, at the same distance from an aligned byte as in the file."""
        extent, buffer = job.extent, filled.buffer
        assert buffer is not None
        base = _base(extent)
        stat = self.stats[extent.shard]
        with PersistentReader(self.source, extent.shard, stat, self.attempts, direct=True) as reader:
            for begin, end in _runs(list(extent.pieces)):
                first, last = begin // ALIGNMENT * ALIGNMENT, -(-end // ALIGNMENT) * ALIGNMENT
                reader.read_aligned(first, buffer[first - base : last - base].numpy().data, job.count)
                self._sum(job, begin, buffer[begin - base : end - base])
            reader.check()
        for piece, place in zip(extent.pieces, places, strict=True):
            if place is not None:
                place.copy_(filled.bytes_of(piece))

    def _sum(self, job: _Job, begin: int, content: Tensor) -> None:
        if self.checksums is not None:
            add_part(job.parts, begin, content)


def _base(extent: Extent) -> int:
    return extent.begin // ALIGNMENT * ALIGNMENT


def _runs(pieces: list[Piece]) -> list[tuple[int, int]]:
    """[begin, end) of the bytes of neighbouring pieces taken together."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece.offset:
            runs[-1] = (runs[-1][0], piece.end)
        else:
            runs.append((piece.offset, piece.end))
    return runs


def _targets(filled: Filled, places: list[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
    """(first byte in the file, memory), forward: places one by one, staged neighbours together."""
    base = _base(filled.extent)
    staged: list[Piece] = []
    for piece, place in [*zip(filled.extent.pieces, places, strict=True), (None, None)]:
        if piece is not None and place is None:
            staged.append(piece)
            continue
        for begin, end in _runs(staged):
            assert filled.buffer is not None
            yield begin, filled.buffer[begin - base : end - base]
        staged = []
        if piece is not None and place is not None:
            yield piece.offset, place
