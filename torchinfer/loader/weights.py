"""From a checkpoint into a model's parameters: everything is checked, then what is needed is read, side by side."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from torchinfer.errors import CheckpointError, ConfigError, raise_all
from torchinfer.loader.assembly import Assembly, Deliver, check_scale
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.checksum import Checksums, read_sums
from torchinfer.loader.exchange import POLL_SECONDS, Exchange, Peers, find_peers
from torchinfer.loader.memory import Staging
from torchinfer.loader.placement import Placement, place
from torchinfer.loader.plan import Extent, check_fits, extent_bytes, plan_extents
from torchinfer.loader.published import hold_published
from torchinfer.loader.readers import Readers
from torchinfer.loader.schemes import HEAD, quantize_model
from torchinfer.loader.sharing import SharedPlan, choose_exchange, plan_shared
from torchinfer.loader.smoothing import Smoothing
from torchinfer.loader.source import Source
from torchinfer.loader.tuning import DirectChoice, ReaderCount
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import WHOLE, Shard

logger = logging.getLogger(__name__)

FIRST_READERS, MOST_READERS = min(8, max(2, os.cpu_count() or 2)), 16  # on local storage
FIRST_NETWORK_READERS, MOST_NETWORK_READERS = 8, 64
PROBE_BYTES = 1 << 30  # loads of less do not try direct reads: the comparison would cost more than it brings


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint is read; the ranges are EngineConfig's."""

    memory: int = 2 << 30  # bytes of host memory on the way; the parameters themselves do not count
    readers: int | None = None  # at most, each with a file handle of its own; None: as many as bring more
    direct: bool | None = None  # around the page cache (O_DIRECT); None: what the first extents show to be faster
    verify: bool = False  # compare whole files with their CRC32C: the storage's, or that of a file CRC32C beside them
    exchange: bool | None = None  # processes send each other what several need; None: where that is faster

    def __post_init__(self) -> None:
        if self.exchange and self.verify:
            raise ConfigError(
                "exchange=True and verify=True exclude each other: to verify, every process reads whole files; switch "
                "one of them off"
            )

    def reader_counts(self, source: Source) -> tuple[int, int]:
        """How many read at first, and at most."""
        first, most = FIRST_READERS, MOST_READERS
        if source.is_network:
            first, most = FIRST_NETWORK_READERS, MOST_NETWORK_READERS
        return self.readers or first, self.readers or most

    def direct_choice(self, source: Source, num_bytes: int) -> DirectChoice:
        """Whether to read around the page cache, for a load of so many bytes."""
        is_pointless = source.kind == "gs" or (self.direct is None and num_bytes < PROBE_BYTES)
        return DirectChoice(False if is_pointless else self.direct)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load took. `num_bytes` as read, in the dtypes of the files."""

    seconds: float
    num_bytes: int
    num_tensors: int
    num_readers: int  # most at once
    is_direct: bool
    peak_host_bytes: int  # of staging memory
    num_retries: int
    exchanged_bytes: int = 0  # that came from other processes instead of the storage

    def __str__(self) -> str:
        size, rate = self.num_bytes / 1e9, self.num_bytes / max(self.seconds, 1e-9) / 1e9
        exchanged = f", {self.exchanged_bytes / 1e9:.3f} GB from other processes" if self.exchanged_bytes else ""
        return (
            f"loaded {self.num_tensors} tensors, {size:.3f} GB in {self.seconds:.2f} s: {rate:.2f} GB/s "
            f"with {self.num_readers} readers{', O_DIRECT' if self.is_direct else ''}; staging memory "
            f"{self.peak_host_bytes / 1e6:.0f} MB, {self.num_retries} retries{exchanged}"
        )


def load_model(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    options: LoadOptions = LoadOptions(),
    quantization: str | Mapping[str, str] | None = None,
    smoothing: Smoothing | None = None,
    moe_mode: str = "dropless",
    moe_capacity_factor: float = 1.25,
    progress: bool = False,
) -> Decoder:
    """Build the model of a config and fill it; `quantization` is what schemes.py says, `smoothing` fits to it.

    Raises:
        CheckpointError: the checkpoint does not fit the model, with all that does not; or it cannot be read.
        ConfigError: `moe_mode` or `quantization` do not fit the model, or the load memory is too little for a tensor.
        DeviceError: the device's memory does not suffice.
    """
    model, checkpoint = build_empty(checkpoint, model_config, device, quantization, moe_mode, moe_capacity_factor)
    load_weights(model, checkpoint, dtype, device, progress, options, smoothing=smoothing)
    model.copy_table()
    if model.head_scheme is not None and model.head is not None:
        check_scale(HEAD, model.head.get_buffer("weight.scale"))
    return model.eval()


def build_empty(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    device: torch.device,
    quantization: str | Mapping[str, str] | None,
    moe_mode: str,
    moe_capacity_factor: float,
) -> tuple[Decoder, Checkpoint]:
    """The model of a config on meta, its matrices held as they will be, and the checkpoint to fill it from."""
    with torch.device("meta"):
        model = build_model(model_config, moe_mode, moe_capacity_factor)
    if quantization is not None and checkpoint.quantization is not None:
        raise ConfigError(
            f"quantization={quantization!r}: {checkpoint.address} comes quantized already (its quantization_config): "
            "leave the option out, or take a checkpoint that is not quantized"
        )
    if quantization is not None:
        quantize_model(model, quantization, device)
    elif checkpoint.quantization is not None:
        checkpoint = hold_published(model, checkpoint, device)
    return model, checkpoint


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
    options: LoadOptions = LoadOptions(),
    shard: Shard = WHOLE,
    peers: Peers | None = None,
    smoothing: Smoothing | None = None,
    deliver: Deliver | None = None,
) -> LoadReport:
    """Give every parameter of a model (usually on meta) its values, on `device`; floats become `dtype`.

    Persistent buffers are filled likewise and keep their dtype; other buffers are moved to the device. With a `shard`
    the model has the shapes of one process, and only its part is read. Each byte is read once. A model whose load
    failed is unusable. Where processes exchange what several of them need (exchange.py), all of them call this with the
    same options; `peers` are those of the default group if it fits. `deliver` is Assembly's.

    Raises:
        CheckpointError: before any data is read, with all missing, unexpected and unfit tensors; later if a file ends
            early, was replaced, cannot be read in spite of retries, or a value is beyond the range of `dtype`; or
            when another process of an exchange failed.
        ConfigError: `options.memory` is too little for a tensor, or `peers` do not fit the shard.
        DeviceError: the device's memory does not suffice.
    """
    start = time.perf_counter()
    placements, problems = place(model, checkpoint.tensors, shard)
    raise_all(problems, CheckpointError, f"{checkpoint.address} does not fit {_architecture(checkpoint)}")
    if smoothing is not None:
        placements = smoothing.applied_to(placements)
    peers = find_peers(shard, peers)
    plan = _plan(checkpoint, placements, device, shard, options, peers)
    readers = _readers(checkpoint, plan, options, device)
    assembly = Assembly(model, placements, [*plan.extents, *plan.shared.received], dtype, device, deliver)
    readers.place_of, readers.relocate = assembly.place_of, assembly.relocate
    exchange = _exchange(plan.shared, shard, peers, placements, assembly, readers, device)
    is_shown = progress and sys.stderr.isatty()
    with contextlib.closing(readers), exchange or contextlib.nullcontext(), _bar(plan.num_bytes, is_shown) as bar:
        _fill(readers, assembly, exchange, bar)
    if readers.checksums is not None:
        readers.checksums.check(checkpoint.stats)
    assembly.finish()
    report = LoadReport(
        seconds=time.perf_counter() - start,
        num_bytes=plan.num_bytes,
        num_tensors=len(placements),
        num_readers=readers.most_readers,
        is_direct=bool(readers.direct.choice),
        peak_host_bytes=readers.staging.peak,
        num_retries=readers.num_retries,
        exchanged_bytes=exchange.num_received if exchange else 0,
    )
    logger.info("%s", report)
    if is_shown:
        print(report, file=sys.stderr)
    return report


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is read, and with what."""

    extents: list[Extent]
    shared: SharedPlan
    limit: int  # of staging memory, bytes
    first_readers: int
    most_readers: int

    @property
    def num_bytes(self) -> int:
        return sum(extent.num_bytes for extent in self.extents)


