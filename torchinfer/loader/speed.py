"""How fast a source gives its bytes: time to the first one, then GB/s by number of readers, through the page cache and
around it.

The files are taken as one row of bytes, of which each measurement reads parts of its own, so that none warms a cache
for the next:

    | 1 reader, buffered | 1, direct | 4, buffered | 4, direct | 16, buffered | 16, direct | first bytes |
      one share            one share   two shares    two shares  four shares    four shares  two shares

A reader has a handle of its own and reads one contiguous part of that, forward, for a limited time. One that hangs is
not waited for longer than a load would; another try would measure something else, so there is none.
"""

from __future__ import annotations

import math
import mmap
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tqdm import tqdm

from torchinfer.errors import CheckpointError
from torchinfer.loader.folder import READ_BYTES, FolderSource
from torchinfer.loader.header import shorten
from torchinfer.loader.mount import GCSFUSE_KINDS
from torchinfer.loader.retry import PersistentReader, Result
from torchinfer.loader.source import ALIGNMENT, DirectUnsupportedError, FileStat, Source
from torchinfer.loader.stall import StalledError, Trial, unless_stalled

MIN_FILE_BYTES = 1 << 20
SHARES = {1: 1, 4: 2, 16: 4}  # of the row, by number of readers
NUM_FIRST_BYTES = 5  # how often the time to the first byte is taken
MAX_AGAIN_BYTES = 64 << 20
MAX_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, end) of a file; multiples of ALIGNMENT."""

    name: str
    stat: FileStat
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What some readers got together."""

    num_readers: int
    direct: bool  # around the page cache
    num_bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """In GB/s."""
        return self.num_bytes / self.seconds / 1e9

    def __str__(self) -> str:
        return f"{self.rate:.3f} GB/s with {readers_text(self.num_readers)}{', O_DIRECT' if self.direct else ''}"


@dataclass(frozen=True, slots=True)
class Speed:
    """All measurements of a source; without direct ones where the storage does not support them."""

    num_files: int
    num_bytes: int  # of these files, not only what was read
    first_byte_seconds: float  # median
    measurements: tuple[Measurement, ...]
    again_rate: float | None  # GB/s of one reader for bytes that its handle just gave; None for gs://
    num_retries: int


