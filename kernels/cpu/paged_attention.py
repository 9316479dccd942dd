"""Attention over the paged cache in the CPU library, one call for all rows of a step."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import CACHE_DTYPES, DTYPES, check, loaded, require, with_dense_rows
from torchinfer.kernels.reference.paged_attention import paged_attention as reference

if TYPE_CHECKING:
    from torchinfer.batch import Batch, KVCache

MOST_HEADS, MOST_HEAD_SIZE = 4096, 1024  # api.cpp takes no more


class AttentionStruct(ctypes.Structure):
    """Attention of src/isa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "result", "cache", "scale")),
        *((name, ctypes.c_void_p) for name in ("query_start", "kv_length", "page_table")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "heads", "kv_heads", "head_size")),
        *((name, ctypes.c_int64) for name in ("stride", "pages", "page_size", "table_width", "window")),
        *((name, ctypes.c_float) for name in ("score_scale", "soft_cap")),
        *((name, ctypes.c_int32) for name in ("dtype", "cache_dtype")),
    )


def paged_attention(
    query: Tensor,  # [T, H, D]
    kv_cache: KVCache,
    batch: Batch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See the door.

    Raises:
        ValueError: tensors do not fit together, or a row's context is not in its pages, or a page not in the cache.
    """
    data = kv_cache.data
    if query.dtype not in DTYPES or data.dtype not in CACHE_DTYPES or query.shape[-1] > MOST_HEAD_SIZE:
        return reference(query, kv_cache, batch, scale, window, soft_cap)
    query = with_dense_rows(query)
    _require_fit(query, kv_cache, batch)
    rule = "a window is at least 1, and a soft cap above 0"
    require((window is None or window > 0) and (soft_cap is None or soft_cap > 0), rule)
    result = torch.empty(query.shape, dtype=query.dtype)
    num_tokens, num_heads, head_size = query.shape
    _, num_pages, page_size, num_kv_heads, _ = data.shape
    task = AttentionStruct(
        query.data_ptr(),
        result.data_ptr(),
        data.data_ptr(),
        None if kv_cache.scale is None else kv_cache.scale.data_ptr(),
        batch.query_start.data_ptr(),
        batch.kv_length.data_ptr(),
        batch.page_table.data_ptr(),
        num_tokens,
        len(batch.kv_length),
        num_heads,
        num_kv_heads,
        head_size,
        query.stride(0),
        num_pages,
        page_size,
        batch.page_table.shape[1],
        window or 0,
        scale,
        soft_cap or 0.0,
        DTYPES[query.dtype],
        CACHE_DTYPES[data.dtype],
    )
    check(loaded().torchinfer_cpu_attention(ctypes.byref(task)))
    return result


def _require_fit(query: Tensor, kv_cache: KVCache, batch: Batch) -> None:
    data = kv_cache.data
    is_fit = query.ndim == 3 and query.is_cpu and data.ndim == 5 and data.shape[0] == 2
    is_fit = is_fit and data.shape[4] == query.shape[2] and data.shape[2] == batch.page_size
    require(is_fit, "paged_attention takes query [T, H, D] and a cache [2, P, page_size, K, D]", query, data)
    require_cache(kv_cache)
    require_batch(batch)


def require_batch(batch: Batch) -> None:
    """Refuse rows that the library could not read."""
    starts, lengths, table = batch.query_start, batch.kv_length, batch.page_table
    is_fit = starts.ndim == lengths.ndim == 1 and table.ndim == 2 and len(lengths) + 1 == len(starts)
    is_fit = is_fit and len(table) == len(lengths) and starts.dtype == lengths.dtype == table.dtype == torch.int32
    is_fit = is_fit and starts.is_contiguous() and lengths.is_contiguous() and table.is_contiguous()
    rule = "a batch has query_start [R + 1], kv_length [R] and page_table [R, W], contiguous int32"
    require(is_fit and starts.is_cpu and lengths.is_cpu and table.is_cpu, rule, starts, lengths, table)


def require_cache(kv_cache: KVCache) -> None:
    """Refuse what the library could not read as a cache."""
    data, scale = kv_cache.data, kv_cache.scale
    require(data.is_contiguous() and data.is_cpu, "a cache is contiguous", data)
    if scale is not None:
        is_fit = scale.shape == data.shape[:-1] and scale.dtype == torch.float32 and scale.is_contiguous()
        require(is_fit and scale.is_cpu, "scales are [2, P, page_size, K], contiguous float32", data, scale)
