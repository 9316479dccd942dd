"""Which bytes are read, in which pieces and in which order; made from the headers alone.

    piece    bytes that are placed at once: a tensor, or whole rows of it
    extent   pieces of one file that one reader reads forward through one handle

Extents are long, because storage over a network wants that: gcsfuse needs 8 MiB before it takes a handle for
sequential, and a request to Cloud Storage waits 45 ms for its first byte
(https://github.com/GoogleCloudPlatform/gcsfuse, internal/gcsx/client_readers).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from torchinfer.errors import ConfigError
from torchinfer.loader.header import TensorEntry, quoted
from torchinfer.loader.memory import LARGE_PAGE
from torchinfer.loader.placement import Placement
from torchinfer.loader.source import ALIGNMENT

EXTENT_BYTES = 64 << 20  # on local storage
NETWORK_EXTENT_BYTES = 128 << 20
SMALLEST_EXTENT_BYTES = 4 << 20
NO_FILES: Mapping[str, int] = {}
MAX_GAP_BYTES = 4 << 20  # unread bytes within an extent: storage skips them on the same stream


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first_row, last_row) of a checkpoint tensor, or all of it where it has no dimensions."""

    entry: TensorEntry
    first_row: int
    last_row: int
    offset: int  # in the file, bytes
    num_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    @property
    def is_filler(self) -> bool:
        """Whether the bytes are read for the file's checksum only."""
        return not self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.last_row - self.first_row, *self.entry.shape[1:]) if self.entry.shape else ()


@dataclass(frozen=True, slots=True)
class Extent:
    """Pieces in the order of their bytes, without overlap."""

    shard: str
    pieces: tuple[Piece, ...]

    @property
    def begin(self) -> int:
        return self.pieces[0].offset

    @property
    def end(self) -> int:
        return self.pieces[-1].end

    @property
    def num_bytes(self) -> int:
        """Bytes that are wanted; gaps do not count."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def staging_bytes(self) -> int:
        """At most what a buffer for all pieces needs, also where reads must be aligned."""
        return self.end - self.begin + 2 * ALIGNMENT


def plan_extents(
    placements: Mapping[str, Placement],
    tensors: Mapping[str, TensorEntry],
    extent_bytes: int,
    whole_files: Mapping[str, int] = NO_FILES,
) -> list[Extent]:
    """All that these placements need, each byte once, in extents of at most about `extent_bytes`.

    A tensor with a transform is one piece, whatever its size, because the transform must see all of it. Of
    `whole_files` (name -> bytes) everything else is read too, as filler.
    """
    by_shard: dict[str, list[Piece]] = {shard: [] for shard in whole_files}
    for name, placement in placements.items():
        entry = tensors[name]
        if entry.num_bytes:
            by_shard.setdefault(entry.shard, []).extend(_pieces(entry, placement, extent_bytes))
    for shard, size in whole_files.items():
        by_shard[shard] += _fillers(shard, by_shard[shard], size, extent_bytes)
    return [extent for shard in sorted(by_shard) for extent in _extents(shard, by_shard[shard], extent_bytes)]


def extent_bytes(is_network: bool, limit: int, num_readers: int) -> int:
    """Length of extents: what the storage likes, and so that all readers can stage one within `limit` bytes."""
    wished = NETWORK_EXTENT_BYTES if is_network else EXTENT_BYTES
    fitting = (limit // (num_readers + 1) - LARGE_PAGE) // LARGE_PAGE * LARGE_PAGE
    return max(SMALLEST_EXTENT_BYTES, min(wished, fitting))


def check_fits(extents: Iterable[Extent], limit: int) -> None:
    """Refuse a limit that the largest extent does not fit in.

    Raises:
        ConfigError: with that extent's tensor and the limit that would do.
    """
    largest = max(extents, key=lambda extent: extent.staging_bytes, default=None)
    if largest is None:
        return
    needed = -(-largest.staging_bytes // LARGE_PAGE) * LARGE_PAGE
    if needed > limit:
        name = max(largest.pieces, key=lambda piece: piece.num_bytes).entry.name
        raise ConfigError(
            f"load_memory={limit} bytes is too little: tensor {quoted(name)} needs {needed} bytes of it at once; use "
            f"load_memory={needed} or more"
        )


def _pieces(entry: TensorEntry, placement: Placement, extent_bytes: int) -> Iterator[Piece]:
    """The wanted rows, in blocks that fit an extent."""
    if not entry.shape or placement.target.transform is not None:
        yield Piece(entry, 0, entry.shape[0] if entry.shape else 1, entry.offset, entry.num_bytes)
        return
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    first, last = placement.rows_of(entry.shape)
    step = max(1, extent_bytes // row_bytes)
    for row in range(first, last, step):
        end = min(row + step, last)
        yield Piece(entry, row, end, entry.offset + row * row_bytes, (end - row) * row_bytes)


def _fillers(shard: str, pieces: list[Piece], size: int, extent_bytes: int) -> list[Piece]:
    """The bytes of a file that no piece covers."""
    found, at = [], 0
    for begin, end in [*sorted((piece.offset, piece.end) for piece in pieces), (size, size)]:
        for start in range(at, begin, extent_bytes):
            length = min(extent_bytes, begin - start)
            entry = TensorEntry("", torch.uint8, (length,), shard, start, length)
            found.append(Piece(entry, 0, length, start, length))
        at = end
    return found


def _extents(shard: str, pieces: list[Piece], extent_bytes: int) -> Iterator[Extent]:
    pieces.sort(key=lambda piece: piece.offset)
    group: list[Piece] = []
    for piece in pieces:
        is_far = group and piece.offset - group[-1].end > MAX_GAP_BYTES
        if group and (is_far or piece.end - group[0].offset > extent_bytes):
            yield Extent(shard, tuple(group))
            group = []
        group.append(piece)
    if group:
        yield Extent(shard, tuple(group))
