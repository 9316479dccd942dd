"""Products of normalized rows in 8 bits in Triton: a row is read once, normalized and rounded in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, require, with_dense_columns
from torchinfer.kernels.cuda.matmul import multiply_rows
from torchinfer.kernels.cuda.matrix import Matrix, as_matrix, is_supported
from torchinfer.kernels.cuda.quantize_rows import store_rounded
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul
from torchinfer.kernels.cuda.rms_norm import BLOCK, NUM_WARPS, normalize, rms_norm

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def linear_of_norm(
    x: Tensor,  # [N, I]
    norm_weight: Tensor,  # [I]
    epsilon: float,
    offset: float,
    weight: QuantizedWeight | Matrix,  # [O, I]
) -> Tensor:  # [N, O]
    """See the door. Squares are added in the order that suits the kernel: the last bit of a norm may differ."""
    is_fused = x.ndim == 2 and x.dtype in DTYPES and norm_weight.dtype == x.dtype and is_supported(x, weight)
    if not is_fused or weight.activations == "none" or weight.input_scale is not None:
        return quantized_matmul(rms_norm(x, norm_weight, epsilon, offset), weight)
    require(norm_weight.shape == x.shape[-1:], "linear_of_norm takes a norm's weight [I]", x, norm_weight)
    rows = with_dense_columns(x)
    matrix = as_matrix(weight)
    numbers = torch.empty(x.shape, dtype=matrix.rounded, device=x.device)
    scale = torch.empty(matrix.row_scale_shape(len(x)), device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    norm_and_round_kernel[(len(x),)](
        rows,
        norm_weight.contiguous(),
        numbers,
        scale,
        x.shape[1],
        rows.stride(0),
        epsilon,
        offset,
        HAS_OFFSET=offset != 0,
        GROUP=matrix.input_group,
        BLOCK_SIZE=block,
        num_warps=NUM_WARPS.get(max(block, BLOCK), 16),
    )
    return multiply_rows(numbers, scale, matrix, None, x.dtype)


@triton.jit
def norm_and_round_kernel(
    x: tl.tensor,  # [N, I]
    weight: tl.tensor,  # [I]
    numbers: tl.tensor,  # [N, I] int8, e4m3, or bfloat16: integers of int8; written
    scale: tl.tensor,  # [N] or [groups, N], written
    size: tl.tensor,
    stride: tl.tensor,
    epsilon: tl.tensor,
    offset: tl.tensor,
    HAS_OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """A program normalizes a row and rounds it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    is_there = column < size
    own = tl.load(x + row * stride + column, mask=is_there, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=is_there, other=0.0).to(tl.float32)
    normalized = normalize(own, factor, size, epsilon, offset, HAS_OFFSET, x.dtype.element_ty).to(tl.float32)
    store_rounded(normalized, numbers, scale, row, column, size, False, GROUP)
