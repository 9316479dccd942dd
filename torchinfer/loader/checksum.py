"""CRC32C of whole files from the parts that readers read in any order, against what the storage or a sums file says.

A file's checksum is put together from those of its parts: appending n bytes multiplies a CRC by x^(8n) modulo the
polynomial, and CRCs are linear (the method of zlib's crc32_combine). Polynomial: Castagnoli's, RFC 3720 section B.4.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader.source import FileStat, Source
from torchinfer.loader.stall import read_file

SUMS = "CRC32C"  # lines of "<8 hex digits>  <file name>", as sha256sum writes its own
MAX_SUMS_BYTES = 10_000_000
POLYNOMIAL = 0x82F63B78  # bit-reversed
Part = tuple[int, int, int]  # of a file: begin, end, CRC32C


def crc32c(content: Tensor, before: int = 0) -> int:
    """Of uint8 [n], or of what has the CRC32C `before` and these bytes behind it; several GB/s.

    Raises:
        CheckpointError: google-crc32c is not installed.
    """
    try:
        import google_crc32c
    except ImportError as error:
        raise CheckpointError("verifying needs google-crc32c; pip install google-crc32c, or load without it") from error
    return int(google_crc32c.extend(before, content.numpy()))


def add_part(parts: list[Part], begin: int, content: Tensor) -> None:
    """Note that a file has these bytes, uint8 [n], there. Where they follow on the part before, they become one with
    it: this is free, but `combine` takes 0.2 ms, and a checkpoint may have tens of thousands of tensors."""
    first, before = begin, 0
    if parts and parts[-1][1] == begin:
        first, _, before = parts.pop()
    parts.append((first, begin + len(content), crc32c(content, before)))


def combine(first: int, second: int, second_length: int) -> int:
    """CRC32C of two byte strings one behind the other, from theirs and the second one's length."""
    return _multiply(_power(8 * second_length), first) ^ second


def read_sums(source: Source, stats: Mapping[str, FileStat]) -> dict[str, int]:
    """The expected CRC32C of each file: the storage's, else the sums file's.

    Raises:
        CheckpointError: one has neither, or the sums file is malformed.
    """
    sums = {name: stat.crc32c for name, stat in stats.items() if stat.crc32c is not None}
    if len(sums) < len(stats) and source.has(SUMS):
        sums = _parse(read_file(source, SUMS, MAX_SUMS_BYTES)) | sums
    missing = sorted(stats.keys() - sums.keys())
    if missing:
        raise CheckpointError(
            f"there is nothing to verify {', '.join(missing[:5])} of {source.address} with: {len(missing)} files have "
            f"no CRC32C; write a file {SUMS} with lines of '<8 hex digits>  <file name>' beside them, or load without "
            "verifying"
        )
    return {name: sums[name] for name in stats}


@dataclass(slots=True)
class Checksums:
    """Collects the parts of files and compares. `add` is for any thread."""

    expected: Mapping[str, int]
    _parts: dict[str, list[Part]] = field(default_factory=dict)  # by file
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, *parts: Part) -> None:
        """Note parts of a file, each byte once."""
        with self._lock:
            self._parts.setdefault(name, []).extend(parts)

    def check(self, stats: Mapping[str, FileStat]) -> None:
        """See that all bytes of all files were added, and that every file has its checksum.

        Raises:
            CheckpointError: with all files that differ.
        """
        wrong = []
        for name, stat in stats.items():
            end = crc = 0
            for begin, part_end, part in sorted(self._parts.get(name, ())):
                assert begin == end, f"{name}: bytes [{end}, {begin}) were not added"
                end, crc = part_end, combine(crc, part, part_end - begin)
            assert end == stat.size, f"{name}: bytes [{end}, {stat.size}) were not added"
            if crc != self.expected[name]:
                wrong.append(f"{name} has {crc:08x}, {self.expected[name]:08x} is expected")
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} files do not have their CRC32C: {'; '.join(wrong)}; they were damaged on the way "
                "or where they lie: load again, and if it stays, copy or download them again"
            )


def _parse(text: bytes) -> dict[str, int]:
    found = {}
    for number, line in enumerate(text.decode("utf-8", errors="replace").splitlines(), start=1):
        digits, _, name = line.partition("  ")
        try:
            found[name.strip()] = int(digits, 16)
        except ValueError as error:
            raise CheckpointError(
                f"line {number} of {SUMS} is {line!r:.80}; '<8 hex digits>  <file name>' is expected"
            ) from error
    return found


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo POLYNOMIAL, bits reversed: 1 is 1 << 31."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


def _power(exponent: int) -> int:
    """x^exponent modulo POLYNOMIAL."""
    result, square = 1 << 31, 1 << 30  # x^0, x^1
    while exponent:
        if exponent & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        exponent >>= 1
    return result
