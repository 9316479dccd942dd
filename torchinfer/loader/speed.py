"""How fast a source gives its bytes: time to the first one, then GB/s by number of readers, through the page cache and
around it.

The files are taken as one row of bytes, of which each measurement reads parts of its own, so that none warms a cache
for the next:

    | 1 reader, buffered | 1, direct | 4, buffered | 4, direct | 16, buffered | 16, direct | first bytes |
      one share            one share   two shares    two shares  four shares    four shares  two shares

A reader has a handle of its own and reads one contiguous part of that, forward, for a limited time.
"""

from __future__ import annotations

import math
import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tqdm import tqdm

from torchinfer.errors import CheckpointError
from torchinfer.loader.folder import READ_BYTES, FolderSource
from torchinfer.loader.mount import GCSFUSE_KINDS
from torchinfer.loader.retry import Attempts, PersistentReader
from torchinfer.loader.source import ALIGNMENT, DirectUnsupportedError, FileStat, Source

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
    """

    def __init__(self, source: Source, seconds: float) -> None:
        self._source, self._seconds = source, seconds
        self._attempts = Attempts()
        stats = [(name, source.stat(name)) for name in source.names()]
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
        """
        first_byte_seconds = self._first_byte_seconds()
        modes = (False, True) if self._can_be_direct() else (False,)
        measurements, begin = [], 0
        for num_readers in tqdm(SHARES, desc="measuring", unit="step", leave=False, disable=None):
            for direct in modes:
                end = begin + self._share * SHARES[num_readers]
                measurements.append(self.measure(_parts(self._row, begin, end, num_readers), direct))
                begin = end
        return Speed(
            len(self._files),
            sum(stat.size for _, stat in self._files),
            first_byte_seconds,
            tuple(measurements),
            self._again_rate() if isinstance(self._source, FolderSource) else None,
            self._attempts.num_retries,
        )

    def _first_byte_seconds(self) -> float:
        """Of the row's last share or two, which nothing else reads, in a few places."""
        begin = self._row.num_bytes - self._share
        step = _aligned(self._share // NUM_FIRST_BYTES)
        times = []
        for offset in range(begin, begin + step * NUM_FIRST_BYTES, step):
            part = self._row.cut(offset, offset + ALIGNMENT)
            self._forget(part)
            start = time.perf_counter()
            self._read(part, False, start, self._buffers[0])
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _can_be_direct(self) -> bool:
        """Try it; tmpfs refuses to open, others to read."""
        if not isinstance(self._source, FolderSource):
            return False
        try:
            self._read(self._row.cut(self._row.num_bytes - ALIGNMENT, self._row.num_bytes), True, 0.0, self._buffers[0])
        except DirectUnsupportedError:
            return False
        return True

    def measure(self, parts: list[list[Piece]], direct: bool) -> Measurement:
        """Read each part with a reader of its own, all at once."""
        for part in parts:
            self._forget(part)
        start = time.perf_counter()
        with ThreadPoolExecutor(len(parts)) as pool:
            jobs = [
                pool.submit(self._read, part, direct, start + self._seconds, buffer)
                for part, buffer in zip(parts, self._buffers, strict=False)
            ]
            try:
                num_bytes = sum(job.result() for job in jobs)
            except BaseException:  # Ctrl-C as well: the other readers end after the read that they are in
                self._attempts.stop.set()
                raise
        return Measurement(len(parts), direct, num_bytes, time.perf_counter() - start)

    def _again_rate(self) -> float:
        """What the page cache gives, where there is one. Through one handle: FUSE may forget a file when it opens."""
        piece = self._row.cut(0, min(self._share, MAX_AGAIN_BYTES))[0]
        with PersistentReader(self._source, piece.name, piece.stat, self._attempts) as reader:
            buffer, deadline = self._buffers[0], time.perf_counter() + MAX_AGAIN_SECONDS
            num_bytes = _read_forward(reader.read_into, piece, buffer, deadline)
            start = time.perf_counter()
            _read_forward(reader.read_into, replace(piece, end=piece.begin + num_bytes), buffer)
            return num_bytes / (time.perf_counter() - start) / 1e9

    def _read(self, part: list[Piece], direct: bool, deadline: float, buffer: memoryview) -> int:
        """Read a part up to its end, or until the deadline has passed; returns the bytes read, at least one block."""
        num_bytes = 0
        for piece in part:
            stat, attempts = piece.stat, self._attempts
            with PersistentReader(self._source, piece.name, stat, attempts, end=piece.end, direct=direct) as reader:
                fill = reader.read_aligned if direct else reader.read_into
                num_bytes += _read_forward(fill, piece, buffer, deadline)
            if time.perf_counter() >= deadline:
                break
        return num_bytes

    def _forget(self, part: list[Piece]) -> None:
        """Drop clean pages from the page cache; the kernel may keep some, such as those that a process has mapped."""
        if not isinstance(self._source, FolderSource):
            return
        for piece in part:
            path = self._source.path / piece.name
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.posix_fadvise(descriptor, piece.begin, piece.end - piece.begin, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise CheckpointError(f"cannot open {path}: {error}; check that it is readable") from error


def _nothing_to_measure(source: Source, num_files: int) -> CheckpointError:
    hint = "; on Cloud Storage FUSE, folders without an object of their own need the mount option implicit-dirs"
    return CheckpointError(
        f"{source.address} has {num_files} file(s), none of which has 1 MiB; doctor needs a file of at least 1 MiB to "
        f"measure: pass the folder that holds the *.safetensors{hint if source.kind in GCSFUSE_KINDS else ''}"
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
