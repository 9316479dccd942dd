"""A source that counts what it gave: also what was given twice, skipped, or read beyond what is wanted."""

from __future__ import annotations

import threading

from torchinfer.loader.source import FileStat, Reader, Source


class CountedSource(Source):
    """Another source, with the bytes that readers of it have got."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.address, self.is_network, self.kind = source.address, source.is_network, source.kind
        self.max_gap_bytes = source.max_gap_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return self.source.names()

    def stat(self, name: str) -> FileStat:
        return self.source.stat(name)

    def open(self, name: str, stat: FileStat, *, end: int | None = None, direct: bool = False) -> Reader:
        return _CountedReader(self, self.source.open(name, stat, end=end, direct=direct))

    def is_cached(self, name: str, offset: int, num_bytes: int) -> bool:
        return self.source.is_cached(name, offset, num_bytes)

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def count(self, num_bytes: int) -> None:
        """Add what a reader got; for any thread."""
        with self._lock:
            self.num_bytes += num_bytes


class _CountedReader(Reader):
    def __init__(self, source: CountedSource, reader: Reader) -> None:
        self._source, self._reader = source, reader

    def read_some(self, offset: int, buffer: memoryview) -> int:
        skipped, found = self._reader.skipped_bytes, 0
        try:
            found = self._reader.read_some(offset, buffer)
        finally:
            self._source.count(found + self._reader.skipped_bytes - skipped)
        return found

    def check(self) -> None:
        self._reader.check()

    def close(self) -> None:
        self._reader.close()
