"""Which bytes are read, in which pieces and in which order; made from the headers alone.

    piece    bytes that are placed at once: a tensor, or whole rows of it
    extent   pieces of one file that one reader reads forward through one handle

Extents are long, because storage over a network wants that: gcsfuse needs 8 MiB before it takes a handle for
sequential, and a request to Cloud Storage waits 45 ms for its first byte
(https://github.com/GoogleCloudPlatform/gcsfuse, internal/gcsx/client_readers).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from torchinfer.errors import ConfigError
from torchinfer.loader.header import TensorEntry, quoted
from torchinfer.loader.memory import LARGE_PAGE, buffer_bytes
from torchinfer.loader.placement import Placement
from torchinfer.loader.source import ALIGNMENT, MAX_GAP_BYTES

logger = logging.getLogger(__name__)

DEFAULT_MEMORY = 2 << 30  # of a load, where no limit is given
ROOM_BYTES = 512 << 20  # to read beside what is needed at least, where none is
EXTENT_BYTES = 64 << 20  # on local storage
NETWORK_EXTENT_BYTES = 128 << 20
SMALLEST_EXTENT_BYTES = 4 << 20
NO_FILES: Mapping[str, int] = {}
TAIL_PARTS = 4  # that the last extents of local files are cut into
TOLERANCE = 0.25  # of an extent that a file's extents may be longer by together: better than one more, short one


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first_row, last_row) of a checkpoint tensor, or all of it where it has no dimensions."""

    entry: TensorEntry
    first_row: int
    last_row: int
    offset: int  # in the file, bytes
    num_bytes: int
    is_divisible: bool = True
    row_block: int = 1  # rows that stay together, counted from the first one

    def split(self, num_bytes: int) -> tuple[Piece | None, Piece | None]:
        """As many blocks of rows as fit into `num_bytes`, and the others; None where that is nothing."""
        if self.num_bytes <= num_bytes:
            return self, None
        row_bytes = self.num_bytes // (self.last_row - self.first_row)
        blocks = max(0, num_bytes) // (row_bytes * self.row_block) if self.is_divisible else 0
        rows = blocks * self.row_block
        if rows == 0:
            return None, self
        row, cut = self.first_row + rows, rows * row_bytes
        head = replace(self, last_row=row, num_bytes=cut)
        return head, replace(self, first_row=row, offset=self.offset + cut, num_bytes=self.num_bytes - cut)

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    @property
    def smallest_bytes(self) -> int:
        """Of what `split` can take off."""
        if not self.is_divisible:
            return self.num_bytes
        return min(self.num_bytes, self.num_bytes // (self.last_row - self.first_row) * self.row_block)

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
    max_gap_bytes: int = MAX_GAP_BYTES,
) -> list[Extent]:
    """All that these placements need, each byte once, in extents of at most about `extent_bytes`.

    A tensor that is converted as a whole is one piece, whatever its size. Of bytes that are not wanted at most
    `max_gap_bytes` lie between two pieces. Of `whole_files` (name -> bytes) everything else is read too, as filler.
    """
    by_shard: dict[str, list[Piece]] = {shard: [] for shard in whole_files}
    for name, placement in placements.items():
        entry = tensors[name]
        if entry.num_bytes:
            by_shard.setdefault(entry.shard, []).append(_wanted(entry, placement))
    for shard, size in whole_files.items():
        by_shard[shard] += _fillers(shard, by_shard[shard], size)
    return [
        extent for shard in sorted(by_shard) for extent in _extents(shard, by_shard[shard], extent_bytes, max_gap_bytes)
    ]


