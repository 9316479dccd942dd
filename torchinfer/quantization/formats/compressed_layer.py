"""What compressed-tensors says of a group of layers, and where their tensors come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchinfer.quantization.formats.layout import (
    SCALAR,
    column_problems,
    input_scale_source,
    int8_problems,
    named,
    own_row_block,
    scale_source,
)
from torchinfer.quantization.formats.unpack import group_index, to_int8, to_nibbles, unpack_words
from torchinfer.quantization.scheme import Scheme
from torchinfer.quantization.source import Shape, Source


@dataclass(frozen=True, slots=True)
class CompressedLayer:
    """A recipe."""

    bits: int
    is_float: bool
    is_packed: bool
    strategy: str  # what shares a scale: tensor, channel, group, block
    size: tuple[int, int] | None  # outputs and inputs that do, in groups and blocks
    has_zero: bool
    has_order: bool
    activations: str  # none, int8, fp8
    is_static: bool

    def problems(self, part_rows: Sequence[int], columns: int) -> list[str]:
        """Whole words and groups only."""
        words = 32 // self.bits
        found = column_problems(columns, words, "the numbers that share an int32") if self.is_packed else []
        if self.bits == 4 and not self.is_packed:
            found += column_problems(columns, 2, "the numbers that share a byte here")
        if self.strategy == "group" and self.size is not None:
            found += column_problems(columns, self.size[1], "the group size")
        return found + (int8_problems(columns) if self.activations == "int8" and self.size is None else [])

    def layout(self, part_rows: Sequence[int], columns: int) -> tuple[Scheme, tuple[Source, ...]]:
        """Two to five tensors."""
        rows_of_scale = own_row_block(part_rows, self.size[0]) if self.size else 1
        scheme = Scheme(
            name="compressed-tensors",
            values=torch.float8_e4m3fn if self.is_float else torch.int8 if self.bits == 8 else torch.uint8,
            row_block=rows_of_scale,
            column_block=self.size[1] if self.size else None,
            activations=self.activations,
            has_zero=self.has_zero,
            has_group_index=self.has_order,
            has_input_scale=self.is_static,
        )
        return named(scheme), tuple(self._sources(scheme, columns))

    def _sources(self, scheme: Scheme, columns: int) -> Iterator[Source]:
        words, groups = 32 // self.bits, -(-columns // (scheme.column_block or columns))
        if not self.is_packed and self.bits == 4:
            yield Source(".weight", "values", (torch.int8,), partial(_shape, columns=columns), to_nibbles)
        elif not self.is_packed:
            yield Source(".weight", "values", (scheme.values,))
        elif self.bits == 4:
            yield Source(".weight_packed", "values", (torch.int32,), view=torch.uint8)
        else:
            packed = partial(_shape, columns=columns // words)
            yield Source(".weight_packed", "values", (torch.int32,), packed, _packed_bytes)
        block_rows = self.size[0] if self.size else 1
        repeats = block_rows if scheme.row_block == 1 else 1
        scales = partial(_scale_shapes, strategy=self.strategy, block_rows=block_rows, groups=groups)
        yield scale_source(".weight_scale", scales, repeats)
        if self.has_zero:
            zeros = partial(_zero_shapes, scales=scales, words=words, groups=groups)
            convert = partial(_zeros, bits=self.bits)
            yield Source(".weight_zero_point", "zero", (torch.int32, torch.int8), zeros, convert)
        if self.has_order:
            index = partial(group_index, group=columns // groups)
            yield Source(".weight_g_idx", "group_index", (torch.int32,), lambda rows: ((columns,),), index)
        if self.is_static:
            yield input_scale_source(".input_scale")


def _shape(rows: int, columns: int) -> tuple[Shape, ...]:
    return ((rows, columns),)


def _scale_shapes(rows: int, strategy: str, block_rows: int, groups: int) -> tuple[Shape, ...]:
    if strategy == "tensor":
        return SCALAR
    return ((rows, 1), (rows,)) if strategy == "channel" else ((-(-rows // block_rows), groups),)


def _zero_shapes(rows: int, scales: partial[tuple[Shape, ...]], words: int, groups: int) -> tuple[Shape, ...]:
    """Packed, or one for each scale."""
    return ((-(-rows // words), groups), *scales(rows))


def _packed_bytes(packed: Tensor, shape: Shape) -> Tensor:
    return to_int8(packed.contiguous().view(torch.uint8)).reshape(shape)


def _zeros(zero: Tensor, shape: Shape, bits: int) -> Tensor:
    """int32, packed along outputs, or int8, numbers around 0 -> uint8 from 0 to 15, or int8."""
    if zero.dtype == torch.int32:
        numbers = unpack_words(zero.T, bits).T[: shape[0]]
        return numbers if bits == 4 else to_int8(numbers.contiguous())
    numbers = zero.reshape(1, 1).expand(shape) if zero.numel() == 1 else zero.reshape(-1, shape[1])
    return (numbers + 8).to(torch.uint8) if bits == 4 else numbers