class Row:
    """The whole blocks of all files, one after the other."""

    def __init__(self, files: list[tuple[str, FileStat]]) -> None:
        self._files = [(name, stat, stat.size // ALIGNMENT * ALIGNMENT) for name, stat in files]
        self.num_bytes = sum(size for _, _, size in self._files)

    def cut(self, begin: int, end: int) -> list[Piece]:
        """Bytes [begin, end) of the row, both multiples of ALIGNMENT."""
        pieces, start = [], 0
        for name, stat, size in self._files:
            if (first := max(begin - start, 0)) < (last := min(end - start, size)):
                pieces.append(Piece(name, stat, first, last))
            start += size
        return pieces


class SpeedTest:
    """Measures a source; each measurement takes at most `seconds`.

    Raises:
        CheckpointError: there is no file to measure with.
        StalledError: the storage hangs.
    """

    def __init__(self, source: Source, seconds: float) -> None:
        self._source, self._seconds = source, seconds
        self._num_retries = 0
        names = self._once(f"list {source.address}", lambda trial: source.names())
        stats = [(name, self._stat(name)) for name in names]
        self._files = [(name, stat) for name, stat in stats if stat.size >= MIN_FILE_BYTES]
        if not self._files:
            raise _nothing_to_measure(source, len(stats))
        self._row = Row(self._files)
        self._share = _aligned(self._row.num_bytes // (2 * sum(SHARES.values()) + 2))
        # Direct reads need aligned memory: a map of no file begins at a page. Populated, so that no measurement pays.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        self._buffers = [memoryview(mmap.mmap(-1, READ_BYTES, flags=flags)) for _ in range(max(SHARES))]

    def run(self) -> Speed:
        """Measure, with a progress bar on a terminal.

        Raises:
            CheckpointError: a file cannot be read, or changed meanwhile.
            StalledError: the storage hangs; the message has what was measured until then.
        """
        first_byte_seconds = self._first_byte_seconds()
        measurements: list[Measurement] = []
        try:
            for measurement in self._measure_all():
                measurements.append(measurement)
            again_rate = self._again_rate() if isinstance(self._source, FolderSource) else None
        except StalledError as error:
            known = ", ".join([f"{first_byte_seconds * 1e3:.1f} ms to the first byte", *map(str, measurements)])
            raise StalledError(f"{error}; measured before: {known}") from error
        return Speed(
            len(self._files),
            sum(stat.size for _, stat in self._files),
            first_byte_seconds,
            tuple(measurements),
            again_rate,
            self._num_retries,
        )

    def _stat(self, name: str) -> FileStat:
        return self._once(f"look at {self._source.address}/{name}", lambda trial: self._source.stat(name))

    def _once(self, what: str, call: Callable[[Trial], Result]) -> Result:
        """In a thread of its own, which is given up when it hangs."""

        def counted(trial: Trial) -> Result:
            try:
                return call(trial)
            finally:
                self._num_retries += trial.attempts.num_retries

        return unless_stalled(what, counted, max_stalls=1)

    def _first_byte_seconds(self) -> float:
        """Of the row's last share or two, which nothing else reads, in a few places."""
        begin = self._row.num_bytes - self._share
        step = _aligned(self._share // NUM_FIRST_BYTES)
        offsets = range(begin, begin + step * NUM_FIRST_BYTES, step)
        return statistics.median(self._seconds_of(self._row.cut(offset, offset + ALIGNMENT)) for offset in offsets)

    def _seconds_of(self, part: list[Piece]) -> float:
        def read(trial: Trial) -> float:
            self._forget(part)
            start = time.perf_counter()
            self._read(trial, part, False, start, self._buffers[0])
            return time.perf_counter() - start

        return self._once(self._reading([part]), read)

    def _measure_all(self) -> Iterator[Measurement]:
        modes = (False, True) if self._can_be_direct() else (False,)
        begin = 0
        for num_readers in tqdm(SHARES, desc="measuring", unit="step", leave=False, disable=None):
            for direct in modes:
                end = begin + self._share * SHARES[num_readers]
                yield self.measure(_parts(self._row, begin, end, num_readers), direct)
                begin = end

    def _can_be_direct(self) -> bool:
        """Try it; tmpfs refuses to open, others to read."""
        if not isinstance(self._source, FolderSource):
            return False
        part = self._row.cut(self._row.num_bytes - ALIGNMENT, self._row.num_bytes)
        try:
            self._once(self._reading([part]), lambda trial: self._read(trial, part, True, 0.0, self._buffers[0]))
        except DirectUnsupportedError:
            return False
        return True

    def measure(self, parts: list[list[Piece]], direct: bool) -> Measurement:
        """Read each part with a reader of its own, all at once."""

        def read_all(trial: Trial) -> Measurement:
            for part in parts:
                self._forget(part)
            start = time.perf_counter()
            deadline = start + self._seconds
            pairs = zip(parts, self._buffers, strict=False)
            calls = [partial(self._read, trial, part, direct, deadline, buffer) for part, buffer in pairs]
            num_bytes = sum(_side_by_side(calls))
            return Measurement(len(parts), direct, num_bytes, time.perf_counter() - start)

        return self._once(self._reading(parts), read_all)

    def _reading(self, parts: list[list[Piece]]) -> str:
        """For messages."""
        names = sorted({piece.name for part in parts for piece in part})
        return f"read {', '.join(shorten(names, 3))} of {self._source.address} with {readers_text(len(parts))}"

    def _again_rate(self) -> float:
        """What the page cache gives, where there is one. Through one handle: FUSE may forget a file when it opens."""
        piece = self._row.cut(0, min(self._share, MAX_AGAIN_BYTES))[0]

        def read_twice(trial: Trial) -> float:
            with PersistentReader(self._source, piece.name, piece.stat, trial.attempts) as reader:
                fill = partial(reader.read_into, on_bytes=trial.count)
                buffer, deadline = self._buffers[0], time.perf_counter() + MAX_AGAIN_SECONDS
                num_bytes = _read_forward(fill, piece, buffer, deadline)
                start = time.perf_counter()
                _read_forward(fill, replace(piece, end=piece.begin + num_bytes), buffer)
                return num_bytes / (time.perf_counter() - start) / 1e9

        return self._once(f"read {piece.name} of {self._source.address} again", read_twice)

    def _read(self, trial: Trial, part: list[Piece], direct: bool, deadline: float, buffer: memoryview) -> int:
        """Read a part up to its end, or until the deadline has passed; returns the bytes read, at least one block."""
        num_bytes = 0
        for piece in part:
            stat, attempts = piece.stat, trial.attempts
            with PersistentReader(self._source, piece.name, stat, attempts, end=piece.end, direct=direct) as reader:
                fill = partial(reader.read_aligned if direct else reader.read_into, on_bytes=trial.count)
                num_bytes += _read_forward(fill, piece, buffer, deadline)
            if time.perf_counter() >= deadline:
                break
        return num_bytes

    def _forget(self, part: list[Piece]) -> None:
        """So that the storage is measured, and not the page cache."""
        if isinstance(self._source, FolderSource):
            for piece in part:
                self._source.forget(piece.name, piece.begin, piece.end - piece.begin)


def readers_text(count: int) -> str:
    """For people."""
    return f"{count} reader" if count == 1 else f"{count} readers"


def _side_by_side(calls: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """What they return, as they end; or the first error. Each in a thread of its own, which may hang for ever and keeps
    no process alive then."""
    results: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()

    def run(call: Callable[[], Result]) -> None:
        try:
            results.put(call())
        except BaseException as error:  # whatever it is belongs to the thread that waits
            results.put(error)

    for call in calls:
        threading.Thread(target=run, args=(call,), name="doctor", daemon=True).start()
    for _ in calls:
        result = results.get()
        if isinstance(result, BaseException):
            raise result
        yield result


def _nothing_to_measure(source: Source, num_files: int) -> CheckpointError:
    hint = "; on Cloud Storage FUSE, folders without an object of their own need the mount option implicit-dirs"
    found = f"has {num_files} file(s), none of which has 1 MiB" if num_files else "has no files"
    return CheckpointError(
        f"{source.address} {found}; doctor needs a file of at least 1 MiB to measure: pass the folder that holds the "
        f"*.safetensors{hint if source.kind in GCSFUSE_KINDS else ''}"
    )


def _parts(row: Row, begin: int, end: int, count: int) -> list[list[Piece]]:
    """Bytes [begin, end) of the row in as many equal parts; up to a block each is left over."""
    size = _aligned((end - begin) // count)
    return [row.cut(start, start + size) for start in range(begin, begin + size * count, size)]


def _read_forward(
    fill: Callable[[int, memoryview], None], piece: Piece, buffer: memoryview, deadline: float = math.inf
) -> int:
    """Read a piece up to its end, or until the deadline has passed; returns the bytes read."""
    offset = piece.begin
    while offset < piece.end:
        target = buffer[: piece.end - offset]
        fill(offset, target)
        offset += len(target)
        if time.perf_counter() >= deadline:
            break
    return offset - piece.begin


def _aligned(num_bytes: int) -> int:
    return num_bytes // ALIGNMENT * ALIGNMENT
