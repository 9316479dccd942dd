"""Attention over the paged cache in Triton: launches that depend on shapes, and on what the host knows of a step.

What the host knows makes a launch smaller and changes no bit, so that a launch without it can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from torchinfer.kernels.cuda.attention_kernel import (
    LEAST_SPAN,
    LOG2_E,
    MOST_SPANS,
    chunk_kernel,
    decode_kernel,
    merge_kernel,
)
from torchinfer.kernels.cuda.launch import DTYPES, TRITON_DTYPES, has_dtype, require, with_dense_columns
from torchinfer.kernels.cuda.write_kv_pages import require_cache
from torchinfer.kernels.reference.paged_attention import paged_attention as reference

if TYPE_CHECKING:
    from torchinfer.batch import Batch, KVCache

MOST_HEAD_SIZE = 256  # beyond it a tile of keys and one of queries do not fit into the shared memory


@dataclass(frozen=True, slots=True)
class Launch:
    """What the host knows of a step, or must assume: bounds of the two launches."""

    num_rows: int  # rows that may have one token
    max_length: int  # of their contexts
    has_chunks: bool  # whether a row may have several tokens
    is_covered: bool  # whether each token belongs to a row


def paged_attention(
    query: Tensor,  # [T, H, D]
    kv_cache: KVCache,
    batch: Batch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See the door. Lengths and pages are not checked: that would ask the device.

    Raises:
        ValueError: tensors do not fit together.
    """
    data = kv_cache.data
    is_known = query.dtype in DTYPES and has_dtype(data.dtype, data.device) and query.shape[-1] <= MOST_HEAD_SIZE
    if not is_known or not query.numel():
        return reference(query, kv_cache, batch, scale, window, soft_cap)
    query = with_dense_columns(query)
    _require_fit(query, kv_cache, batch)
    require((window is None or window > 0) and (soft_cap is None or soft_cap > 0), "window and soft cap are above 0")
    launch = bounds(batch, len(query))
    new = torch.empty if launch.is_covered else torch.zeros
    result = new(query.shape, dtype=query.dtype, device=query.device)
    factor = scale * LOG2_E.value
    numbers: dict[str, Any] = {
        "score_scale": factor if soft_cap is None else 2 * factor / soft_cap,
        "soft_cap": 0.0 if soft_cap is None else soft_cap * LOG2_E.value,
        "window": window or 0,
        "HAS_CAP": soft_cap is not None,
        "HAS_WINDOW": window is not None,
    }
    if launch.num_rows and launch.max_length:
        _decode(query, kv_cache, batch, launch, result, numbers)
    if launch.has_chunks:
        _attend_to_chunks(query, kv_cache, batch, result, numbers)
    return result


def bounds(batch: Batch, num_tokens: int) -> Launch:
    """From the host's facts if it has them, else from shapes."""
    if batch.num_decodes is None or batch.max_decode_kv_length is None or batch.prefills is None:
        return Launch(len(batch.kv_length), batch.page_table.shape[1] * batch.page_size, num_tokens > 1, False)
    num_rows, max_length, end = batch.num_decodes, batch.max_decode_kv_length, batch.num_decodes
    for row, start, end, length in batch.prefills:
        if end - start == 1:  # the end of a prompt
            num_rows, max_length = row + 1, max(max_length, length)
    has_chunks = any(end - start > 1 for _, start, end, _ in batch.prefills)
    return Launch(num_rows, max_length, has_chunks, end == num_tokens)


