"""What a load reads, and how its memory is divided: made from the headers alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from torchinfer.errors import ConfigError
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.memory import buffer_bytes
from torchinfer.loader.opening import Deliver, OpeningPlan, plan_opening
from torchinfer.loader.options import LoadOptions
from torchinfer.loader.placement import Placement
from torchinfer.loader.plan import (
    DEFAULT_MEMORY,
    ROOM_BYTES,
    Extent,
    choose_memory,
    extent_bytes,
    needed_memory,
    plan_extents,
    temporary_bytes,
    with_short_tail,
)
from torchinfer.loader.rounds import Peers
from torchinfer.loader.sharing import SharedPlan, choose_exchange, plan_shared
from torchinfer.loader.source import Source
from torchinfer.parallel import Shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is read, and with what; `staging`, `temporary_bytes` and, on the host, `open_bytes` are the limit."""

    extents: list[Extent]
    shared: SharedPlan
    staging: int  # bytes, of what was read or received and has not been placed
    temporary_bytes: int  # that pieces need while they are placed, and tensors while they are handed over
    first_readers: int
    most_readers: int
    opening: OpeningPlan | None = None
    open_bytes: int = 0  # of tensors that are put together at once

    @property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)


def plan_load(
    checkpoint: Checkpoint,
    placements: Mapping[str, Placement],
    device: torch.device,
    shard: Shard,
    options: LoadOptions,
    peers: Peers | None,
    deliver: Deliver | None,
    sizes: Mapping[str, int],
) -> LoadPlan:
    """The plan of one process; `sizes`: bytes of each parameter.

    Raises:
        ConfigError: `options.memory` is too little for a tensor, or an exchange was asked for without a group.
    """
    is_on_host, is_pinned = device.type == "cpu", device.type == "cuda"
    temporary = 0 if is_pinned else temporary_bytes(placements, checkpoint.tensors)
    limit = (options.memory or DEFAULT_MEMORY) - temporary
    limit = limit // 2 if deliver is not None and is_on_host else limit  # the other half: what is put together
    shared, own = _plan_reads(checkpoint, placements, shard, options, peers, limit)
    every, opening = [*shared.extents, *own], None  # whoever reads it: the limit that will do is the same for all
    if deliver is not None:
        opening = plan_opening(every, {name: placements[name].parameter for name in placements}, sizes)
        every, shared = list(opening.extents), shared.in_order(opening.extents)
        own = [] if shared.items else every
        temporary += deliver.num_bytes
    plan = LoadPlan([*shared.own, *own], shared, 0, temporary, *options.reader_counts(checkpoint.source), opening)
    other = temporary + buffer_bytes(shared.staging_bytes, is_pinned)
    if opening is not None and is_on_host:
        return _with_opening(plan, opening, options.memory, other)
    memory = choose_memory(every, options.memory, other, is_pinned)
    # On a device they are as few at once as they must be, and some more.
    open_bytes = opening.most_bytes + ROOM_BYTES if opening is not None else 0
    return replace(plan, staging=memory - temporary, open_bytes=open_bytes)


def _plan_reads(
    checkpoint: Checkpoint,
    placements: Mapping[str, Placement],
    shard: Shard,
    options: LoadOptions,
    peers: Peers | None,
    limit: int,
) -> tuple[SharedPlan, list[Extent]]:
    """What is exchanged, and what this process reads for itself."""
    tensors, is_network, gap = checkpoint.tensors, checkpoint.source.is_network, checkpoint.source.max_gap_bytes
    first, _ = options.reader_counts(checkpoint.source)
    whole_files = {name: stat.size for name, stat in checkpoint.stats.items()} if options.verify else {}
    num_bytes = sum(tensors[name].num_bytes for name in placements)
    # As many for each reader of each process; and one more piece, at most as long, is received.
    block = extent_bytes(is_network, limit * (first + 1) // (first + 2), first, num_bytes // shard.world)
    shared = _shared(checkpoint, placements, shard, options, peers, block)
    names = shared.names
    own = {name: placement for name, placement in placements.items() if name not in names}
    length = extent_bytes(is_network, limit - shared.staging_bytes, first, num_bytes)
    extents = plan_extents(own, tensors, length, whole_files, gap)
    # Over a network another request costs more than a short tail brings.
    return shared, extents if is_network else with_short_tail(extents, first, gap)


def _with_opening(plan: LoadPlan, opening: OpeningPlan, limit: int | None, other_bytes: int) -> LoadPlan:
    """The same, with what is put together on the host within the limit."""
    memory = choose_memory(opening.extents, limit, other_bytes + opening.most_bytes)
    left = memory - plan.temporary_bytes
    room = min(left // 2, memory - needed_memory(opening.extents, other_bytes))
    open_bytes = max(opening.most_bytes, room)
    return replace(plan, staging=left - open_bytes, open_bytes=open_bytes)


def may_exchange(source: Source, options: LoadOptions) -> bool:
    """Whether processes that have a group exchange what several of them need, if there is something: alike in all."""
    if options.exchange is not None or options.verify:
        return bool(options.exchange)
    return source.is_network or bool(options.direct)


def _shared(
    checkpoint: Checkpoint,
    placements: Mapping[str, Placement],
    shard: Shard,
    options: LoadOptions,
    peers: Peers | None,
    block_bytes: int,
) -> SharedPlan:
    """What this process and others exchange; nothing where each reads for itself."""
    nothing = plan = SharedPlan(shard.rank)
    if peers is not None and shard.world > 1 and not options.verify:
        block, gap = peers.block_bytes or block_bytes, checkpoint.source.max_gap_bytes
        plan = plan_shared(placements, checkpoint.tensors, shard, block, peers.narrow_bytes, gap)
    is_network, is_direct = checkpoint.source.is_network, bool(options.direct)
    is_wanted, reason = choose_exchange(is_network, is_direct, shard.world, peers is not None, plan.bytes_saved)
    if options.verify:
        is_wanted, reason = False, "to verify, every process reads whole files"
    elif options.exchange is not None:
        is_wanted, reason = options.exchange, f"exchange={options.exchange} was asked for"
    if is_wanted and peers is None and shard.world > 1:
        raise ConfigError(
            f"exchange=True needs a group of these {shard.world} processes: call torch.distributed.init_process_group "
            "in all of them, or pass one as peers"
        )
    if shard.world > 1:
        does = "processes exchange what several of them need" if is_wanted else "each process reads all that it needs"
        logger.info("%s: %s", does, reason)
    return plan if is_wanted else nothing
