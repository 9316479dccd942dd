"""From a checkpoint into a model's parameters: everything is checked, then what is needed is read, side by side."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from torchinfer.errors import CheckpointError, raise_all
from torchinfer.loader.assembly import Assembly
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.checksum import Checksums, read_sums
from torchinfer.loader.memory import Staging
from torchinfer.loader.placement import WHOLE, Shard, place
from torchinfer.loader.plan import Extent, check_fits, extent_bytes, plan_extents
from torchinfer.loader.readers import Readers
from torchinfer.loader.tuning import DirectChoice, ReaderCount
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder

logger = logging.getLogger(__name__)

FIRST_READERS, MOST_READERS = 2, 16  # on local storage
FIRST_NETWORK_READERS, MOST_NETWORK_READERS = 8, 64
PROBE_BYTES = 1 << 30  # loads of less do not try direct reads: the comparison would cost more than it brings


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a checkpoint is read; the ranges are EngineConfig's."""

    memory: int = 2 << 30  # bytes of host memory on the way; the parameters themselves do not count
    readers: int | None = None  # at most, each with a file handle of its own; None: as many as bring more
    direct: bool | None = None  # around the page cache (O_DIRECT); None: what the first extents show to be faster
    verify: bool = False  # compare whole files with their CRC32C: the storage's, or that of a file CRC32C beside them


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

    def __str__(self) -> str:
        size, rate = self.num_bytes / 1e9, self.num_bytes / max(self.seconds, 1e-9) / 1e9
        return (
            f"loaded {self.num_tensors} tensors, {size:.3f} GB in {self.seconds:.2f} s: {rate:.2f} GB/s "
            f"with {self.num_readers} readers{', O_DIRECT' if self.is_direct else ''}; staging memory "
            f"{self.peak_host_bytes / 1e6:.0f} MB, {self.num_retries} retries"
        )


def load_model(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    options: LoadOptions = LoadOptions(),
    moe_mode: str = "dropless",
    moe_capacity_factor: float = 1.25,
    progress: bool = False,
) -> Decoder:
    """Build the model of a config and fill it.

    Raises:
        CheckpointError: the checkpoint does not fit the model, with all that does not; or it cannot be read.
        ConfigError: `moe_mode` does not fit the model, or the load memory is too little for a tensor.
        DeviceError: the device's memory does not suffice.
    """
    with torch.device("meta"):
        model = build_model(model_config, moe_mode, moe_capacity_factor)
    load_weights(model, checkpoint, dtype, device, progress, options)
    return model.eval()


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
    options: LoadOptions = LoadOptions(),
    shard: Shard = WHOLE,
) -> LoadReport:
    """Give every parameter of a model (usually on meta) its values, on `device`; floats become `dtype`.

    Persistent buffers are filled likewise and keep their dtype; other buffers are moved to the device. With a `shard`
    the model has the shapes of one process, and only its part is read. Each byte is read once. A model whose load
    failed is unusable.

    Raises:
        CheckpointError: before any data is read, with all missing, unexpected and unfit tensors; later if a file ends
            early, was replaced, cannot be read in spite of retries, or a value is beyond the range of `dtype`.
        ConfigError: `options.memory` is too little for a tensor.
        DeviceError: the device's memory does not suffice.
    """
    start = time.perf_counter()
    placements, problems = place(model, checkpoint.tensors, shard)
    raise_all(problems, CheckpointError, f"{checkpoint.address} does not fit {_architecture(checkpoint)}")
    is_network = checkpoint.source.is_network
    # On XLA pieces are copied once more on the way to the device, of one extent at a time.
    limit = options.memory // 2 if device.type == "xla" else options.memory
    most = options.readers or (MOST_NETWORK_READERS if is_network else MOST_READERS)
    first = min(most, FIRST_NETWORK_READERS if is_network else FIRST_READERS)
    whole_files = {name: stat.size for name, stat in checkpoint.stats.items()} if options.verify else {}
    checksums = Checksums(read_sums(checkpoint.source, checkpoint.stats)) if options.verify else None
    extents = plan_extents(placements, checkpoint.tensors, extent_bytes(is_network, limit, first), whole_files)
    check_fits(extents, limit)
    readers = _readers(checkpoint, extents, Staging(limit, device.type == "cuda"), options, first, most)
    assembly = Assembly(model, placements, extents, dtype, device)
    readers.place_of, readers.checksums = assembly.place_of, checksums
    num_bytes = sum(extent.num_bytes for extent in extents)
    with contextlib.closing(readers), _bar(num_bytes, progress) as bar:
        _fill(readers, assembly, bar)
    if checksums is not None:
        checksums.check(checkpoint.stats)
    assembly.finish()
    seconds = time.perf_counter() - start
    report = LoadReport(
        seconds=seconds,
        num_bytes=num_bytes,
        num_tensors=len(placements),
        num_readers=readers.most_readers,
        is_direct=bool(readers.direct.choice),
        peak_host_bytes=readers.staging.peak,
        num_retries=readers.attempts.num_retries,
    )
    logger.info("%s", report)
    return report


def _readers(
    checkpoint: Checkpoint, extents: list[Extent], staging: Staging, options: LoadOptions, first: int, most: int
) -> Readers:
    direct = options.direct
    if direct is None and sum(extent.num_bytes for extent in extents) < PROBE_BYTES:
        direct = False
    if checkpoint.source.kind == "gs":
        direct = False
    return Readers(
        source=checkpoint.source,
        stats=checkpoint.stats,
        extents=deque(extents),
        staging=staging,
        place_of=lambda piece: None,
        count=ReaderCount(options.readers or first, most),
        direct=DirectChoice(direct),
    )


def _fill(readers: Readers, assembly: Assembly, bar: tqdm[None]) -> None:
    """Place what is read until all is there."""
    start = time.perf_counter()
    for filled in readers.filled():
        if filled is not None:
            for piece in filled.staged:
                assembly.put(piece, filled.bytes_of(piece))
            assembly.complete(filled.extent.pieces)
            if filled.buffer is not None:
                assembly.wait()
                readers.staging.give_back(filled.buffer)
        num_bytes = readers.num_bytes
        average = num_bytes / (time.perf_counter() - start) / 1e9
        bar.set_postfix_str(f"average {average:.2f} GB/s, {readers.num_active} readers", refresh=False)
        bar.update(num_bytes - bar.n)


@contextlib.contextmanager
def _bar(num_bytes: int, progress: bool) -> Iterator[tqdm[None]]:
    is_shown = progress and sys.stderr.isatty()
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="weights", disable=not is_shown) as bar:
        yield bar


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "the model"