def _decode(
    query: Tensor, kv_cache: KVCache, batch: Batch, launch: Launch, result: Tensor, numbers: dict[str, Any]
) -> None:
    """Rows of one token: their spans, then the spans together."""
    _, num_heads, size = query.shape
    num_kv_heads = kv_cache.data.shape[3]
    block_heads = min(num_heads // num_kv_heads, 64)
    block_rows = max(16, triton.next_power_of_2(block_heads))
    tiles = {"BLOCK_SIZE": max(32, triton.next_power_of_2(size)), "BLOCK_KEYS": _block_keys(query, size)}
    seen = min(launch.max_length, numbers["window"] + tiles["BLOCK_KEYS"] if numbers["window"] else launch.max_length)
    num_spans = min(-(-seen // LEAST_SPAN.value), MOST_SPANS.value)
    partial = query.new_empty((launch.num_rows, num_heads, num_spans, size), dtype=torch.float32)
    statistics = query.new_empty((launch.num_rows, num_heads, num_spans, 2), dtype=torch.float32)
    grid = num_kv_heads * triton.cdiv(num_heads // num_kv_heads, block_heads), launch.num_rows, num_spans
    decode_kernel[grid](
        query,
        **_cache_and_rows(kv_cache, batch),
        partial=partial,
        statistics=statistics,
        stride_token=query.stride(0),
        stride_head=query.stride(1),
        num_spans=num_spans,
        HEADS=num_heads,
        BLOCK_HEADS=block_heads,
        BLOCK_ROWS=block_rows,
        **tiles,
        **numbers,
        **_dots(query.dtype, kv_cache.data.dtype),
        IS_PAIRED=kv_cache.scale is not None and query.dtype != torch.float32 and size % 2 == 0,
        num_warps=2 if block_rows == 16 else 4,
        num_stages=5 if kv_cache.data.itemsize < 4 else 3,
    )
    merged = {"HEADS": num_heads, "SIZE": size, "HAS_WINDOW": numbers["HAS_WINDOW"], "window": numbers["window"]}
    rows = {"query_start": batch.query_start, "kv_length": batch.kv_length}
    merge_kernel[(launch.num_rows, num_heads)](
        partial, statistics, result=result, num_spans=num_spans, **rows, **merged, **tiles
    )


def _attend_to_chunks(query: Tensor, kv_cache: KVCache, batch: Batch, result: Tensor, numbers: dict[str, Any]) -> None:
    """Rows of several tokens, each in blocks of them."""
    num_tokens, num_heads, size = query.shape
    num_rows, num_kv_heads = len(batch.kv_length), kv_cache.data.shape[3]
    block_rows = 2 * _block_keys(query, size)
    block_heads = min(num_heads // num_kv_heads, block_rows)
    block_tokens = block_rows // block_heads
    num_parts = num_kv_heads * triton.cdiv(num_heads // num_kv_heads, block_heads)
    chunk_kernel[(num_parts * (num_tokens // block_tokens + num_rows),)](
        query,
        **_cache_and_rows(kv_cache, batch),
        attended=result,
        num_rows=num_rows,
        stride_token=query.stride(0),
        stride_head=query.stride(1),
        HEADS=num_heads,
        BLOCK_TOKENS=block_tokens,
        BLOCK_HEADS=block_heads,
        BLOCK_ROWS=block_rows,
        BLOCK_SIZE=max(32, triton.next_power_of_2(size)),
        BLOCK_KEYS=_block_keys(query, size),
        **numbers,
        **_dots(query.dtype, kv_cache.data.dtype),
        num_warps=8,
        num_stages=1 if query.dtype == torch.float32 else 2,
    )


def _block_keys(query: Tensor, size: int) -> int:
    """Keys of a step. In float32 a product of tiles is three, and a tile takes twice the shared memory."""
    return (64 if size <= 128 else 32) // (2 if query.dtype == torch.float32 else 1)


def _cache_and_rows(kv_cache: KVCache, batch: Batch) -> dict[str, Any]:
    """Arguments that both launches have."""
    _, num_pages, page_size, num_kv_heads, size = kv_cache.data.shape
    return {
        "data": kv_cache.data,
        "scales": kv_cache.scale,
        "page_table": batch.page_table,
        "query_start": batch.query_start,
        "kv_length": batch.kv_length,
        "num_slots": num_pages * page_size,
        "table_width": batch.page_table.shape[1],
        "KV_HEADS": num_kv_heads,
        "SIZE": size,
        "PAGE_SIZE": page_size,
        "HAS_SCALE": kv_cache.scale is not None,
    }


def _dots(query: torch.dtype, cache: torch.dtype) -> dict[str, Any]:
    """What is multiplied as what. 8 bits are exact in any; probabilities times scales may be too small for float16."""
    is_plain = cache in DTYPES
    key = value = torch.promote_types(query, cache) if is_plain else query
    if not is_plain and query == torch.float16:
        value = torch.bfloat16
    return {"KEY": TRITON_DTYPES[key], "VALUE": TRITON_DTYPES[value]}


def _require_fit(query: Tensor, kv_cache: KVCache, batch: Batch) -> None:
    data = kv_cache.data
    is_fit = query.ndim == 3 and data.ndim == 5 and data.shape[0] == 2 and query.device == data.device
    is_fit = is_fit and data.shape[4] == query.shape[2] and data.shape[2] == batch.page_size
    is_fit = is_fit and query.shape[1] % data.shape[3] == 0
    require(is_fit, "paged_attention takes query [T, H, D] and a cache [2, P, page_size, K, D]", query, data)
    require_cache(kv_cache)
    starts, lengths, table = batch.query_start, batch.kv_length, batch.page_table
    is_fit = starts.ndim == lengths.ndim == 1 and table.ndim == 2 and len(lengths) + 1 == len(starts)
    is_fit = is_fit and len(table) == len(lengths) and starts.dtype == lengths.dtype == table.dtype == torch.int32
    is_fit = is_fit and starts.is_contiguous() and lengths.is_contiguous() and table.is_contiguous()
    rule = "a batch has query_start [R + 1], kv_length [R] and page_table [R, W], contiguous int32"
    require(is_fit, rule, starts, lengths, table)
