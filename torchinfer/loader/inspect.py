"""What a checkpoint is, whether this library can run it, and all that is wrong with it; no tensor data is read."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchinfer.device import dtype_name
from torchinfer.errors import UnsupportedModelError
from torchinfer.loader.checkpoint import Checkpoint, scan
from torchinfer.loader.header import TensorEntry, quoted
from torchinfer.loader.placement import place
from torchinfer.loader.published import plan_published
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig

NUM_LARGEST = 5
# Our name -> the key of config.json that most families use, for models that we cannot read otherwise.
SHAPE_KEYS = {
    "context_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True, slots=True)
class LargeTensor:
    """One of the largest tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts about a checkpoint. `shape` has the keys of SHAPE_KEYS; None where config.json does not say."""

    path: str
    architecture: str | None
    unsupported: str | None  # why this library cannot compute the model; None: it can
    num_parameters: int  # values in all tensors; of a quantized model those that they stand for
    quantization: str | None  # how the checkpoint comes quantized: method, schemes, layers that are not
    total_bytes: int
    bytes_by_dtype: dict[str, int]
    bytes_by_shard: dict[str, int]
    shape: dict[str, int | None]
    has_tokenizer: bool
    largest: tuple[LargeTensor, ...]
    problems: tuple[str, ...]  # of the files; empty when all is well

    @property
    def is_usable(self) -> bool:
        """Whether the model can be loaded."""
        return self.unsupported is None and not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "is_usable": self.is_usable}

    def to_text(self) -> str:
        """For people: one fact a line, problems last. Of a folder without a checkpoint there are no facts."""
        if self.architecture is None and not self.bytes_by_shard:
            return "\n".join(["no checkpoint:  " + self.path, *_problems(self.problems)])
        facts = {
            "checkpoint": self.path,
            "architecture": self.architecture or "unknown",
            "supported": "yes" if self.unsupported is None else f"no: {self.unsupported}",
            "parameters": f"{self.num_parameters:,}",
            "quantization": self.quantization or "none",
            "size": f"{_size(self.total_bytes)} in {len(self.bytes_by_shard)} file(s)",
            "dtypes": ", ".join(f"{dtype} {_size(size)}" for dtype, size in self.bytes_by_dtype.items()) or "none",
            **{name.replace("num_", "").replace("_", " "): _number(value) for name, value in self.shape.items()},
            "tokenizer": "yes" if self.has_tokenizer else "no",
        }
        lines = [f"{name + ':':<16}{value}" for name, value in facts.items()]
        lines += ["largest tensors:"] if self.largest else []
        lines += [
            f"  {_size(tensor.num_bytes):>9}  {tensor.dtype} {list(tensor.shape)}  {tensor.name}"
            for tensor in self.largest
        ]
        return "\n".join(lines + _problems(self.problems))


def inspect(path: str | Path) -> Inspection:
    """Look at a checkpoint's configuration and headers.

    Raises:
        CheckpointError: the path is no folder that can be listed. Everything else is reported in `problems`.
    """
    checkpoint, problems = scan(path)
    config, unsupported = _read_config(checkpoint)
    quantization = None if checkpoint.quantization is None else _method(checkpoint.quantization)
    num_parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    if config is not None and checkpoint.tensors:
        with torch.device("meta"):
            model = build_model(config)
        try:
            tensors, quantization, found = _hold(model, checkpoint)
            # What cannot be held would be missing, too.
            problems += found or place(model, tensors)[1]
            num_parameters = model.num_parameters() if checkpoint.quantization is not None else num_parameters
        except UnsupportedModelError as error:
            unsupported = str(error)
    entries = sorted(checkpoint.tensors.values(), key=lambda entry: (-entry.num_bytes, entry.name))
    return Inspection(
        path=str(path),
        architecture=config.architecture if config else _architecture(checkpoint),
        unsupported=unsupported,
        num_parameters=num_parameters,
        quantization=quantization,
        total_bytes=checkpoint.total_bytes,
        bytes_by_dtype=_bytes_by(entries, "dtype"),
        bytes_by_shard=_bytes_by(entries, "shard"),
        shape={name: _shape(name, key, checkpoint, config) for name, key in SHAPE_KEYS.items()},
        has_tokenizer=checkpoint.has_tokenizer,
        largest=tuple(map(_large, entries[:NUM_LARGEST])),
        problems=tuple(problems),
    )


def _read_config(checkpoint: Checkpoint) -> tuple[ModelConfig | None, str | None]:
    """The model's config, or why there is none."""
    if not checkpoint.config:
        return None, "no config.json says which model it is"
    try:
        return ModelConfig.from_dict(checkpoint.config), None
    except UnsupportedModelError as error:
        return None, str(error)


def _hold(model: nn.Module, checkpoint: Checkpoint) -> tuple[Mapping[str, TensorEntry], str | None, list[str]]:
    """Let the model hold its matrices as the checkpoint does: the tensors that are loaded, a summary, problems."""
    if checkpoint.quantization is None:
        return checkpoint.tensors, None, []
    published, problems = plan_published(model, checkpoint)
    return published.checkpoint.tensors, published.summary, problems


def _method(quantization: Any) -> str:
    return str(quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization)


def _architecture(checkpoint: Checkpoint) -> str | None:
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _bytes_by(entries: list[TensorEntry], field: str) -> dict[str, int]:
    """Bytes of the tensors with the same dtype or shard, most first."""
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[dtype_name(entry.dtype) if field == "dtype" else entry.shard] += entry.num_bytes
    return dict(sizes.most_common())


def _shape(name: str, key: str, checkpoint: Checkpoint, config: ModelConfig | None) -> int | None:
    value = dataclasses.asdict(config)[name] if config else checkpoint.config.get(key)
    return value if type(value) is int else None


def _large(entry: TensorEntry) -> LargeTensor:
    return LargeTensor(quoted(entry.name)[1:-1], dtype_name(entry.dtype), entry.shape, entry.num_bytes)


def _problems(problems: tuple[str, ...]) -> list[str]:
    """A line each."""
    return ["problems:", *(f"  - {problem}" for problem in problems)] if problems else ["problems: none"]


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _size(num_bytes: int) -> str:
    """Three digits or so, in powers of 1000."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
