"""Keys and values into the paged cache, quantized on the way, in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, has_dtype, require, with_dense_columns
from torchinfer.kernels.cuda.quantize_rows import scale_of, to_8_bits
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages as reference

if TYPE_CHECKING:
    from torchinfer.batch import KVCache

BLOCK = 2048  # numbers of a program


def write_kv_pages(
    key: Tensor,  # [T, K, D]
    value: Tensor,  # [T, K, D]
    kv_cache: KVCache,  # written in place
    slot: Tensor,  # [T] int32
) -> None:
    """See the door. A slot outside of the cache is not written.

    Raises:
        ValueError: tensors do not fit together.
    """
    data, scale = kv_cache.data, kv_cache.scale
    if key.dtype not in DTYPES or not has_dtype(data.dtype, data.device):
        reference(key, value, kv_cache, slot)
        return
    key, value, slot = with_dense_columns(key), with_dense_columns(value), slot.contiguous()
    require_rows(key, value, kv_cache, slot)
    num_tokens, num_heads, size = key.shape
    block_size = triton.next_power_of_2(size)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, BLOCK // block_size))
    if num_tokens:
        write_kernel[(num_tokens, 2, triton.cdiv(num_heads, block_heads))](
            key,
            value,
            data,
            scale,
            slot,
            num_heads,
            data.shape[1] * data.shape[2],
            *key.stride()[:2],
            *value.stride()[:2],
            size,
            HAS_SCALE=scale is not None,
            BLOCK_HEADS=block_heads,
            BLOCK_SIZE=block_size,
        )


def require_rows(key: Tensor, value: Tensor, kv_cache: KVCache, slot: Tensor) -> None:
    """Refuse keys and values that do not fit together, or into the cache."""
    data = kv_cache.data
    is_fit = key.ndim == 3 and key.shape == value.shape and key.dtype == value.dtype and data.ndim == 5
    is_fit = is_fit and data.shape[0] == 2 and key.shape[1:] == data.shape[3:] and key.device == data.device
    require(is_fit, "write_kv_pages takes key and value [T, K, D], a cache [2, P, page_size, K, D]", key, value, data)
    require(slot.shape == key.shape[:1] and slot.dtype == torch.int32, "slot is int32 [T]", slot, key)
    require_cache(kv_cache)


def require_cache(kv_cache: KVCache) -> None:
    """Refuse what kernels could not read as a cache."""
    data, scale = kv_cache.data, kv_cache.scale
    require(data.is_contiguous(), "a cache is contiguous", data)
    is_8_bits = data.dtype in (torch.int8, torch.float8_e4m3fn)
    require(is_8_bits == (scale is not None), "a cache in 8 bits has scales, and no other has", data)
    if scale is not None:
        is_fit = scale.shape == data.shape[:-1] and scale.dtype == torch.float32 and scale.is_contiguous()
        require(is_fit, "scales are [2, P, page_size, K], contiguous float32", data, scale)


@triton.jit(do_not_specialize_on_alignment=["slot"])
def write_kernel(
    key: tl.tensor,  # [T, K, D]
    value: tl.tensor,  # [T, K, D]
    data: tl.tensor,  # [2, slots, K, D]
    scale: tl.tensor,  # [2, slots, K]
    slot: tl.tensor,  # [T]
    num_heads: tl.tensor,
    num_slots: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_head: tl.tensor,
    size: tl.tensor,
    HAS_SCALE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """A program writes BLOCK_HEADS heads of a token's key, or of its value."""
    token, half = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_SIZE)[None, :]
    is_there = (head < num_heads)[:, None] & (column < size)
    if half == 0:
        place = key + token * key_stride_token + head[:, None] * key_stride_head
        rows = tl.load(place + column, mask=is_there, other=0.0).to(tl.float32)
    else:
        place = value + token * value_stride_token + head[:, None] * value_stride_head
        rows = tl.load(place + column, mask=is_there, other=0.0).to(tl.float32)
    own_slot = tl.load(slot + token).to(tl.int64)
    store_in_slot(rows, is_there, head, column, half, own_slot, data, scale, num_heads, num_slots, size, HAS_SCALE)


@triton.jit
def store_in_slot(
    rows: tl.tensor,  # [heads, D] float32, zeros where nothing is
    is_there: tl.tensor,  # [heads, D]
    head: tl.tensor,  # [heads]
    column: tl.tensor,  # [1, D]
    half: tl.tensor,  # 0: they are keys, 1: values
    slot: tl.tensor,  # int64, the token's; outside of the cache nothing is written
    data: tl.tensor,  # [2, slots, K, D]
    scale: tl.tensor,  # [2, slots, K]
    num_heads: tl.tensor,
    num_slots: tl.tensor,
    size: tl.tensor,
    HAS_SCALE: tl.constexpr,
) -> None:
    """Write a token's heads as the cache has them."""
    is_inside = (slot >= 0) & (slot < num_slots)
    target = (half * num_slots.to(tl.int64) + slot) * num_heads + head
    place = data + target[:, None] * size + column
    if HAS_SCALE:
        row_scale = scale_of(rows, data.dtype.element_ty)
        tl.store(scale + target, row_scale, mask=(head < num_heads) & is_inside)
        tl.store(place, to_8_bits(rows, row_scale, data.dtype.element_ty), mask=is_there & is_inside)
    else:
        tl.store(place, rows.to(data.dtype.element_ty), mask=is_there & is_inside)
