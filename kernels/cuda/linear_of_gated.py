"""Products of gated activations in 8 bits in Triton: a row is read once, computed and rounded in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.gated_activation import gated, gated_activation
from torchinfer.kernels.cuda.launch import with_dense_columns
from torchinfer.kernels.cuda.matmul import multiply_rows
from torchinfer.kernels.cuda.matrix import Matrix, as_matrix, is_supported
from torchinfer.kernels.cuda.quantize_rows import store_rounded
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

MOST = 32768  # numbers of a row that a program holds in registers


def linear_of_gated(
    gate_up: Tensor,  # [N, 2 * F]
    activation: str,
    weight: QuantizedWeight | Matrix,  # [O, F]
) -> Tensor:  # [N, O]
    """See the door: the bits of `quantized_matmul` of `gated_activation`."""
    num_rows, size = len(gate_up), gate_up.shape[1] // 2
    is_fused = is_supported(gate_up, weight) and gate_up.shape[1] % 2 == 0 and size <= MOST
    if not is_fused or weight.activations == "none" or weight.input_scale is not None:
        return quantized_matmul(gated_activation(gate_up, activation), weight)
    rows = with_dense_columns(gate_up)
    matrix = as_matrix(weight)
    numbers = torch.empty(num_rows, size, dtype=matrix.rounded, device=gate_up.device)
    scale = torch.empty(matrix.row_scale_shape(num_rows), device=gate_up.device)
    block = triton.next_power_of_2(size)
    gate_and_round_kernel[(num_rows,)](
        rows,
        numbers,
        scale,
        size,
        rows.stride(0),
        ACTIVATION=activation,
        GROUP=matrix.input_group,
        BLOCK_SIZE=block,
        num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
    )
    return multiply_rows(numbers, scale, matrix, None, gate_up.dtype)


@triton.jit
def gate_and_round_kernel(
    gate_up: tl.tensor,  # [N, 2 * F]
    numbers: tl.tensor,  # [N, F] int8, e4m3, or bfloat16: integers of int8; written
    scale: tl.tensor,  # [N] or [groups, N], written
    size: tl.tensor,
    stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """A program computes a row and rounds it. Numbers are rounded to the dtype of the row on the way, as one by one."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    is_there = column < size
    place = gate_up + row * stride + column
    gate = tl.load(place, mask=is_there, other=0.0)
    up = tl.load(place + size, mask=is_there, other=0.0)
    product = gated(gate, up, ACTIVATION, gate_up.dtype.element_ty)
    product = product.to(gate_up.dtype.element_ty).to(tl.float32)
    store_rounded(product, numbers, scale, row, column, size, False, GROUP)
