"""The launch of `matmul_kernel`: which matrices it takes, and the sizes of its tiles.

The tiles are a plain rule, made from what the compiler says of registers and shared memory on Hopper and not yet from a
run on a card: few rows take tiles of all rows and few outputs, so that many programs read the matrix at once; many rows
take square ones. What no tile fits (groups of inputs that are no power of two) stays with the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, has_dtype, require, with_dense_columns
from torchinfer.kernels.cuda.matmul_kernel import matmul_kernel
from torchinfer.kernels.cuda.quantize_rows import quantize_rows

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

ACTIVATIONS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
NUM_PROCESSORS = 132  # of an H100 or H200; other cards take the same tiles
LEAST_GROUP = 32  # inputs that share a scale, of which a step takes at least so many


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of a program's block, its warps, and the steps that are loaded ahead."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


def is_supported(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the kernel multiplies such a matrix; the rest is the reference's."""
    group = weight.column_block
    is_whole = weight.scale.shape[-1] == 1
    is_known = x.dtype in DTYPES and weight.group_index is None and x.numel() > 0
    is_known = is_known and (weight.values.dtype == torch.uint8 or has_dtype(weight.values.dtype, x.device))
    is_known = is_known and (is_whole or (group >= LEAST_GROUP and group & (group - 1) == 0))
    if weight.activations == "none":
        return is_known
    is_known = is_known and is_whole and weight.zero is None and weight.row_block == 1
    return is_known and weight.values.dtype == ACTIVATIONS[weight.activations]


def choose_tiles(num_rows: int, num_outputs: int, num_groups: int, element_bytes: int, group: int) -> Tiles:
    """num_rows: of a group; element_bytes: of what is multiplied; group: inputs that share a scale, 0 for all."""
    rows = min(max(triton.next_power_of_2(num_rows), 16), 128)
    if rows == 128:
        inputs = min(128 // element_bytes, group or 128)
        return Tiles(128, 128, inputs, 8, 3)
    outputs = 64 if triton.cdiv(num_outputs, 64) * num_groups >= 2 * NUM_PROCESSORS else 32
    return Tiles(rows, outputs, min(128, group or 128), 4, 4)


def multiply(
    x: Tensor,  # [N, I]
    weight: Tensor | QuantizedWeight,  # [O, I] or [E, O, I]
    group_sizes: Tensor | None,  # int32 [E]
    input_scale: Tensor | None = None,  # float32, [1] or [N]: given beforehand, where inputs are rounded
) -> Tensor:
    """x's rows times the transposed matrix, or each times its group's: [N, O] in x's dtype.

    Raises:
        ValueError: tensors do not fit together.
    """
    is_plain = isinstance(weight, Tensor)
    values = weight if is_plain else weight.values
    is_nibbles = values.dtype == torch.uint8
    num_outputs, num_inputs = values.shape[-2], values.shape[-1] * (2 if is_nibbles else 1)
    is_fit = x.ndim == 2 and x.shape[1] == num_inputs and x.device == values.device and values.is_contiguous()
    is_fit = is_fit and values.ndim == (2 if group_sizes is None else 3)
    require(
        is_fit, f"a product takes x [N, {num_inputs}] and a contiguous matrix [O, I], or groups' [E, O, I]", x, values
    )
    result = torch.empty(len(x), num_outputs, dtype=x.dtype, device=x.device)
    row_scale = None
    if not is_plain and weight.activations != "none":
        x, row_scale = quantize_rows(x, ACTIVATIONS[weight.activations], input_scale)
    if is_nibbles:
        x = x.unflatten(1, (-1, 2)).transpose(1, 2).reshape(len(x), -1)  # even inputs, then odd ones
    x = with_dense_columns(x)
    scale = None if is_plain else weight.scale.contiguous()
    zero = None if is_plain or weight.zero is None else weight.zero.contiguous()
    num_columns = 1 if scale is None else scale.shape[-1]
    group = 0 if is_plain or num_columns == 1 else weight.column_block
    num_groups = 0 if group_sizes is None else len(group_sizes)
    tiles = choose_tiles(triton.cdiv(len(x), num_groups or 1), num_outputs, num_groups or 1, x.element_size(), group)
    num_row_blocks = len(x) // tiles.rows + min(num_groups + 1, len(x))
    matmul_kernel[(num_row_blocks * triton.cdiv(num_outputs, tiles.outputs),)](
        x,
        values,
        scale,
        zero,
        row_scale,
        group_sizes,
        result,
        len(x),
        num_outputs,
        num_inputs,
        1 if scale is None else scale.shape[-2],
        num_columns,
        num_row_blocks,
        x.stride(0),
        ROW_BLOCK=1 if is_plain else weight.row_block,
        COLUMN_BLOCK=group,
        NUM_GROUPS=num_groups,
        BLOCK_GROUPS=triton.next_power_of_2(num_groups + 1),
        BLOCK_ROWS=tiles.rows,
        BLOCK_OUTPUTS=tiles.outputs,
        BLOCK_INPUTS=tiles.inputs,
        HAS_SCALE=scale is not None,
        HAS_ZERO=zero is not None,
        HAS_ROW_SCALE=row_scale is not None,
        IS_NIBBLES=is_nibbles,
        IS_EVEN=num_inputs % tiles.inputs == 0,
        SUM=tl.int32 if x.dtype == torch.int8 else tl.float32,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return result
