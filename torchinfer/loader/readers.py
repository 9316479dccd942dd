"""Threads that read extents: each extent through a handle of its own, into its place or into staging memory.

Back-pressure is the staging memory: a reader that gets none waits until what others read has been placed.

A read that hangs can neither be ended nor told that it is not wanted any more: whenever the storage answers, its bytes
come into the memory that it was given. So that memory is used for nothing else until its reader has ended. Staging
memory still counts then. An extent that goes straight into a parameter is read again by another reader when the first
has ended, or when nothing else is left to read: then the parameter moves to other memory before.
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
from torchinfer.loader.extent_reader import base_of, read_extent, read_extent_directly
from torchinfer.loader.header import shorten
from torchinfer.loader.memory import Staging
from torchinfer.loader.plan import Extent, Piece
from torchinfer.loader.retry import Attempts, PersistentReader, RetryPolicy, Stopped
from torchinfer.loader.source import DirectUnsupportedError, FileStat, Source
from torchinfer.loader.stall import MAX_STALLS, STALL_BYTES, STALL_SECONDS, Progress
from torchinfer.loader.tuning import PROBE_READERS, DirectChoice, ReaderCount

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
JOIN_SECONDS = 5.0
MAX_UNPLACED = 2  # beyond, readers wait: buffers that are used again are faster than more of them
GRACE = 1 / 3  # of a stall's time: how long a reader that was given up has to end before a parameter moves


@dataclass(slots=True)
class Filled:
    """An extent that has been read. `buffer` holds the pieces in `staged`; the others are in their place."""

    extent: Extent
    buffer: Tensor | None
    staged: list[Piece]

    def bytes_of(self, piece: Piece) -> Tensor:
        """uint8 [num_bytes], a view of the staging memory."""
        assert self.buffer is not None
        start = piece.offset - base_of(self.extent)
        return self.buffer[start : start + piece.num_bytes]

    def take_buffer(self) -> Tensor | None:
        """The staging memory, to give it back: who still looks at this object must not keep it from being freed."""
        buffer, self.buffer = self.buffer, None
        return buffer


@dataclass(slots=True, eq=False)
class _Job:
    """One try at one extent, by one reader."""

    extent: Extent
    num_stalls: int  # of the tries before
    attempts: Attempts
    is_cached: bool = False
    is_direct: bool = False
    num_bytes: int = 0
    started: float = 0.0
    last_byte: float = 0.0  # when bytes came last
    progress: Progress | None = field(default_factory=Progress)  # None while it waits for memory, or for room in it
    given_up: float = 0.0  # when; its reader hangs, or is about to end
    buffer: Tensor | None = None
    placed: list[Piece] = field(default_factory=list)  # what is read straight into its place
    parts: list[Part] = field(default_factory=list)  # for the checksum

    def count(self, num_bytes: int) -> None:
        assert self.progress is not None
        self.progress.count(num_bytes)
        self.num_bytes += num_bytes
        self.last_byte = time.monotonic()

    def is_stalled(self, seconds: float) -> bool:
        progress = self.progress
        return progress is not None and progress.is_stalled(seconds)


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
    relocate: Callable[[list[Piece]], None] | None = None  # give what has places for these pieces other memory
    checksums: Checksums | None = None  # None: nothing is verified
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    stall_seconds: float = STALL_SECONDS  # with less than STALL_BYTES, after which another reader reads an extent
    poll_seconds: float = POLL_SECONDS  # after which `filled` gives None
    most_readers: int = 0
    stop: threading.Event = field(default_factory=threading.Event)  # set by `close`; for what readers wait for
    _jobs: set[_Job] = field(default_factory=set)
    _hung: set[_Job] = field(default_factory=set)  # that were given up, and whose readers have not ended
    _deferred: set[_Job] = field(default_factory=set)  # of them, those whose extents nobody reads yet
    _again: deque[Extent] = field(default_factory=deque)  # to be read once more, whatever the target: others may wait
    _num_moves: int = 0  # of parameters, to other memory
    _stalls: dict[tuple[str, int], int] = field(default_factory=dict)  # by shard and begin of the extent
    _threads: list[threading.Thread] = field(default_factory=list)
    _num_running: int = 0  # threads that have or look for a job
    _done: queue.SimpleQueue[Filled | BaseException] = field(default_factory=queue.SimpleQueue)
    _condition: threading.Condition = field(default_factory=threading.Condition)
    _finished_bytes: int = 0
    _finished_retries: int = 0
    _last_error: str = ""  # of a reader that was given up, for messages
    _last_byte: float = field(default_factory=time.monotonic)  # for any reader, or when something was placed
    _last_look: float = field(default_factory=time.monotonic)
    _has_waited: bool = False  # whether anything was read that was not in the page cache
    _num_unplaced: int = 0  # extents that were read and wait, or are being placed

    @property
    def num_bytes(self) -> int:
        """Wanted bytes that have been read until now."""
        with self._condition:
            return self._finished_bytes + sum(job.num_bytes for job in self._jobs)

    @property
    def num_retries(self) -> int:
        """Reads that failed, and readers that were given up."""
        with self._condition:
            return self._finished_retries + sum(job.attempts.num_retries for job in self._jobs | self._hung)

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
                self._last_byte = time.monotonic()
                self._num_unplaced -= 1
                self._condition.notify_all()

    def close(self) -> None:
        """Stop all readers and wait for them; those that the storage does not let go end by themselves, and until then
        hold memory that nothing else uses."""
        self.stop.set()
        with self._condition:
            for job in self._jobs | self._hung:
                job.attempts.stop.set()
            self._condition.notify_all()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        num_alive = sum(thread.is_alive() for thread in self._threads)
        if num_alive:
            logger.warning("%d readers still wait for %s; they end when it answers", num_alive, self.source.address)
        # A reader that hangs holds this object, and nothing else of the load shall live as long.
        self.place_of, self.relocate = lambda piece: None, None
        self.staging.clear()
        self._done = queue.SimpleQueue()

    def _adapt(self) -> None:
        """Follow the measured rate, and replace readers that hang."""
        now = time.monotonic()
        self._tune(now)
        with self._condition:
            self._check_silence(now)
            for job in [job for job in self._jobs if job.is_stalled(self.stall_seconds)]:
                self._give_up(job, now)
            self._relocate(now)
            num_new = max(min(self.count.target - self._num_running, len(self.extents)), len(self._again))
            self._num_running += num_new
            self._condition.notify_all()
        for _ in range(num_new):
            thread = threading.Thread(target=self._run, name="reader", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _tune(self, now: float) -> None:
        # Copies out of the page cache want as many readers as processors, no more. And while reads around it are
        # compared with others, as many must share the disk in both; streams over a network do not share much.
        is_comparing = self.direct.choice is None and not self.source.is_network
        if self._has_waited and is_comparing:
            self.count.raise_to(PROBE_READERS)
        elif self._has_waited:
            self.count.observe(now, self.num_bytes, self.num_retries)

    def _give_up(self, job: _Job, now: float) -> None:
        """A reader that hangs: its extent is another's, at once or when nobody writes to its place any more."""
        extent, came = job.extent, job.progress.num_bytes if job.progress else 0
        what = (
            f"{self.source.address}/{extent.shard} gave {came} bytes of [{extent.begin}, {extent.end}) in "
            f"{self.stall_seconds:g} s"
        )
        if job.attempts.last_error:
            self._last_error = f" (last error: {job.attempts.last_error})"
        if job.num_stalls + 1 >= MAX_STALLS:
            raise CheckpointError(
                f"{what}{self._last_error}; {MAX_STALLS} readers tried, and {STALL_BYTES} bytes in that time are the "
                "least: check the storage (and the mount) and load again"
            )
        job.given_up = now
        job.attempts.stop.set()  # before looking at what it has placed: it looks at this before it reads
        self._jobs.discard(job)
        self._hung.add(job)
        self._num_running -= 1
        self._stalls[extent.shard, extent.begin] = job.num_stalls + 1
        self._finished_retries += 1
        if job.placed:
            self._deferred.add(job)
        else:
            self._again.append(extent)
        logger.warning("%s: another reader tries again", what)

    def _check_silence(self, now: float) -> None:
        """Where nobody gets anything, it does not help to try each extent three times."""
        self._last_byte = max([self._last_byte, *(job.last_byte for job in self._jobs)])
        is_waiting_for_memory = bool(self._jobs) and all(job.progress is None for job in self._jobs)
        was_away = now - self._last_look > self.stall_seconds  # this process was stopped, or has placed for long
        if was_away or (is_waiting_for_memory and not self._hung):
            self._last_byte = now
        self._last_look = now
        jobs, seconds = self._jobs | self._hung, MAX_STALLS * self.stall_seconds
        if jobs and now - self._last_byte > seconds:
            shards = ", ".join(shorten(sorted({job.extent.shard for job in jobs})))
            num_bytes = sum(len(job.buffer) for job in self._hung if job.buffer is not None)
            held = f"; {num_bytes} bytes of the load memory are held by reads that hang" if num_bytes else ""
            raise CheckpointError(
                f"{self.source.address} gave nothing of {shards} for {seconds:g} s{self._last_error}{held}; check the "
                "storage (and the mount) and load again"
            )

    def _relocate(self, now: float) -> None:
        """Where only hanging readers are left, or what others wait for hangs, move what they may write to."""
        grace = GRACE * self.stall_seconds
        is_last = not (self._jobs or self.extents or self._again)
        is_stuck = all(job.progress is None for job in self._jobs) and now - self._last_byte > grace
        if not (is_last or is_stuck) or not all(now - job.given_up > grace for job in self._deferred):
            return
        pieces = [piece for job in self._deferred for piece in job.placed]
        if pieces:
            assert self.relocate is not None
            self.relocate(pieces)
            self._num_moves += 1
        self._again += [job.extent for job in self._deferred]
        self._deferred.clear()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            found: Filled | BaseException | None
            try:
                found = self._fill(job)
            except Stopped:
                found = None
            except BaseException as error:  # whatever it is belongs to the thread that waits
                found = error
            with self._condition:
                self._finished_retries += job.attempts.num_retries
                is_wanted = found is not None and not job.given_up
                if job.buffer is not None and not (is_wanted and isinstance(found, Filled) and found.staged):
                    self.staging.give_back(job.buffer)
                if not is_wanted:
                    self._leave(job)
                    return
                self._finish(job)
            assert found is not None
            self._done.put(found)
            del job, found  # or their buffer would outlive what the staging memory counts

    def _leave(self, job: _Job) -> None:
        """Its reader ends without having read it; whatever it still got is thrown away."""
        self._jobs.discard(job)
        self._hung.discard(job)
        if job in self._deferred:
            self._deferred.discard(job)
            self._again.append(job.extent)

    def _finish(self, job: _Job) -> None:
        self._jobs.discard(job)
        self._last_byte = max(self._last_byte, job.last_byte)
        self._finished_bytes += job.num_bytes
        self._num_unplaced += 1
        if self.checksums is not None:  # what a reader that was given up has read is read and added by another
            self.checksums.add(job.extent.shard, *job.parts)
        if not job.is_cached:
            self.direct.observe(job.is_direct, job.num_bytes, time.monotonic() - job.started)

    def _next(self) -> _Job | None:
        with self._condition:
            while not self.stop.is_set():
                has_turn = len(self._jobs) < self.count.target and self._num_unplaced <= MAX_UNPLACED
                if self._again or (has_turn and self.extents):
                    extent = self._again.popleft() if self._again else self.extents.popleft()
                    job = _Job(extent, self._stalls.get((extent.shard, extent.begin), 0), Attempts(self.policy))
                    self._jobs.add(job)
                    self.most_readers = max(self.most_readers, len(self._jobs))
                    return job
                if has_turn:
                    break
                self._condition.wait(POLL_SECONDS)
            self._num_running -= 1
        return None

    def _fill(self, job: _Job) -> Filled:
        self._choose(job)
        job.progress, num_moves = None, self._num_moves
        places = self._places(job)
        staged = [piece for piece, place in zip(job.extent.pieces, places, strict=True) if place is None]
        if job.is_direct or staged:
            job.buffer = self.staging.take(job.extent.staging_bytes, job.attempts.stop)
        with self._condition:
            if num_moves != self._num_moves:
                places = self._places(job)
            job.started, job.progress = time.monotonic(), Progress()
        if not job.is_direct or not self._read_directly(job, places):
            stat, end = self.stats[job.extent.shard], job.extent.end
            with PersistentReader(self.source, job.extent.shard, stat, job.attempts, end=end) as reader:
                read_extent(reader, job.extent, job.buffer, places, job.count, self._summing(job))
        return Filled(job.extent, job.buffer if staged else None, staged)

    def _places(self, job: _Job) -> list[Tensor | None]:
        places = [self.place_of(piece) for piece in job.extent.pieces]
        job.placed = [piece for piece, place in zip(job.extent.pieces, places, strict=True) if place is not None]
        return places

    def _choose(self, job: _Job) -> None:
        """Around the page cache or through it; what is in it already is not read from storage again."""
        extent = job.extent
        if not self.direct.is_given:
            job.is_cached = self.source.is_cached(extent.shard, extent.begin, extent.end - extent.begin)
        with self._condition:
            self._has_waited |= not job.is_cached
            job.is_direct = not job.is_cached and self.direct.next()

    def _read_directly(self, job: _Job, places: list[Tensor | None]) -> bool:
        """Whether it was possible."""
        assert job.buffer is not None
        stat = self.stats[job.extent.shard]
        try:
            with PersistentReader(self.source, job.extent.shard, stat, job.attempts, direct=True) as reader:
                read_extent_directly(reader, job.extent, job.buffer, places, job.count, self._summing(job))
        except DirectUnsupportedError:
            self.direct.refuse()
            job.is_direct, job.num_bytes = False, 0
            job.parts.clear()
            return False
        return True

    def _summing(self, job: _Job) -> Callable[[int, Tensor], None]:
        def add(begin: int, content: Tensor) -> None:
            if self.checksums is not None:
                add_part(job.parts, begin, content)

        return add