def _plan(
    checkpoint: Checkpoint,
    placements: Mapping[str, Placement],
    device: torch.device,
    shard: Shard,
    options: LoadOptions,
    peers: Peers | None,
) -> _Plan:
    is_network = checkpoint.source.is_network
    # On XLA pieces are copied once more on the way to the device, of one extent at a time.
    limit = options.memory // 2 if device.type == "xla" else options.memory
    first, most = options.reader_counts(checkpoint.source)
    whole_files = {name: stat.size for name, stat in checkpoint.stats.items()} if options.verify else {}
    num_bytes = sum(checkpoint.tensors[name].num_bytes for name in placements)
    block = extent_bytes(is_network, limit, first + 1, num_bytes)
    shared = _shared(checkpoint, placements, shard, options, peers, block)
    own = {name: placement for name, placement in placements.items() if name not in shared.names}
    length = extent_bytes(is_network, limit - shared.staging_bytes, first, num_bytes)
    extents = [*shared.own, *plan_extents(own, checkpoint.tensors, length, whole_files)]
    check_fits(extents, limit, shared.staging_bytes)
    return _Plan(extents, shared, limit, first, most)


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
        plan = plan_shared(
            placements, checkpoint.tensors, shard, peers.block_bytes or block_bytes, peers.smallest_bytes
        )
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


