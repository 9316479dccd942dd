"""Rotation of queries and keys, and keys and values into the paged cache, in one launch of Triton.

A rotated key goes from registers into its slot, and is never written anywhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, has_dtype, require, with_dense_columns
from torchinfer.kernels.cuda.rotary_embedding import BLOCK, require_angles, rotary_embedding, rotate
from torchinfer.kernels.cuda.write_kv_pages import require_rows, store_in_slot, write_kv_pages

if TYPE_CHECKING:
    from torchinfer.batch import KVCache


def rotate_and_write(
    query_key: Tensor,  # [T, H + K, D]
    value: Tensor,  # [T, K, D]
    cos: Tensor,  # [T, F] float32
    sin: Tensor,  # [T, F] float32
    is_interleaved: bool,
    kv_cache: KVCache,  # written in place
    slot: Tensor,  # [T] int32
) -> Tensor:  # [T, H, D]
    """See the door. A slot outside of the cache is not written.

    Raises:
        ValueError: tensors do not fit together.
    """
    data, scale = kv_cache.data, kv_cache.scale
    require(query_key.ndim == value.ndim == 3, "rotate_and_write takes [T, H + K, D] and [T, K, D]", query_key, value)
    num_kv_heads = value.shape[1]
    num_heads = query_key.shape[1] - num_kv_heads
    is_known = query_key.dtype in DTYPES and has_dtype(data.dtype, data.device)
    if not is_known or not query_key.numel() or not cos.numel():
        rotated = rotary_embedding(query_key, cos, sin, is_interleaved)
        write_kv_pages(rotated[:, num_heads:], value, kv_cache, slot)
        return rotated[:, :num_heads]
    query_key, value, slot = with_dense_columns(query_key), with_dense_columns(value), slot.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    require_angles(query_key, cos, sin)
    require_rows(query_key[:, num_heads:], value, kv_cache, slot)
    num_tokens, _, size = query_key.shape
    result = torch.empty(num_tokens, num_heads, size, dtype=query_key.dtype, device=query_key.device)
    block_size = triton.next_power_of_2(size)
    block_heads = min(triton.next_power_of_2(max(num_heads, num_kv_heads)), max(1, BLOCK // block_size))
    num_parts = triton.cdiv(num_heads, block_heads) + 2 * triton.cdiv(num_kv_heads, block_heads)
    rotate_and_write_kernel[(num_tokens, num_parts)](
        query_key,
        value,
        cos,
        sin,
        result,
        data,
        scale,
        slot,
        num_heads,
        num_kv_heads,
        data.shape[1] * data.shape[2],
        *query_key.stride()[:2],
        *value.stride()[:2],
        cos.shape[1],
        size,
        IS_INTERLEAVED=is_interleaved,
        HAS_SCALE=scale is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_SIZE=block_size,
    )
    return result


@triton.jit(do_not_specialize_on_alignment=["slot"])
def rotate_and_write_kernel(
    query_key: tl.tensor,  # [T, H + K, D]
    value: tl.tensor,  # [T, K, D]
    cos: tl.tensor,  # [T, F]
    sin: tl.tensor,  # [T, F]
    result: tl.tensor,  # [T, H, D], written
    data: tl.tensor,  # [2, slots, K, D]
    scale: tl.tensor,  # [2, slots, K]
    slot: tl.tensor,  # [T]
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    num_slots: tl.tensor,
    stride_token: tl.tensor,
    stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_head: tl.tensor,
    num_angles: tl.tensor,
    size: tl.tensor,
    IS_INTERLEAVED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """A program has BLOCK_HEADS heads of a token's query, of its key or of its value, in this order."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query_parts, key_parts = tl.cdiv(num_heads, BLOCK_HEADS), tl.cdiv(num_kv_heads, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_SIZE)
    cos, sin = cos + token * num_angles, sin + token * num_angles
    if part < query_parts:
        head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        is_there = (head < num_heads)[:, None] & (column < size)[None, :]
        rows = query_key + token * stride_token + head[:, None] * stride_head
        rotated = rotate(rows, is_there, column, cos, sin, num_angles, IS_INTERLEAVED)
        place = result + (token * num_heads + head[:, None]) * size + column[None, :]
        tl.store(place, rotated.to(result.dtype.element_ty), mask=is_there)
    else:
        half = (part - query_parts) // key_parts
        head = (part - query_parts) % key_parts * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        is_there = (head < num_kv_heads)[:, None] & (column < size)[None, :]
        if half == 0:
            rows = query_key + token * stride_token + (num_heads + head)[:, None] * stride_head
            rotated = rotate(rows, is_there, column, cos, sin, num_angles, IS_INTERLEAVED)
            numbers = rotated.to(query_key.dtype.element_ty).to(tl.float32)  # rounded as where it is a result
        else:
            rows = value + token * value_stride_token + head[:, None] * value_stride_head
            numbers = tl.load(rows + column[None, :], mask=is_there, other=0.0).to(tl.float32)
        own_slot = tl.load(slot + token).to(tl.int64)
        store_in_slot(
            numbers,
            is_there,
            head,
            column[None, :],
            half,
            own_slot,
            data,
            scale,
            num_kv_heads,
            num_slots,
            size,
            HAS_SCALE,
        )
