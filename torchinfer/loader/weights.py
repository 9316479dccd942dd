"""From a checkpoint into a model's parameters: everything is checked, then what is needed is read, side by side."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchinfer.device import synchronize
from torchinfer.errors import CheckpointError, ConfigError, raise_all
from torchinfer.loader.assembly import Assembly, Delivery, check_scale, parameter_bytes
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.checksum import Checksums, read_sums
from torchinfer.loader.counted import CountedSource
from torchinfer.loader.exchange import POLL_SECONDS as EXCHANGE_POLL_SECONDS
from torchinfer.loader.exchange import Exchange
from torchinfer.loader.load_plan import LoadPlan, may_exchange, plan_load
from torchinfer.loader.memory import Staging
from torchinfer.loader.opening import Deliver, OpenTensors
from torchinfer.loader.options import DEFAULT_OPTIONS, LoadOptions
from torchinfer.loader.placement import Placement, place
from torchinfer.loader.published import hold_published
from torchinfer.loader.readers import POLL_SECONDS, Readers
from torchinfer.loader.rounds import Peers, Rounds, find_peers
from torchinfer.loader.schemes import HEAD, quantize_model
from torchinfer.loader.smoothing import Smoothing
from torchinfer.loader.tuning import ReaderCount
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import WHOLE, Shard

logger = logging.getLogger(__name__)

HOST = torch.device("cpu")
COPY_POLL_SECONDS = 0.002  # in which copies to a device are looked after while nothing was read


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load took. Bytes are those of the files."""

    seconds: float
    num_bytes: int  # that were wanted
    read_bytes: int  # that the storage, or the page cache, gave: what was read twice, skipped or not wanted included
    num_tensors: int
    num_readers: int  # most at once
    is_direct: bool
    peak_host_bytes: int  # at most held on the way: staging memory, and what tensors become on it
    num_retries: int
    exchanged_bytes: int = 0  # that came from other processes instead of the storage

    def __str__(self) -> str:
        size, rate = self.num_bytes / 1e9, self.num_bytes / max(self.seconds, 1e-9) / 1e9
        exchanged = f", {self.exchanged_bytes / 1e9:.3f} GB from other processes" if self.exchanged_bytes else ""
        read = f" ({self.read_bytes / 1e9:.3f} GB read)" if self.read_bytes != self.num_bytes else ""
        return (
            f"loaded {self.num_tensors} tensors, {size:.3f} GB{read} in {self.seconds:.2f} s: {rate:.2f} GB/s "
            f"with {self.num_readers} readers{', O_DIRECT' if self.is_direct else ''}; host memory on the way "
            f"{self.peak_host_bytes / 1e6:.0f} MB, {self.num_retries} retries{exchanged}"
        )


def load_model(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    options: LoadOptions = DEFAULT_OPTIONS,
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
    options: LoadOptions = DEFAULT_OPTIONS,
    shard: Shard = WHOLE,
    peers: Peers | None = None,
    smoothing: Smoothing | None = None,
    deliver: Deliver | None = None,
) -> LoadReport:
    """Give every parameter of a model (usually on meta) its values, on `device`; floats become `dtype`.

    Persistent buffers are filled likewise and keep their dtype; other buffers are moved to the device. With a `shard`
    the model has the shapes of one process, and only its part is read. Each byte is read once. A model whose load
    failed is unusable. Where processes may exchange what several of them need (exchange.py), all of them call this with
    the same options, and an error in one is an error in all; `peers` are those of the default group if it fits. With
    `deliver` the model is the whole one in every process: its parameters are put together on `device`, few at once
    (opening.py), and handed over. So it is for XLA, without a `shard`: on the host, and each is sent when it is whole.

    Raises:
        CheckpointError: before any data is read, with all missing, unexpected and unfit tensors; later if a file ends
            early, was replaced, cannot be read in spite of retries, or a value is beyond the range of `dtype`; or
            when another process of an exchange failed.
        ConfigError: `options.memory` is too little for a tensor, or `peers` do not fit the shard.
        DeviceError: the device's memory does not suffice.
    """
    start = time.perf_counter()
    assert device.type != "xla" or shard.world == 1, "several chips are one process's: divided.py"
    assembled_on = HOST if device.type == "xla" else device
    load = _prepare(model, checkpoint, dtype, assembled_on, options, shard, peers, smoothing, deliver or _sent(device))
    is_shown = progress and sys.stderr.isatty()
    load.run(is_shown)
    if deliver is None:
        _move_buffers(model, device)
    report = load.report(time.perf_counter() - start)
    logger.info("%s", report)
    if is_shown:
        print(report, file=sys.stderr)
    return report


def _sent(device: torch.device) -> Deliver | None:
    """To XLA, whose tensors are not written in parts."""
    return Deliver(partial(_put, device)) if device.type == "xla" else None


