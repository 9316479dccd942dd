"""Which process of a node reads what several of them need: made from the headers alone, alike in all of them.

A tensor that is cut in columns has every process's part in each row, so whoever reads rows reads for all; a tensor
that is not cut, or in fewer parts than there are processes, is needed by several as it is. The rows of such tensors
are dealt out: every extent has one owner, who reads it and sends each other holder its part (exchange.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchinfer.loader.header import TensorEntry
from torchinfer.loader.memory import LARGE_PAGE
from torchinfer.loader.placement import Placement
from torchinfer.loader.plan import Extent, plan_extents
from torchinfer.loader.source import MAX_GAP_BYTES
from torchinfer.parallel import Cut, Shard


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
    def bytes_saved(self) -> int:
        """What the storage gives less, over all processes."""
        return sum(item.extent.num_bytes * (len(item.holders) - 1) for item in self.items)

    @property
    def staging_bytes(self) -> int:
        """Staging memory that an exchange needs beside that of the readers: for one piece."""
        largest = max((piece.num_bytes for item in self.items for piece in item.extent.pieces), default=0)
        return -(-largest // LARGE_PAGE) * LARGE_PAGE


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
    smallest_bytes: int,
    max_gap_bytes: int = MAX_GAP_BYTES,
) -> SharedPlan:
    """What several processes need, in extents of about `block_bytes`. The owner of each is the holder that has the
    least to read until then.

    Tensors that are converted as a whole are left out.
    """
    by_holders: dict[tuple[int, ...], dict[str, Placement]] = {}
    for name, placement in placements.items():
        for holders in _holders(placement, tensors[name], shard.world, smallest_bytes):
            part = replace(placement, cut=cut_of(placement, tensors[name], Shard(holders[0], shard.world)))
            by_holders.setdefault(holders, {})[name] = part
    num_bytes = [0] * shard.world
    shared = []
    for holders, group in sorted(by_holders.items(), key=lambda item: item[0]):
        for extent in plan_extents(group, tensors, block_bytes, max_gap_bytes=max_gap_bytes):
            owner = min(holders, key=lambda rank: num_bytes[rank])
            num_bytes[owner] += extent.num_bytes
            shared.append(SharedExtent(extent, owner, holders))
    return SharedPlan(shard.rank, tuple(shared))


def _holders(placement: Placement, entry: TensorEntry, world: int, smallest_bytes: int) -> list[tuple[int, ...]]:
    """The processes that need the same rows of a tensor, for each part of its rows; empty where none share any."""
    if placement.convert is not None or not entry.shape or not entry.num_bytes:
        return []
    if column_cut(placement) is None and entry.num_bytes < smallest_bytes:
        return []
    cut = placement.cut if placement.cut is not None and placement.cut.dim == 0 else None
    size = world // (num_parts(cut, entry) if cut else 1)
    return [tuple(range(first, first + size)) for first in range(0, world, size)] if size > 1 else []


def column_cut(placement: Placement) -> Cut | None:
    return placement.cut if placement.cut is not None and placement.cut.dim != 0 else None


def cut_of(placement: Placement, entry: TensorEntry, shard: Shard) -> Cut | None:
    """The part of another process."""
    return placement.cut and placement.cut.of(shard, entry.shape[placement.cut.dim])


def num_parts(cut: Cut, entry: TensorEntry) -> int:
    return entry.shape[cut.dim] // (cut.stop - cut.start)
