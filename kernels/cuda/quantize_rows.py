"""Rows of numbers in 8 bits, each or each group of it by its own largest number, to the bits of the reference.

The rounding is spelled out in float32, so that neither the card's conversion nor the interpreter's decides it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.divide import divide
from torchinfer.kernels.cuda.launch import with_dense_columns

LEAST_SCALE: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).tiny)


def quantize_rows(
    rows: Tensor,  # [N, D]
    dtype: torch.dtype,  # int8 or float8_e4m3fn; bfloat16: the integers of int8
    scale: Tensor | None = None,  # float32 [N] or [1]: in place of the rows' own
    group: int = 0,  # numbers that have a scale of their own, a power of two; 0: all of a row. Not with `scale`
) -> tuple[Tensor, Tensor]:  # [N, D] of dtype, [N] or [ceil(D / group), N] float32
    """Round to nearest, ties to even; numbers beyond a given scale are cut off."""
    rows = with_dense_columns(rows)
    num_rows, size = rows.shape
    numbers = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    given = scale
    if given is None:
        shape = (triton.cdiv(size, group), num_rows) if group else (num_rows,)
        scale = torch.empty(shape, device=rows.device)
    else:
        scale = given.expand(num_rows).contiguous()
    if num_rows:
        quantize_rows_kernel[(num_rows,)](
            rows,
            numbers,
            scale,
            size,
            rows.stride(0),
            HAS_SCALE=given is not None,
            GROUP=group,
            BLOCK=triton.next_power_of_2(size),
            num_warps=4 if size <= 4096 else 8,
        )
    return numbers, scale


@triton.jit
def quantize_rows_kernel(
    rows: tl.tensor,  # [N, D]
    numbers: tl.tensor,  # [N, D] int8, e4m3, or bfloat16: integers of int8
    scale: tl.tensor,  # [N] or [groups, N], read where HAS_SCALE, else written
    size: tl.tensor,
    stride: tl.tensor,
    HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program rounds a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(rows + row * stride + column, mask=column < size, other=0.0).to(tl.float32)
    store_rounded(x, numbers, scale, row, column, size, HAS_SCALE, GROUP)


@triton.jit
def store_rounded(
    x: tl.tensor,  # [1, D] float32, zeros past the end
    numbers: tl.tensor,  # [N, D] int8, e4m3, or bfloat16: integers of int8; its row written
    scale: tl.tensor,  # [N] or [groups, N], the row's read where HAS_SCALE, else written
    row: tl.tensor,  # N is the number of programs
    column: tl.tensor,  # [1, D]
    size: tl.tensor,
    HAS_SCALE: tl.constexpr,
    GROUP: tl.constexpr,  # numbers that have a scale of their own; 0: all of a row
) -> None:
    """Round a row and write it."""
    NUM_GROUPS: tl.constexpr = x.shape[1] // GROUP if GROUP > 0 else 1
    groups = tl.reshape(x, (NUM_GROUPS, x.shape[1] // NUM_GROUPS))
    group = tl.arange(0, NUM_GROUPS)
    place = scale + group * tl.num_programs(0) + row
    if HAS_SCALE:
        group_scale = tl.load(place)
    else:
        group_scale = scale_of(groups, numbers.dtype.element_ty)
        tl.store(place, group_scale, mask=group * groups.shape[1] < size)
    rounded = tl.reshape(to_8_bits(groups, group_scale, numbers.dtype.element_ty), x.shape)
    tl.store(numbers + row * size + column, rounded, mask=column < size)


@triton.jit
def scale_of(
    rows: tl.tensor,  # [R, D] float32
    DTYPE: tl.constexpr,
) -> tl.tensor:  # [R] float32
    """The scale by which a row's largest number becomes the largest of DTYPE; NaN for a row that has one."""
    largest = 448.0 if DTYPE == tl.float8e4nv else 127.0
    scale = tl.maximum(divide(tl.max(tl.abs(rows), 1), largest), LEAST_SCALE)
    is_broken = tl.max((rows != rows).to(tl.int32), 1) > 0
    return tl.where(is_broken, float("nan"), scale)


@triton.jit
def to_8_bits(
    rows: tl.tensor,  # [R, D] float32
    scale: tl.tensor,  # [R] float32
    DTYPE: tl.constexpr,
) -> tl.tensor:  # [R, D] of DTYPE
    """rows / scale, cut off at the ends and rounded to nearest, ties to even; in bfloat16 the integers of int8."""
    x = divide(rows, scale[:, None])
    if DTYPE != tl.float8e4nv:
        bounded = tl.minimum(tl.maximum(x, -128.0), 127.0)
        steps = 12582912.0  # 1.5 * 2^23, next to which float32 has whole numbers only
        rounded = (bounded + steps) - steps
    else:
        bounded = tl.minimum(tl.maximum(x, -448.0), 448.0)
        power = (bounded.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        # 1.5 * 2^20 times the number's power of two leaves three bits behind the first; below 2^-6 steps are 2^-9.
        steps = tl.maximum(power, 0.015625) * 1572864.0
        bits = ((bounded + steps) - steps).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        rounded = (bits | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)  # zeros have signs
    return rounded.to(DTYPE)
