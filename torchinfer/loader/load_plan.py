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
    Extent,
    choose_memory,
    copied_bytes,
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
    """What is read, and with what; `staging`, `temporary_bytes` and `open_bytes` are the limit together."""

    extents: list[Extent]
    shared: SharedPlan
    memory: int  # the limit, bytes
    temporary_bytes: int  # that pieces need while they are placed, and tensors while they are handed over
    first_readers: int
    most_readers: int
    opening: OpeningPlan | None = None
    open_bytes: int = 0  # of tensors that are put together at once

    @property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)

    @property
    def staging(self) -> int:
        return self.memory - self.temporary_bytes - self.open_bytes

    def with_opening(
        self, placements: Mapping[str, Placement], sizes: Mapping[str, int], deliver: Deliver, limit: int | None
    ) -> LoadPlan:
        """The same for tensors that leave the host when they are whole; `sizes`: bytes of each parameter."""
        parameter_of = {name: placement.parameter for name, placement in placements.items()}
        opening = plan_opening(self.extents, parameter_of, sizes)
        temporary = self.temporary_bytes + deliver.num_bytes
        memory = choose_memory(self.extents, limit, temporary + opening.most_bytes)
        room = min((memory - temporary) // 2, memory - needed_memory(self.extents, temporary))
        return replace(
            self,
            extents=list(opening.extents),
            memory=memory,
            temporary_bytes=temporary,
            opening=opening,
            open_bytes=max(opening.most_bytes, room),
        )


def plan_load(
    checkpoint: Checkpoint,
    placements: Mapping[str, Placement],
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard,
    options: LoadOptions,
    peers: Peers | None,
    has_copies: bool,
) -> LoadPlan:
    """The plan of one process. `has_copies`: half of the memory is for what is copied, or put together, on the way.

    Raises:
        ConfigError: `options.memory` is too little for a tensor, or an exchange was asked for without a group.
    """
    is_network = checkpoint.source.is_network
    temporary = 0 if device.type == "cuda" else temporary_bytes(placements, checkpoint.tensors)
    limit = (options.memory or DEFAULT_MEMORY) - temporary
    # The other half: on XLA copies of one extent on the way to the device, else tensors that are put together.
    limit = limit // 2 if has_copies else limit
    first, most = options.reader_counts(checkpoint.source)
    whole_files = {name: stat.size for name, stat in checkpoint.stats.items()} if options.verify else {}
    num_bytes = sum(checkpoint.tensors[name].num_bytes for name in placements)
    block = extent_bytes(is_network, limit, first + 1, num_bytes)
    shared = _shared(checkpoint, placements, shard, options, peers, block)
    own = {name: placement for name, placement in placements.items() if name not in shared.names}
    length = extent_bytes(is_network, limit - shared.staging_bytes, first, num_bytes)
    max_gap = checkpoint.source.max_gap_bytes
    extents = plan_extents(own, checkpoint.tensors, length, whole_files, max_gap)
    if not is_network:  # there another request costs more than it brings
        extents = with_short_tail(extents, first, max_gap)
    extents = [*shared.own, *extents]
    temporary += copied_bytes(extents, placements, dtype) if device.type == "xla" else 0
    is_pinned = device.type == "cuda"
    lane = buffer_bytes(shared.staging_bytes, is_pinned)
    memory = choose_memory(extents, options.memory, lane + temporary, is_pinned)
    return LoadPlan(extents, shared, memory, temporary, first, most)


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
    if peers is not None and not options.verify:
        block, gap = peers.block_bytes or block_bytes, checkpoint.source.max_gap_bytes
        plan = plan_shared(placements, checkpoint.tensors, shard, block, peers.smallest_bytes, gap)
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
