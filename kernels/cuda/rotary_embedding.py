"""Rotary position embedding in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, require, with_dense_columns
from torchinfer.kernels.reference.rotary_embedding import rotary_embedding as reference

BLOCK = 1024  # numbers of a program


def rotary_embedding(
    x: Tensor,  # [T, heads, D]
    cos: Tensor,  # [T, F] float32
    sin: Tensor,  # [T, F] float32
    is_interleaved: bool,
) -> Tensor:
    """See the door."""
    if x.dtype not in DTYPES or not x.numel() or not cos.numel():
        return reference(x, cos, sin, is_interleaved)
    x, cos, sin = with_dense_columns(x), cos.contiguous(), sin.contiguous()
    require_angles(x, cos, sin)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_tokens, num_heads, size = x.shape
    block_size = triton.next_power_of_2(size)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, BLOCK // block_size))
    rotary_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
        x,
        cos,
        sin,
        result,
        num_heads,
        x.stride(0),
        x.stride(1),
        cos.shape[1],
        size,
        IS_INTERLEAVED=is_interleaved,
        BLOCK_HEADS=block_heads,
        BLOCK_SIZE=block_size,
    )
    return result


def require_angles(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse heads and angles that do not fit together."""
    is_fit = x.ndim == 3 and cos.ndim == 2 and cos.shape == sin.shape and len(cos) == len(x)
    is_fit = is_fit and 2 * cos.shape[1] <= x.shape[2] and cos.dtype == sin.dtype == torch.float32
    is_fit = is_fit and x.device == cos.device == sin.device
    require(is_fit, "rotary_embedding takes x [T, heads, D], cos and sin float32 [T, F]", x, cos, sin)


@triton.jit
def rotary_kernel(
    x: tl.tensor,  # [T, heads, D]
    cos: tl.tensor,  # [T, F]
    sin: tl.tensor,  # [T, F]
    result: tl.tensor,  # [T, heads, D]
    num_heads: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    num_angles: tl.tensor,
    size: tl.tensor,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """A program rotates BLOCK_HEADS heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_SIZE)
    is_there = (head < num_heads)[:, None] & (column < size)[None, :]
    rows = x + token * stride_token + head[:, None] * stride_head
    angles = token * num_angles
    rotated = rotate(rows, is_there, column, cos + angles, sin + angles, num_angles, IS_INTERLEAVED)
    place = result + (token * num_heads + head[:, None]) * size + column[None, :]
    tl.store(place, rotated.to(result.dtype.element_ty), mask=is_there)


@triton.jit
def rotate(
    rows: tl.tensor,  # [heads, 1]: where the heads of a token begin
    is_there: tl.tensor,  # [heads, D]
    column: tl.tensor,  # [D]
    cos: tl.tensor,  # [F], the token's
    sin: tl.tensor,  # [F]
    num_angles: tl.tensor,
    IS_INTERLEAVED: tl.constexpr,
) -> tl.tensor:  # [heads, D] float32
    """Rotated heads, zeros where nothing is. A pair's other number is a second read, from the cache."""
    is_rotated = column < 2 * num_angles
    if IS_INTERLEAVED:
        is_first = column % 2 == 0
        partner, angle = column ^ 1, column // 2
    else:
        is_first = column < num_angles
        partner, angle = tl.where(is_first, column + num_angles, column - num_angles), column % num_angles
    # Numbers that pass through are rotated by nothing.
    cosine = tl.load(cos + angle, mask=is_rotated, other=1.0)
    sine = tl.load(sin + angle, mask=is_rotated, other=0.0)
    sine = tl.where(is_first, -sine, sine)
    own = tl.load(rows + column[None, :], mask=is_there, other=0.0).to(tl.float32)
    other = tl.load(rows + partner[None, :], mask=is_there & is_rotated[None, :], other=0.0).to(tl.float32)
    return own * cosine[None, :] + other * sine[None, :]
