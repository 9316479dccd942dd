"""Schemes: how a matrix is held in fewer bits. One dataclass for them all; what they mean is QuantizedWeight's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from torchinfer import kernels
from torchinfer.quantized_weight import QuantizedWeight

# Sums of products of int8 beyond it may overflow int32; weights that come quantized reach -128.
MAX_INT8_COLUMNS = (2**31 - 1) // 128**2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a quantized matrix: one row of it belongs to `row_block` rows of the matrix, or to a merged part."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    row_block: int | None = 1  # None: a row for each of the parts that were merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How the matrices of some layers are held, and what their inputs are rounded to."""

    name: str
    values: torch.dtype  # int8, float8_e4m3fn, or uint8: two numbers of 4 bits
    row_block: int = 1  # outputs that share a scale
    column_block: int | None = None  # inputs that share a scale; None: all
    activations: str = "none"  # or int8, fp8: each token by a scale of its own, in e4m3 one for each column_block
    has_zero: bool = False
    has_group_index: bool = False
    has_input_scale: bool = False
    input_bound: float | None = None  # inputs beyond it are cut off before they are rounded

    def tensors(self, rows: int, columns: int, num_parts: int = 1) -> dict[str, TensorSpec]:
        """The tensors of a matrix [rows, columns] that `num_parts` matrices were merged into."""
        groups = -(-columns // (self.column_block or columns))
        width = columns // 2 if self.values == torch.uint8 else columns
        specs = {
            "values": TensorSpec((rows, width), self.values),
            "scale": TensorSpec((-(-rows // self.row_block), groups), torch.float32, self.row_block),
        }
        if self.has_zero:
            zero = torch.int8 if self.values == torch.int8 else torch.uint8
            specs["zero"] = TensorSpec((rows, groups), zero)
        if self.has_group_index:
            specs["group_index"] = TensorSpec((num_parts, columns), torch.int32, None)
        if self.has_input_scale:
            specs["input_scale"] = TensorSpec((num_parts,), torch.float32, None)
        return specs

    def num_bytes(self, rows: int, columns: int, num_parts: int = 1) -> int:
        """Bytes of a matrix."""
        specs = self.tensors(rows, columns, num_parts).values()
        return sum(prod(spec.shape) * spec.dtype.itemsize for spec in specs)

    def problems(self, part_rows: Sequence[int], columns: int) -> list[str]:
        """Why a matrix, merged from parts with these rows, cannot be held so."""
        found = []
        if self.values == torch.uint8 and self.column_block is not None and columns % self.column_block:
            fitting = [str(size) for size in (64, 32) if columns % size == 0]
            way_out = f"int4_g{' or int4_g'.join(fitting)}" if fitting else "int8"
            found.append(f"{columns} inputs are not a multiple of the group size {self.column_block}: use {way_out}")
        elif self.values == torch.uint8 and columns % 2:
            found.append(f"{columns} inputs are an odd number, but two share a byte: use int8")
        if self.row_block > 1 and any(rows % self.row_block for rows in part_rows[:-1]):
            found.append(
                f"parts of {', '.join(map(str, part_rows))} outputs are merged, and {self.row_block} outputs share a "
                "scale: all but the last must be multiples of it; use fp8"
            )
        if self.activations == "int8" and min(columns, self.column_block or columns) > MAX_INT8_COLUMNS:
            found.append(f"{columns} inputs may overflow int32, which holds {MAX_INT8_COLUMNS} of them: use int8")
        return found

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, Tensor]:
        """New tensors for a matrix, on a device."""
        specs = self.tensors(rows, columns).items()
        return {name: torch.empty(spec.shape, dtype=spec.dtype, device=device) for name, spec in specs}

    def pack(self, weight: Tensor, into: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """Quantize rows of a matrix, float [R, I] with R a multiple of row_block (but for the last rows of all).

        Rows of different scales do not influence each other, so it does not matter which rows come together. Writes
        to `into`, the tensors that `tensors` describes, or to new ones; returns them.
        """
        assert not (self.has_zero or self.has_group_index or self.has_input_scale), f"{self.name} is only read"
        if into is None:
            into = self.empty(len(weight), weight.shape[1], weight.device)
        column_block = self.column_block or weight.shape[1]
        kernels.quantize_matrix(weight, into["values"], into["scale"], self.row_block, column_block)
        return into

    def weight(self, tensors: dict[str, Tensor | None], columns: int, part_rows: tuple[int, ...]) -> QuantizedWeight:
        """The matrix whose tensors these are, as kernels take it."""
        values, scale = tensors["values"], tensors["scale"]
        assert values is not None and scale is not None
        return QuantizedWeight(
            values,
            scale,
            self.row_block,
            self.column_block or columns,
            self.activations,
            tensors.get("zero"),
            tensors.get("group_index"),
            tensors.get("input_scale"),
            part_rows,
        )


def _int4(name: str, group: int, activations: str = "none") -> Scheme:
    return Scheme(name=name, values=torch.uint8, column_block=group, activations=activations)


def _fp8_block(name: str, activations: str = "none") -> Scheme:
    return Scheme(name=name, values=torch.float8_e4m3fn, row_block=128, column_block=128, activations=activations)


# Name -> scheme, of those that a checkpoint can be quantized to while it is loaded.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(name="int8", values=torch.int8),
        Scheme(name="int8_w8a8", values=torch.int8, activations="int8"),
        Scheme(name="fp8", values=torch.float8_e4m3fn),
        Scheme(name="fp8_w8a8", values=torch.float8_e4m3fn, activations="fp8"),
        _fp8_block("fp8_block"),
        _fp8_block("fp8_block_w8a8", "fp8"),
        _int4("int4", 128),
        _int4("int4_g64", 64),
        _int4("int4_g32", 32),
        _int4("int4_w4a8", 128, "int8"),
    )
}
