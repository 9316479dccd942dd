"""A checkpoint into a quantized one: read in pieces, packed, and written to places that are known in advance.

Values and scales are those that `load_model` with the same request holds, except where a model reorders a tensor
(Falcon's q, k and v): here it stays in the order of the checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from torchinfer.calibration import Calibration, calibrate, plan_calibration, refuse_quantized
from torchinfer.errors import CheckpointError, ConfigError, raise_all
from torchinfer.loader.assembly import check_scale
from torchinfer.loader.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint
from torchinfer.loader.checksum import Checksums, read_sums
from torchinfer.loader.memory import Staging
from torchinfer.loader.options import DEFAULT_OPTIONS, LoadOptions
from torchinfer.loader.placement import Placement, place
from torchinfer.loader.plan import DEFAULT_MEMORY, Extent, Piece, choose_memory, extent_bytes, plan_extents
from torchinfer.loader.readers import Readers
from torchinfer.loader.schemes import quantize_model
from torchinfer.loader.smoothing import Smoothing
from torchinfer.loader.source import Source
from torchinfer.loader.stall import Trial, read_file, unless_stalled
from torchinfer.loader.tuning import ReaderCount
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.tokenizer_files import load_tokenizer
from torchinfer.writer.compressed_tensors import encode, quantization_config
from torchinfer.writer.folder import CALIBRATION, PartialFolder, ShardFile
from torchinfer.writer.layout import FilePlan, plan_files

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
COPIED_SUFFIXES = (".json", ".jinja", ".md", ".model", ".txt")  # never pickle files, never programs
COPIED_NAMES = ("LICENSE", "NOTICE")
INDEX_SUFFIX = ".index.json"  # ours is another one, and those of pickle files have no use
MAX_COPIED_BYTES = 200_000_000
EMBEDDING = "embedding.weight"
HEAD = "lm_head"
Request = str | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What was written, and what it took. What an earlier run has done is left out of `read_bytes` and `seconds`, and
    calibration of `seconds`."""

    seconds: float
    read_bytes: int
    input_bytes: int
    output_bytes: int
    num_files: int
    num_resumed_files: int
    peak_host_bytes: int  # at most held on the way: staging memory, and what pieces become on it

    def __str__(self) -> str:
        rate = self.read_bytes / max(self.seconds, 1e-9) / 1e9
        resumed = f" ({self.num_resumed_files} were there)" if self.num_resumed_files else ""
        return (
            f"quantized {self.input_bytes / 1e9:.3f} GB to {self.output_bytes / 1e9:.3f} GB in {self.num_files} "
            f"files{resumed}, {self.seconds:.2f} s: {rate:.2f} GB/s; host memory on the way "
            f"{self.peak_host_bytes / 1e6:.0f} MB"
        )


def quantize_checkpoint(
    model: str | Path,
    output: str | Path,
    request: Request,
    *,
    calibration: str | Path | None = None,
    options: LoadOptions = DEFAULT_OPTIONS,
    progress: bool = False,
) -> WriteReport:
    """Write the checkpoint `model` to the new folder `output`, quantized as `request` says (loader/schemes.py), and
    smoothed with the text file `calibration`.

    What a run that was stopped has completed is not done again.

    Raises:
        CheckpointError: the checkpoint cannot be read, or what is written cannot be.
        ConfigError: `request` does not fit the model, with all that does not; `output` exists, has too little space,
            or was begun by a run with other options.
    """
    _check_address(output)
    checkpoint = Checkpoint.open(model)
    placements, section = _plan(checkpoint, request)
    files = plan_files(checkpoint, placements)
    folder = PartialFolder(Path(output), _state(checkpoint, request, calibration))
    missing = [file for file in files if not folder.has(file)]
    run = _Run(checkpoint, placements, missing, folder, options)
    copied = _copied_files(checkpoint)
    folder.check_space(missing)
    plan = None if calibration is None else _plan_calibration(checkpoint, request, calibration)
    with folder:
        if plan is not None:
            smoothing = _smoothing(checkpoint, plan, folder, options, progress)
            run = replace(run, placements=smoothing.applied_to(placements))
        start = time.perf_counter()
        run.write(progress)
        _write_small_files(checkpoint, files, section, copied, folder)
        folder.finish()
    report = _report(run, files, time.perf_counter() - start)
    logger.info("%s", report)
    return report


def _check_address(output: str | Path) -> None:
    if str(output).startswith("gs:/"):
        raise ConfigError(f"{output} cannot be written to; name a folder, and upload it with `gcloud storage cp -r`")


