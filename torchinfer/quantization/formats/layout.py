"""What a format says: for each layer a recipe, and for a recipe and a shape a layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from torchinfer.quantization.formats.unpack import scale_rows
from torchinfer.quantization.scheme import MAX_INT8_COLUMNS, Scheme
from torchinfer.quantization.source import Shape, Source

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SCALAR: tuple[Shape, ...] = ((), (1,), (1, 1))
Shapes = Callable[[int], tuple[Shape, ...]]
Check = Callable[[Tensor], str | None]  # what is wrong with a tensor


class Recipe(Protocol):
    """How a layer is held: plain data, so that those of merged layers can be compared."""

    def problems(self, part_rows: Sequence[int], columns: int) -> list[str]:
        """Why a matrix of this shape cannot be read."""

    def layout(self, part_rows: Sequence[int], columns: int) -> tuple[Scheme, tuple[Source, ...]]:
        """The scheme of a matrix that parts with these rows were merged into, and where its tensors come from."""


@dataclass(frozen=True, slots=True)
class Format:
    """A quantization_config that was understood."""

    method: str
    recipe: Callable[[str], Recipe | None]  # of a layer of the checkpoint; None: it is not quantized
    skipped: tuple[str, ...] = ()  # suffixes of tensors beside a layer's that say nothing new
    checks: Mapping[str, Check] = field(default_factory=dict)  # suffix -> of tensors that must change nothing
    skipped_names: str | None = None  # pattern of whole names
    notes: tuple[str, ...] = ()  # what is computed otherwise than the checkpoint's tools do


def named(scheme: Scheme) -> Scheme:
    """With a name for logs: int4_g128_zero."""
    name = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}[scheme.values]
    if scheme.activations != "none":
        name += "_w4a8" if scheme.values == torch.uint8 else "_w8a8"
    name += "_static" if scheme.has_input_scale else ""
    if scheme.row_block > 1:
        name += f"_b{scheme.row_block}x{scheme.column_block}"
    elif scheme.column_block is not None:
        name += f"_g{scheme.column_block}"
    name += "_zero" if scheme.has_zero else ""
    name += "_order" if scheme.has_group_index else ""
    return replace(scheme, name=name)


def column_problems(columns: int, multiple: int, what: str) -> list[str]:
    """Why this many inputs do not fit."""
    if columns % multiple == 0:
        return []
    return [f"{columns} inputs are not a multiple of {multiple}, {what}: take an unquantized copy of the checkpoint"]


def int8_problems(columns: int) -> list[str]:
    """Why int8 inputs would overflow."""
    if columns <= MAX_INT8_COLUMNS:
        return []
    return [f"{columns} inputs may overflow int32, which holds {MAX_INT8_COLUMNS}: take an unquantized copy"]


def scale_source(suffix: str, shapes: Shapes, row_block: int = 1) -> Source:
    """Scales for each row, from one for all, one for each, or one for `row_block` of them."""
    return Source(suffix, "scale", FLOATS, shapes, partial(scale_rows, row_block=row_block))


def input_scale_source(suffix: str) -> Source:
    """The scale of all inputs of a layer."""
    return Source(suffix, "input_scale", FLOATS, lambda rows: SCALAR, lambda scale, shape: scale.float().reshape(shape))


def own_row_block(part_rows: Sequence[int], row_block: int) -> int:
    """1 where parts that were merged do not begin with a block: then each row gets its scale. No more than rows."""
    return 1 if any(rows % row_block for rows in part_rows[:-1]) else min(row_block, max(part_rows))


def is_listed(layer: str, names: Sequence[str]) -> bool:
    """Whether a list names the layer, a module that it is in, or the end of its name."""
    return any(f".{name}." in f".{layer}." for name in names)


def all_zeros(tensor: Tensor) -> str | None:
    """A check: tools write zeros for a bias that the model does not have."""
    largest = float(tensor.float().abs().max()) if tensor.numel() else 0.0
    return None if largest == 0 else f"has values up to {largest}, but the model has no such tensor: it must be zeros"