def _put(device: torch.device, name: str, tensor: Tensor) -> Tensor:
    found = tensor.to(device)
    synchronize(device)  # or what is on its way would stay on the host, beyond any limit
    return found


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Those that no checkpoint has, too."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@dataclass(frozen=True, slots=True)
class _Load:
    """What a load works with, made before the first byte of data is read."""

    checkpoint: Checkpoint
    placements: Mapping[str, Placement]
    plan: LoadPlan
    source: CountedSource
    readers: Readers
    assembly: Assembly
    delivery: Delivery | None
    exchange: Exchange | None
    is_on_host: bool

    def run(self, is_shown: bool) -> None:
        """Read all, and give the model its parameters."""
        readers, exchange = self.readers, self.exchange
        with contextlib.closing(readers), exchange or contextlib.nullcontext(), _bar(self.plan, is_shown) as bar:
            _fill(readers, self.assembly, exchange, bar)
        if readers.checksums is not None:
            readers.checksums.check(self.checkpoint.stats)
        self.assembly.finish()

    def report(self, seconds: float) -> LoadReport:
        """After `run`."""
        readers, open_bytes = self.readers, self.delivery.tensors.peak if self.delivery and self.is_on_host else 0
        return LoadReport(
            seconds=seconds,
            num_bytes=self.plan.num_bytes,
            read_bytes=self.source.num_bytes,
            num_tensors=len(self.placements),
            num_readers=readers.most_readers,
            is_direct=bool(readers.direct.choice),
            peak_host_bytes=readers.staging.peak + self.plan.temporary_bytes + open_bytes,
            num_retries=readers.num_retries,
            exchanged_bytes=self.exchange.num_received if self.exchange else 0,
        )


def _prepare(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    options: LoadOptions,
    shard: Shard,
    peers: Peers | None,
    smoothing: Smoothing | None,
    deliver: Deliver | None,
) -> _Load:
    """Where processes may exchange something an error in one is one in all."""
    peers = find_peers(shard, peers)
    may_meet = peers is not None and shard.world > 1 and may_exchange(checkpoint.source, options)
    rounds = Rounds(shard, peers) if peers is not None and may_meet else None
    with rounds.preparing() if rounds is not None else contextlib.nullcontext():
        placements = _placements(model, checkpoint, shard if deliver is None else WHOLE, smoothing)
        is_on_host = device.type == "cpu"
        sizes = parameter_bytes(model, dtype)
        plan = plan_load(checkpoint, placements, device, shard, options, peers, deliver, sizes)
        source = CountedSource(checkpoint.source)
        readers = _readers(replace(checkpoint, source=source), plan, options, device, shard)
        delivery = _delivery(plan, deliver, readers)
        assembly = Assembly(model, placements, [*plan.extents, *plan.shared.received], dtype, device, delivery)
        readers.place_of, readers.relocate = assembly.place_of, assembly.relocate
        exchange = _exchange(plan, rounds, placements, assembly, readers, delivery, device)
    return _Load(checkpoint, placements, plan, source, readers, assembly, delivery, exchange, is_on_host)


def _placements(
    model: nn.Module, checkpoint: Checkpoint, shard: Shard, smoothing: Smoothing | None
) -> Mapping[str, Placement]:
    placements, problems = place(model, checkpoint.tensors, shard)
    raise_all(problems, CheckpointError, f"{checkpoint.address} does not fit {_architecture(checkpoint)}")
    return placements if smoothing is None else smoothing.applied_to(placements)


def _delivery(plan: LoadPlan, deliver: Deliver | None, readers: Readers) -> Delivery | None:
    if deliver is None or plan.opening is None:
        return None
    return Delivery(deliver, OpenTensors(plan.opening, plan.open_bytes, readers.stop))


def _exchange(
    plan: LoadPlan,
    rounds: Rounds | None,
    placements: Mapping[str, Placement],
    assembly: Assembly,
    readers: Readers,
    delivery: Delivery | None,
    device: torch.device,
) -> Exchange | None:
    if rounds is None or not plan.shared.items:
        return None
    tensors = delivery.tensors if delivery is not None else None
    exchange = Exchange(plan.shared, rounds, placements, assembly, readers.staging, device, tensors)
    readers.place_of, readers.poll_seconds = exchange.place_of, EXCHANGE_POLL_SECONDS
    return exchange


def _readers(
    checkpoint: Checkpoint, plan: LoadPlan, options: LoadOptions, device: torch.device, shard: Shard
) -> Readers:
    is_read_by_several = shard.world > 1 and not plan.shared.items
    return Readers(
        source=checkpoint.source,
        stats=checkpoint.stats,
        extents=deque(plan.extents),
        staging=Staging(plan.staging, device.type == "cuda"),
        place_of=lambda piece: None,
        count=ReaderCount(plan.first_readers, plan.most_readers),
        direct=options.direct_choice(checkpoint.source, plan.num_bytes, is_read_by_several),
        checksums=Checksums(read_sums(checkpoint.source, checkpoint.stats)) if options.verify else None,
        poll_seconds=COPY_POLL_SECONDS if device.type == "cuda" else POLL_SECONDS,
    )


def _fill(readers: Readers, assembly: Assembly, exchange: Exchange | None, bar: tqdm[None]) -> None:
    """Place what is read until all is there."""
    start = time.perf_counter()
    for filled in readers.filled():
        if filled is not None and not (exchange and exchange.offer(filled)):
            for piece in filled.staged:
                assembly.put(piece, filled.bytes_of(piece))
            assembly.complete(filled.extent.pieces)
            if (buffer := filled.take_buffer()) is not None:
                assembly.release(buffer, readers.staging.give_back)
                del buffer
        assembly.collect()
        if exchange:
            exchange.step()
        num_bytes = readers.num_bytes
        average = num_bytes / (time.perf_counter() - start) / 1e9
        bar.set_postfix_str(f"average {average:.2f} GB/s, {readers.num_active} readers", refresh=False)
        bar.update(num_bytes - bar.n)
    if exchange:
        exchange.finish()


@contextlib.contextmanager
def _bar(plan: LoadPlan, is_shown: bool) -> Iterator[tqdm[None]]:
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="weights", disable=not is_shown) as bar:
        yield bar


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "the model"
