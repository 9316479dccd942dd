"""Root mean square normalization in Triton: one read and one write of each number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, require, with_dense_columns
from torchinfer.kernels.reference.rms_norm import rms_norm as reference

BLOCK = 1024  # numbers of a program, where rows are short
NUM_WARPS = {1024: 4, 2048: 4, 4096: 8, 8192: 8}  # by the size of a block; 16 for longer rows


def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    epsilon: float,
    offset: float,
) -> Tensor:
    """See the door."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype or not x.numel():
        return reference(x, weight, epsilon, offset)
    require(weight.shape == x.shape[-1:] and weight.device == x.device, "rms_norm takes weight [D]", x, weight)
    rows = with_dense_columns(x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1]))
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_outer, num_inner, size = rows.shape
    block_size = triton.next_power_of_2(size)
    block_rows = max(1, BLOCK // block_size)
    rms_norm_kernel[(triton.cdiv(num_outer * num_inner, block_rows),)](
        rows,
        weight.contiguous(),
        result,
        num_outer * num_inner,
        num_inner,
        rows.stride(0),
        rows.stride(1),
        size,
        epsilon,
        offset,
        HAS_OFFSET=offset != 0,
        BLOCK_ROWS=block_rows,
        BLOCK_SIZE=block_size,
        num_warps=NUM_WARPS.get(max(block_size, BLOCK), 16),
    )
    return result


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x: tl.tensor,  # rows of `size` numbers, `num_inner` of them every `stride_outer`
    weight: tl.tensor,  # [D]
    result: tl.tensor,  # [rows, D]
    num_rows: tl.tensor,
    num_inner: tl.tensor,
    stride_outer: tl.tensor,
    stride_inner: tl.tensor,
    size: tl.tensor,
    epsilon: tl.tensor,
    offset: tl.tensor,
    HAS_OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """A program normalizes BLOCK_ROWS rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    column = tl.arange(0, BLOCK_SIZE)
    is_there = (row < num_rows)[:, None] & (column < size)[None, :]
    start = (row // num_inner) * stride_outer + (row % num_inner) * stride_inner
    numbers = tl.load(x + start[:, None] + column[None, :], mask=is_there, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)[None, :]
    product = normalize(numbers, factor, size, epsilon, offset, HAS_OFFSET, result.dtype.element_ty)
    tl.store(result + row[:, None] * size + column[None, :], product, mask=is_there)


@triton.jit
def normalize(
    numbers: tl.tensor,  # [R, D] float32, zeros past the end
    factor: tl.tensor,  # [1, D] float32
    size: tl.tensor,
    epsilon: tl.tensor,
    offset: tl.tensor,
    HAS_OFFSET: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:  # [R, D] of DTYPE
    """Rows over their root mean square, times the factor."""
    square = tl.sum(numbers * numbers, 1) / size
    normalized = numbers * tl.rsqrt(square + epsilon)[:, None]
    if HAS_OFFSET:
        product = normalized * (factor + offset)
    else:
        product = normalized.to(DTYPE).to(tl.float32) * factor
    return product.to(DTYPE)