def _plan(checkpoint: Checkpoint, request: Request) -> tuple[dict[str, Placement], dict[str, Any]]:
    """What is done with each tensor of the checkpoint, and the section of config.json."""
    refuse_quantized(checkpoint)
    with torch.device("meta"):
        model = build_model(ModelConfig.from_dict(checkpoint.config))
    quantize_model(model, request, CPU)
    if model.head_scheme is not None:
        raise ConfigError(
            f"lm_head={model.head_scheme.name}: the head is the table of embeddings, which a file has once, as it is; "
            "leave the pattern out, or quantize while loading (--quantization)"
        )
    found, problems = place(model, checkpoint.tensors)
    raise_all(problems, CheckpointError, f"{checkpoint.address} does not fit its config.json")
    # Nothing is reordered, and what the model has no use for is copied like everything else.
    placements = {
        name: replace(found[name], convert=None) if name in found else Placement(name) for name in checkpoint.tensors
    }
    return placements, _section(checkpoint, placements)


def _section(checkpoint: Checkpoint, placements: Mapping[str, Placement]) -> dict[str, Any]:
    schemes, kept = {}, [HEAD]
    for name, placement in placements.items():
        layer, _, kind = name.rpartition(".")
        if placement.matrix is not None:
            schemes[layer] = placement.matrix.scheme
        elif kind == "weight" and len(checkpoint.tensors[name].shape) == 2 and placement.parameter != EMBEDDING:
            kept.append(layer)
    if not schemes:
        raise ConfigError("the schemes leave every layer as it is: there is nothing to write")
    return quantization_config(schemes, {layer for layer in kept if layer not in schemes})


def _plan_calibration(checkpoint: Checkpoint, request: Request, text: str | Path) -> Calibration:
    config = ModelConfig.from_dict(checkpoint.config)
    return plan_calibration(config, request, text, load_tokenizer(checkpoint.address))


def _smoothing(
    checkpoint: Checkpoint, plan: Calibration, folder: PartialFolder, options: LoadOptions, progress: bool
) -> Smoothing:
    """That of the run which began the folder, so that all files have the same; else it is measured."""
    known = folder.read_file(CALIBRATION)
    if known is not None:
        return Smoothing.from_bytes(known)
    config = ModelConfig.from_dict(checkpoint.config)
    smoothing = calibrate(checkpoint, config, plan, CPU, options, progress)
    folder.write_file(CALIBRATION, smoothing.to_bytes())
    return smoothing


def _state(checkpoint: Checkpoint, request: Request, calibration: str | Path | None) -> dict[str, Any]:
    return {
        "torchinfer": version("torchinfer"),
        "scheme": request if isinstance(request, str) else [list(pair) for pair in request.items()],
        "calibration": None if calibration is None else _digest(calibration),
        "source": {name: [stat.size, stat.version] for name, stat in sorted(checkpoint.stats.items())},
    }


