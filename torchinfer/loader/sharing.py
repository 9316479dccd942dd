"""Which process of a node reads what several of them need: made from the headers alone, alike in all of them.

A tensor that is cut in columns has every process's part in each row, so whoever reads rows reads for all; a tensor
that is not cut, or in fewer parts than there are processes, is needed by several as it is. The rows of such tensors
are dealt out: every extent has one owner, who reads it and sends each other holder its part (exchange.py).

Rows that belong to one process are read by it, where they are many. Where they are few, as those of an expert, they
would be a request each, or be read with what lies between them: so such a tensor is dealt out, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torchinfer.loader.header import TensorEntry
from torchinfer.loader.memory import LARGE_PAGE
from torchinfer.loader.placement import Placement
from torchinfer.loader.plan import Extent, Piece, plan_extents
from torchinfer.loader.source import MAX_GAP_BYTES
from torchinfer.parallel import Cut, Shard

NARROW_BYTES = 8 << 20  # come in the 45 ms that a request waits for its first byte, at 200 MB/s a stream


@dataclass(frozen=True, slots=True)
class SharedExtent:
    """An extent that the process `owner` reads for all `holders`."""

    extent: Extent
    owner: int
    holders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """Everything that is exchanged, alike in all processes, and what it means for the one with this rank."""

    rank: int
    items: tuple[SharedExtent, ...] = ()
    bytes_saved: int = 0  # what the storage gives less, over all processes

    @property
    def extents(self) -> list[Extent]:
        """Whoever reads them."""
        return [item.extent for item in self.items]

    @property
    def names(self) -> set[str]:
        """Tensors that are exchanged, as a whole."""
        return {piece.entry.name for item in self.items for piece in item.extent.pieces}

    @property
    def own(self) -> list[Extent]:
        """What this process reads."""
        return [item.extent for item in self.items if item.owner == self.rank]

    @property
    def received(self) -> list[Extent]:
        return [item.extent for item in self.items if item.owner != self.rank and self.rank in item.holders]

    @property
    def staging_bytes(self) -> int:
        """Staging memory that an exchange needs beside that of the readers: for one piece."""
        largest = max((piece.num_bytes for item in self.items for piece in item.extent.pieces), default=0)
        return -(-largest // LARGE_PAGE) * LARGE_PAGE

    def in_order(self, extents: Iterable[Extent]) -> SharedPlan:
        """The same, where every process holds everything, in other extents; nothing where nothing is exchanged."""
        if not self.items:
            return self
        (holders,) = {item.holders for item in self.items}
        return replace(self, items=_deal((extent, holders) for extent in extents))


def choose_exchange(is_network: bool, direct: bool, world: int, has_group: bool, bytes_saved: int) -> tuple[bool, str]:
    """Whether processes exchange what several of them need, and why. Alike in all of them."""
    if world == 1:
        return False, "there is one process"
    if not has_group:
        return False, f"torch.distributed has no group of these {world} processes with gloo"
    if not bytes_saved:
        return False, "no two processes need the same bytes"
    if is_network:
        return True, f"the storage is behind a network, which is spared {bytes_saved / 1e9:.3f} GB"
    if direct:
        return True, f"direct reads leave nothing in the page cache for others; {bytes_saved / 1e9:.3f} GB are saved"
    return False, "the files are local, and the page cache gives the second reader the speed of memory"


def plan_shared(
    placements: Mapping[str, Placement],
    tensors: Mapping[str, TensorEntry],
    shard: Shard,
    block_bytes: int,
    narrow_bytes: int = NARROW_BYTES,
    max_gap_bytes: int = MAX_GAP_BYTES,
) -> SharedPlan:
    """What several processes need, in extents of about `block_bytes`, and tensors of which each has rows of less than
    `narrow_bytes`."""
    by_holders: dict[tuple[int, ...], dict[str, Placement]] = {}
    bytes_saved = 0
    for name, placement in placements.items():
        groups = _holders(placement, tensors[name], shard.world, narrow_bytes)
        for holders in groups:
            is_whole = len(holders) == shard.world
            cut = None if is_whole else cut_of(placement, tensors[name], Shard(holders[0], shard.world))
            by_holders.setdefault(holders, {})[name] = replace(placement, cut=cut)
        copies = shard.world // num_row_parts(placement, tensors[name]) if groups else 1
        bytes_saved += tensors[name].num_bytes * (copies - 1)
    extents = (
        (extent, holders)
        for holders, group in sorted(by_holders.items(), key=lambda item: item[0])
        for extent in plan_extents(group, tensors, block_bytes, max_gap_bytes=max_gap_bytes)
    )
    return SharedPlan(shard.rank, _deal(extents), bytes_saved)


def _deal(extents: Iterable[tuple[Extent, tuple[int, ...]]]) -> tuple[SharedExtent, ...]:
    """The owner of each is the holder that has the least to read until then."""
    num_bytes, found = Counter[int](), []
    for extent, holders in extents:
        owner = min(holders, key=lambda rank: num_bytes[rank])
        num_bytes[owner] += extent.num_bytes
        found.append(SharedExtent(extent, owner, holders))
    return tuple(found)


def _holders(placement: Placement, entry: TensorEntry, world: int, narrow_bytes: int) -> list[tuple[int, ...]]:
    """The processes that get something of the same rows of a tensor, for each part of its rows; empty where each reads
    its own."""
    if not entry.num_bytes:
        return []
    if num_row_parts(placement, entry) == 1 or _is_narrow(placement, entry, narrow_bytes):
        return [tuple(range(world))]
    size = world // num_row_parts(placement, entry)
    return [tuple(range(first, first + size)) for first in range(0, world, size)] if size > 1 else []


def _is_narrow(placement: Placement, entry: TensorEntry, narrow_bytes: int) -> bool:
    """Whether rows are too few to be read by themselves; those that share a scale stay together in any case."""
    cut = placement.cut
    assert cut is not None
    return entry.num_bytes // num_parts(cut, entry) < narrow_bytes and (cut.stop - cut.start) % placement.row_block == 0


def column_cut(placement: Placement) -> Cut | None:
    return placement.cut if placement.cut is not None and placement.cut.dim != 0 else None


def cut_of(placement: Placement, entry: TensorEntry, shard: Shard) -> Cut | None:
    """The part of another process."""
    return placement.cut and placement.cut.of(shard, entry.shape[placement.cut.dim])


def num_parts(cut: Cut, entry: TensorEntry) -> int:
    return entry.shape[cut.dim] // (cut.stop - cut.start)


def num_row_parts(placement: Placement, entry: TensorEntry) -> int:
    """Of a tensor that is cut in rows; 1 for others."""
    return num_parts(placement.cut, entry) if placement.cut is not None and placement.cut.dim == 0 else 1


def rows_of(piece: Piece, placement: Placement, shard: Shard) -> Piece | None:
    """What a process gets of a piece, in rows; None where that is nothing."""
    cut = cut_of(placement, piece.entry, shard)
    if cut is None or cut.dim != 0:
        return piece
    first, last = max(piece.first_row, cut.start), min(piece.last_row, cut.stop)
    if first >= last:
        return None
    row_bytes = piece.num_bytes // (piece.last_row - piece.first_row)
    offset = piece.offset + (first - piece.first_row) * row_bytes
    return replace(piece, first_row=first, last_row=last, offset=offset, num_bytes=(last - first) * row_bytes)
