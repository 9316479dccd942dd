"""What `matmul_kernel` reads of a matrix, and which quantized matrices it takes.

Numbers of 4 bits lie as a checkpoint has them, two inputs that are neighbours in a byte, or packed: in units of 16
inputs for each product of a step, so that the inputs of a product lie side by side, 16 at a time (`packed_weight.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, has_dtype

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

ACTIVATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
NIBBLE_ROWS = torch.bfloat16  # holds the integers of int8, and 4 bits become bfloat16 in few instructions
LEAST_GROUP = 32  # inputs that share a scale, of which a step takes at least so many
RUN = 16  # inputs of a packed matrix that are multiplied together and lie side by side: 32 bytes of bfloat16


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [O, I], or those of experts [E, O, I], quantized or not."""

    values: Tensor  # uint8: two numbers of 4 bits
    scale: Tensor | None = None  # float32 [.., S, G]
    zero: Tensor | None = None  # [.., O, G]
    row_block: int = 1  # outputs that share a scale
    group: int = 0  # inputs that share a scale; 0: all
    activations: str = "none"
    input_scale: Tensor | None = None  # float32 [1], or [E, 1]: in place of one a row
    is_packed: bool = False

    @property
    def is_nibbles(self) -> bool:
        """Whether a byte holds two numbers."""
        return self.values.dtype == torch.uint8

    @property
    def parts(self) -> int:
        """Products of a step: those of 4 bits are read as words of 32, unless a group is too small."""
        if not self.is_nibbles:
            return 1
        return 4 if self.values.shape[-1] % 4 == 0 and (not self.group or self.group >= 64) else 2

    @property
    def shape(self) -> tuple[int, ...]:
        """[O, I], or [E, O, I]."""
        return *self.values.shape[:-1], self.num_inputs

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.scale, self.zero) if t is not None)

    def numel(self) -> int:
        """Numbers that the matrix stands for."""
        return math.prod(self.shape)

    @property
    def num_inputs(self) -> int:
        """I."""
        return self.values.shape[-1] * (2 if self.is_nibbles else 1)

    @property
    def rounded(self) -> torch.dtype:
        """Of rows that are rounded to 8 bits, as they are multiplied."""
        return NIBBLE_ROWS if self.is_nibbles else ACTIVATIONS[self.activations]

    @property
    def input_group(self) -> int:
        """Inputs of a row that are rounded by a scale of their own; 0: all of them."""
        return self.group if self.activations == "fp8" and self.input_scale is None else 0

    def row_scale_shape(self, num_rows: int) -> tuple[int, ...]:
        """Of the scales of rows in 8 bits: [N], or where they are rounded in groups [G, N]."""
        return (-(-self.num_inputs // self.input_group), num_rows) if self.input_group else (num_rows,)

    @property
    def format(self) -> str:
        """int8, float8_e4m3fn-g128, int4-g128-zero, int8-rows: numbers, groups, zeros, rows that are rounded, too."""
        name = "int4" if self.is_nibbles else str(self.values.dtype).removeprefix("torch.")
        name += f"-g{self.group}" if self.group else ""
        return name + ("-zero" if self.zero is not None else "") + ("-rows" if self.activations != "none" else "")


def as_matrix(weight: QuantizedWeight | Matrix) -> Matrix:
    """A quantized matrix for `multiply`."""
    if isinstance(weight, Matrix):
        return weight
    group = 0 if weight.scale.shape[-1] == 1 else weight.column_block
    zero = None if weight.zero is None else weight.zero.contiguous()
    scale, row_block = weight.scale.contiguous(), weight.row_block
    return Matrix(weight.values, scale, zero, row_block, group, weight.activations, weight.input_scale)


def is_supported(x: Tensor, weight: QuantizedWeight | Matrix) -> bool:
    """Whether the kernel multiplies such rows and such a matrix; the rest is the reference's."""
    return x.dtype in DTYPES and x.numel() > 0 and (isinstance(weight, Matrix) or has_tiles(weight))


def has_tiles(weight: QuantizedWeight) -> bool:
    """Whether the kernel has tiles for such a matrix. For groups of inputs that are no power of two it has none."""
    group = weight.column_block
    is_whole = weight.scale.shape[-1] == 1
    is_known = weight.group_index is None
    is_known = is_known and (weight.values.dtype == torch.uint8 or has_dtype(weight.values.dtype, weight.values.device))
    is_known = is_known and (is_whole or (group >= LEAST_GROUP and group & (group - 1) == 0))
    if weight.activations == "none":
        return is_known
    if weight.values.dtype == torch.uint8:
        return is_known and weight.activations == "int8"
    is_known = is_known and weight.zero is None and weight.values.dtype == ACTIVATIONS[weight.activations]
    return is_known and (weight.activations == "fp8" or (is_whole and weight.row_block == 1))