def _digest(text: str | Path) -> str:
    try:
        with open(text, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read calibration={str(text)!r}: {error}; it must be a text file in UTF-8") from error


@dataclass(slots=True)
class _Run:
    """Reads what the missing files need, and writes them."""

    checkpoint: Checkpoint
    placements: Mapping[str, Placement]
    files: list[FilePlan]
    folder: PartialFolder
    options: LoadOptions
    extents: list[Extent] = field(init=False)
    staging: Staging = field(init=False)
    temporary_bytes: int = field(init=False)  # of host memory, that a piece needs while it is packed
    _file_of: dict[str, FilePlan] = field(init=False)  # checkpoint tensor -> the file that it goes to
    _remaining: dict[str, int] = field(init=False)  # file -> pieces that are not in it yet
    _open: dict[str, ShardFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._file_of = {name: file for file in self.files for name in file.slots}
        self.extents = self._plan_extents()
        self.temporary_bytes = max((self._packed_bytes(extent) for extent in self.extents), default=0)
        memory = choose_memory(self.extents, self.options.memory, self.temporary_bytes)
        self.staging = Staging(memory - self.temporary_bytes)
        pieces = [piece for extent in self.extents for piece in extent.pieces if not piece.is_filler]
        self._remaining = {file.name: 0 for file in self.files}
        for piece in pieces:
            self._remaining[self._file_of[piece.entry.name].name] += 1

    @property
    def num_bytes(self) -> int:
        """That are read."""
        return sum(extent.num_bytes for extent in self.extents)

    def write(self, progress: bool) -> None:
        """Write all files.

        Raises:
            CheckpointError: something cannot be read or written. Files that were not complete are gone then.
        """
        readers = self._readers()
        bar = tqdm(total=self.num_bytes, unit="B", unit_scale=True, desc="quantize", disable=None if progress else True)
        try:
            with contextlib.closing(readers), bar:
                self._finish(file for file in self.files if not self._remaining[file.name])
                for filled in readers.filled():
                    if filled is not None:
                        for piece in filled.staged:
                            self._put(piece, filled.bytes_of(piece))
                        if filled.buffer is not None:
                            readers.staging.give_back(filled.buffer)
                    bar.set_postfix_str(", ".join(self._open), refresh=False)
                    bar.update(readers.num_bytes - bar.n)
            if readers.checksums is not None:
                readers.checksums.check({name: self.checkpoint.stats[name] for name in self._whole_files()})
        finally:
            for file in self._open.values():
                file.discard()

    def _put(self, piece: Piece, content: Tensor) -> None:
        """Bring a piece, uint8 [num_bytes], to its place in the file."""
        if piece.is_filler:
            return
        plan, placement = self._file_of[piece.entry.name], self.placements[piece.entry.name]
        if plan.name not in self._open:
            self._open[plan.name] = ShardFile(self.folder.path, plan)
        slots = [slot for slot in plan.slots[piece.entry.name] if slot.stored.constant is None]
        numbers = [content]
        if placement.matrix is not None:
            value = content.view(piece.entry.dtype).view(piece.shape)
            packed = placement.pack(value)
            check_scale(piece.entry.name, packed["scale"])  # as a load does
            numbers = encode(packed, placement.matrix.scheme)
        elif placement.convert is not None:
            numbers = [placement.convert(content.view(piece.entry.dtype).view(piece.shape))]
        for slot, part in zip(slots, numbers, strict=True):
            self._open[plan.name].write(slot.offset_of(piece.first_row), part)
        self._remaining[plan.name] -= 1
        if not self._remaining[plan.name]:
            self._finish([plan])

    def _finish(self, files: Iterable[FilePlan]) -> None:
        for plan in files:
            file = self._open.get(plan.name) or ShardFile(self.folder.path, plan)
            file.finish()
            self._open.pop(plan.name, None)

    def _plan_extents(self) -> list[Extent]:
        checkpoint, limit = self.checkpoint, self.options.memory or DEFAULT_MEMORY
        wanted = {name: self.placements[name] for name in self._file_of}
        num_bytes = sum(checkpoint.tensors[name].num_bytes for name in wanted)
        first_readers, _ = self.options.reader_counts(checkpoint.source)
        length = extent_bytes(checkpoint.source.is_network, limit, first_readers, num_bytes)
        whole_files = {name: checkpoint.stats[name].size for name in self._whole_files()}
        return plan_extents(wanted, checkpoint.tensors, length, whole_files)

    def _packed_bytes(self, extent: Extent) -> int:
        """Host memory to pack any of an extent's pieces: packed, and in the layout of the file."""
        found = 0
        for piece in extent.pieces:
            if not piece.is_filler and (placement := self.placements[piece.entry.name]).matrix is not None:
                found = max(found, 2 * piece.num_bytes + placement.temporary_bytes(piece.entry))
        return found

    def _whole_files(self) -> set[str]:
        """What is verified: the files that something is read of."""
        shards = {self.checkpoint.tensors[name].shard for name in self._file_of}
        return shards if self.options.verify else set()

    def _readers(self) -> Readers:
        checkpoint, options = self.checkpoint, self.options
        stats = {name: checkpoint.stats[name] for name in self._whole_files()}
        return Readers(
            source=checkpoint.source,
            stats=checkpoint.stats,
            extents=deque(self.extents),
            staging=self.staging,
            place_of=lambda piece: None,
            count=ReaderCount(*options.reader_counts(checkpoint.source)),
            direct=options.direct_choice(checkpoint.source, self.num_bytes),
            checksums=Checksums(read_sums(checkpoint.source, stats)) if options.verify else None,
        )


def _report(run: _Run, files: list[FilePlan], seconds: float) -> WriteReport:
    return WriteReport(
        seconds=seconds,
        read_bytes=run.num_bytes,
        input_bytes=run.checkpoint.total_bytes,
        output_bytes=sum(file.num_bytes for file in files),
        num_files=len(files),
        num_resumed_files=len(files) - len(run.files),
        peak_host_bytes=run.staging.peak + run.temporary_bytes,
    )


def _copied_files(checkpoint: Checkpoint) -> list[str]:
    """The tokenizer's files, and all others that are neither tensors nor a program."""
    source = checkpoint.source
    names = [name for name in source.names() if name.endswith(COPIED_SUFFIXES) or name.startswith(COPIED_NAMES)]
    names = [name for name in names if name != CONFIG and not name.endswith(INDEX_SUFFIX)]
    sizes = {name: unless_stalled(f"look at {source.address}/{name}", partial(_size, source, name)) for name in names}
    problems = [
        f"{source.address}/{name} has {size} bytes, and at most {MAX_COPIED_BYTES} are copied of a file that is no "
        "tensors: move it out of the folder"
        for name, size in sizes.items()
        if size > MAX_COPIED_BYTES
    ]
    raise_all(problems, ConfigError, "what is beside the tensors")
    return names


def _size(source: Source, name: str, trial: Trial) -> int:
    return source.stat(name).size


def _write_small_files(
    checkpoint: Checkpoint, files: list[FilePlan], section: dict[str, Any], copied: list[str], folder: PartialFolder
) -> None:
    """config.json, the index, and copies of what is beside the tensors."""
    for name in copied:
        folder.write_file(name, read_file(checkpoint.source, name, MAX_COPIED_BYTES))
    config = {**checkpoint.config, "quantization_config": section}
    folder.write_file(CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode())
    if [file.name for file in files] != [SINGLE]:
        weight_map = {name: file.name for file in files for name in file.tensor_names}
        total = sum(file.num_bytes - len(file.header) for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        folder.write_file(INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
