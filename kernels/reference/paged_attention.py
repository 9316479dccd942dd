"""Attention over the paged cache in plain PyTorch, and the truth for its ports.

Rows that decode are computed together, rows with a chunk of their prompt one after the other. A cache may hold
anything, NaN too, in slots that no live position owns: such slots are never read.

Scales of a quantized cache never meet keys and values: a key's scale multiplies its scores, a value's its
probabilities, which are fewer by the head size.

Letters: T tokens, B rows that decode, H query heads, K key-value heads, G = H / K, L context, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from torchinfer.batch import Batch, KVCache

# Positions whose keys and values are copied together at once; a bound on memory, not on the context.
MAX_GATHERED = 65536
# Scores that are there at once where they are computed by hand, from a quantized cache: 128 MiB.
MAX_SCORES = 2**25
Chunks = tuple[tuple[int, int, int, int], ...]  # (row, first token, end token, context up to the last one)


def paged_attention(
    query: Tensor,  # [T, H, D]
    kv_cache: KVCache,
    batch: Batch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See the door."""
    num_decodes, max_length, chunks = _host_facts(batch)
    result = torch.empty_like(query)
    num_at_once = max(1, MAX_GATHERED // max(max_length, 1))
    for start in range(0, num_decodes, num_at_once):
        rows = slice(start, min(start + num_at_once, num_decodes))
        tables = (batch.page_table[rows], batch.kv_length[rows])
        result[rows] = _attend_decodes(query[rows], kv_cache, *tables, max_length, scale, window, soft_cap)
    for row, start, end, length in chunks if kv_cache.scale is None else _cut(chunks, query.shape[1]):
        pages = batch.page_table[row, : -(-length // batch.page_size)]
        context = _in_pages(kv_cache.data, pages, length)
        scales = None if kv_cache.scale is None else _in_pages(kv_cache.scale, pages, length)
        result[start:end] = _attend_chunk(query[start:end], context, scales, scale, window, soft_cap)
    result[max(num_decodes, chunks[-1][2] if chunks else 0) :] = 0  # padded tokens
    return result


def _host_facts(batch: Batch) -> tuple[int, int, Chunks]:
    """(number of decode rows, their longest context, prefills); asks the device when the batch does not say."""
    if batch.num_decodes is not None and batch.max_decode_kv_length is not None and batch.prefills is not None:
        return batch.num_decodes, batch.max_decode_kv_length, batch.prefills
    starts, lengths = batch.query_start.tolist(), batch.kv_length.tolist()
    rows = zip(range(len(lengths)), starts, starts[1:], lengths, strict=False)
    return 0, 0, tuple(row for row in rows if row[2] > row[1] and row[3] > 0)


def _cut(chunks: Chunks, num_heads: int) -> Iterator[tuple[int, int, int, int]]:
    """The chunks in pieces with at most MAX_SCORES scores; a token does not see what comes after it anyway."""
    for row, start, end, length in chunks:
        size = max(1, MAX_SCORES // (num_heads * length))
        for first in range(start, end, size):
            last = min(first + size, end)
            yield row, first, last, length - (end - last)


def _in_pages(stored: Tensor, pages: Tensor, length: int) -> Tensor:
    """[2, P, page_size, ...] -> the first `length` positions of some pages, [2, length, ...]."""
    return stored.index_select(1, pages).flatten(1, 2)[:, :length]


def _attend_decodes(
    query: Tensor,  # [B, H, D]
    kv_cache: KVCache,
    page_table: Tensor,  # [B, max_pages] int32
    kv_length: Tensor,  # [B] int32
    max_length: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:  # [B, H, D]
    """One token each, at the end of its context. The G heads that share a key act as G queries of one head."""
    num_rows, num_heads, head_dim = query.shape
    page_size, num_kv_heads = kv_cache.data.shape[2:4]
    position = torch.arange(max_length, dtype=torch.int32, device=query.device)
    last = kv_length[:, None] - 1
    # A position past the end reads the last one's slot: finite, and masked below.
    clamped = torch.minimum(position, last)
    page = page_table.gather(1, (clamped // page_size).long())
    slot = (page * page_size + clamped % page_size).flatten()
    context = kv_cache.data.view(2, -1, num_kv_heads * head_dim).index_select(1, slot)
    context = context.view(2, num_rows, max_length, num_kv_heads, head_dim).transpose(2, 3)  # [2, B, K, L, D]
    scales = None
    if kv_cache.scale is not None:
        scales = kv_cache.scale.view(2, -1, num_kv_heads).index_select(1, slot)
        scales = scales.view(2, num_rows, max_length, num_kv_heads).transpose(2, 3)  # [2, B, K, L]
    mask = position <= last
    if window is not None:
        mask &= position > last - window
    grouped = query.view(num_rows, num_kv_heads, -1, head_dim)
    result = _attend(grouped, context, scales, mask[:, None, None], scale, soft_cap)
    return result.reshape(num_rows, num_heads, head_dim)


def _attend_chunk(
    query: Tensor,  # [N, H, D]
    context: Tensor,  # [2, L, K, D]
    scales: Tensor | None,  # [2, L, K]
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:  # [N, H, D]
    """Tokens of one row, the end of its context."""
    num_tokens, num_heads, head_dim = query.shape
    if window is not None:
        first = max(0, context.shape[1] - num_tokens - window + 1)
        context, scales = context[:, first:], None if scales is None else scales[:, first:]
    length, num_kv_heads = context.shape[1:3]
    context = context.transpose(1, 2)[:, :, None]  # [2, K, 1, L, D]: the G heads of a key share it
    if scales is not None:
        scales = scales.transpose(1, 2)[:, :, None]
    if num_tokens == 1:
        grouped = query.view(num_kv_heads, 1, -1, head_dim)  # the G heads act as G queries
        return _attend(grouped, context, scales, None, scale, soft_cap).view(num_tokens, num_heads, head_dim)
    mask = torch.ones(num_tokens, length, dtype=torch.bool, device=query.device).tril(length - num_tokens)
    if window is not None:
        mask = mask.triu(length - num_tokens - window + 1)
    grouped = query.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [K, G, N, D]
    result = _attend(grouped, context, scales, mask, scale, soft_cap)
    return result.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _attend(
    query: Tensor,  # [A, B, N, D]
    context: Tensor,  # [2, A, B or 1, L, D]
    scales: Tensor | None,  # [2, A, B or 1, L]
    mask: Tensor | None,  # bool, broadcast to [A, B, N, L]; None: all is visible
    scale: float,
    soft_cap: float | None,
) -> Tensor:  # [A, B, N, D]
    """Scores, soft cap, mask, softmax in float32, weighted values."""
    if scales is None and soft_cap is None:
        if context.dtype != query.dtype:
            dtype = torch.promote_types(query.dtype, context.dtype)  # holds the values of both
            query, context = query.to(dtype), context.to(dtype)
        key, value = context
        if key.shape[1] != query.shape[1]:
            shape = (*query.shape[:2], *key.shape[2:])
            key, value = key.expand(shape), value.expand(shape)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # Contiguous at once: matmul would copy it a second time.
    key, value = context.to(torch.float32, memory_format=torch.contiguous_format)
    scores = _times(query.float(), key.transpose(-1, -2))
    if scales is not None:
        scores *= scales[0, :, :, None]
    scores *= scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if scales is not None:
        weights *= scales[1, :, :, None]
    return _times(weights, value)


def _times(x: Tensor, shared: Tensor) -> Tensor:
    """[A, B, N, I] times [A, B or 1, I, J]; what B queries share is not copied for each."""
    if shared.shape[1] == x.shape[1]:
        return torch.matmul(x, shared)
    return torch.matmul(x.flatten(1, 2), shared[:, 0]).view(*x.shape[:3], -1)