def with_short_tail(extents: Sequence[Extent], num_readers: int, max_gap_bytes: int) -> list[Extent]:
    """The same bytes, the last extents, one for each reader, in parts of at least SMALLEST_EXTENT_BYTES: a reader that
    finds nothing more to read does not wait for a whole extent of another."""
    first = max(0, len(extents) - num_readers)
    tail = [
        part
        for extent in extents[first:]
        for part in _extents(
            extent.shard, [*extent.pieces], max(SMALLEST_EXTENT_BYTES, extent.num_bytes // TAIL_PARTS), max_gap_bytes
        )
    ]
    return [*extents[:first], *tail]


def extent_bytes(is_network: bool, limit: int, num_readers: int, num_bytes: int) -> int:
    """Length of extents of a load of `num_bytes`: not more than the storage likes, so that all readers have as many and
    end together, and so that all of them can stage one within `limit` bytes."""
    longest = NETWORK_EXTENT_BYTES if is_network else EXTENT_BYTES
    num_turns = max(1, -(-num_bytes // (num_readers * longest)))
    fitting = (limit // (num_readers + 1) - LARGE_PAGE) // LARGE_PAGE * LARGE_PAGE
    return max(SMALLEST_EXTENT_BYTES, min(-(-num_bytes // (num_readers * num_turns)), fitting))


def needed_memory(extents: Iterable[Extent], other_bytes: int, is_pinned: bool = False) -> int:
    """To read the largest extent beside `other_bytes`: of conversions, of an exchange, of what is put together."""
    largest = max((extent.staging_bytes for extent in extents), default=0)
    return buffer_bytes(largest, is_pinned) + other_bytes


def choose_memory(extents: Sequence[Extent], limit: int | None, other_bytes: int = 0, is_pinned: bool = False) -> int:
    """The memory of a load: `limit`, or without one DEFAULT_MEMORY, and more where the largest tensors need it.

    Raises:
        ConfigError: `limit` is less than `needed_memory`; with the largest extent's tensor and the limit that would do.
    """
    needed = needed_memory(extents, other_bytes, is_pinned)
    if limit is None:
        if needed + ROOM_BYTES > DEFAULT_MEMORY:
            logger.info("tensors need %d bytes of load memory at once: it is not %d", needed, DEFAULT_MEMORY)
        return max(DEFAULT_MEMORY, needed + ROOM_BYTES)
    if needed > limit:
        largest = max(extents, key=lambda extent: extent.staging_bytes)
        name = max(largest.pieces, key=lambda piece: piece.num_bytes).entry.name
        beside = f", {other_bytes} of them for what tensors become on the way" if other_bytes else ""
        raise ConfigError(
            f"load_memory={limit} bytes is too little: tensor {quoted(name)} needs {needed} bytes of it at once"
            f"{beside}; use load_memory={needed} or more"
        )
    return limit


def temporary_bytes(placements: Mapping[str, Placement], tensors: Mapping[str, TensorEntry]) -> int:
    """Host memory that converting and packing takes at most: one tensor at a time."""
    return max((placement.temporary_bytes(tensors[name]) for name, placement in placements.items()), default=0)


def copied_bytes(extents: Iterable[Extent], placements: Mapping[str, Placement], dtype: torch.dtype) -> int:
    """Host memory that copies of an extent's tensors take at most, as they become in a model of `dtype`."""
    return max((sum(_copied(piece, placements, dtype) for piece in extent.pieces) for extent in extents), default=0)


def _copied(piece: Piece, placements: Mapping[str, Placement], dtype: torch.dtype) -> int:
    if piece.is_filler:
        return 0
    numbers = piece.num_bytes // piece.entry.dtype.itemsize
    return max(piece.num_bytes, numbers * dtype.itemsize, placements[piece.entry.name].result_bytes)


def _wanted(entry: TensorEntry, placement: Placement) -> Piece:
    """What is needed of a tensor, as one piece."""
    if not entry.shape or placement.convert is not None:
        return Piece(entry, 0, entry.shape[0] if entry.shape else 1, entry.offset, entry.num_bytes, is_divisible=False)
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    first, last = placement.rows_of(entry.shape)
    num_bytes = (last - first) * row_bytes
    return Piece(entry, first, last, entry.offset + first * row_bytes, num_bytes, row_block=placement.row_block)


def _fillers(shard: str, pieces: list[Piece], size: int) -> list[Piece]:
    """The bytes of a file that no piece covers."""
    found, at = [], 0
    for begin, end in [*sorted((piece.offset, piece.end) for piece in pieces), (size, size)]:
        if at < begin:
            entry = TensorEntry("", torch.uint8, (begin - at,), shard, at, begin - at)
            found.append(Piece(entry, 0, begin - at, at, begin - at))
        at = end
    return found


def _extents(shard: str, pieces: list[Piece], extent_bytes: int, max_gap_bytes: int) -> Iterator[Extent]:
    """Extents of about the same length, so that readers which started together end together."""
    pieces.sort(key=lambda piece: piece.offset)
    gaps = [after.offset - before.end for before, after in itertools.pairwise(pieces)]
    length = sum(piece.num_bytes for piece in pieces) + sum(gap for gap in gaps if gap <= max_gap_bytes)
    length = -(-length // max(1, math.ceil(length / extent_bytes - TOLERANCE)))
    length += length // 64  # or the rounding to whole rows would leave a crumb
    group: list[Piece] = []
    for wanted in pieces:
        rest: Piece | None = wanted
        while rest is not None:
            if group and rest.offset - group[-1].end > max_gap_bytes:
                yield Extent(shard, tuple(group))
                group = []
            left = length - (rest.offset - group[0].offset) if group else max(length, rest.smallest_bytes)
            head, tail = rest.split(left)
            if head is None and group:
                yield Extent(shard, tuple(group))
                group = []
                continue
            group.append(head or rest)
            rest = tail if head else None
    if group:
        yield Extent(shard, tuple(group))