def _exchange(
    plan: SharedPlan,
    shard: Shard,
    peers: Peers | None,
    placements: Mapping[str, Placement],
    assembly: Assembly,
    readers: Readers,
    device: torch.device,
) -> Exchange | None:
    if peers is None or not plan.items:
        return None
    exchange = Exchange(plan, shard, peers, placements, assembly, readers.staging, device)
    readers.place_of, readers.poll_seconds = exchange.place_of, POLL_SECONDS
    return exchange


def _readers(checkpoint: Checkpoint, plan: _Plan, options: LoadOptions, device: torch.device) -> Readers:
    return Readers(
        source=checkpoint.source,
        stats=checkpoint.stats,
        extents=deque(plan.extents),
        staging=Staging(plan.limit, device.type == "cuda"),
        place_of=lambda piece: None,
        count=ReaderCount(plan.first_readers, plan.most_readers),
        direct=options.direct_choice(checkpoint.source, plan.num_bytes),
        checksums=Checksums(read_sums(checkpoint.source, checkpoint.stats)) if options.verify else None,
    )


def _fill(readers: Readers, assembly: Assembly, exchange: Exchange | None, bar: tqdm[None]) -> None:
    """Place what is read until all is there."""
    start = time.perf_counter()
    for filled in readers.filled():
        if filled is not None and not (exchange and exchange.offer(filled)):
            for piece in filled.staged:
                assembly.put(piece, filled.bytes_of(piece))
            assembly.complete(filled.extent.pieces)
            if filled.buffer is not None:
                assembly.wait()
                readers.staging.give_back(filled.buffer)
        if exchange:
            exchange.step()
        num_bytes = readers.num_bytes
        average = num_bytes / (time.perf_counter() - start) / 1e9
        bar.set_postfix_str(f"average {average:.2f} GB/s, {readers.num_active} readers", refresh=False)
        bar.update(num_bytes - bar.n)
    if exchange:
        exchange.finish()


@contextlib.contextmanager
def _bar(num_bytes: int, is_shown: bool) -> Iterator[tqdm[None]]:
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="weights", disable=not is_shown) as bar:
        yield bar


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "the model"
