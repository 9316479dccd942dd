"""Attention over the paged cache in plain PyTorch, and the truth for its ports.

Rows that decode are computed together, rows with a chunk of their prompt one after the other. A cache may hold
anything, NaN too, in slots that no live position owns: such slots are never read.

Letters: T tokens, B rows that decode, H query heads, K key-value heads, G = H / K, L context, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from torchinfer.batch import Batch

# Positions whose keys and values are copied together at once; a bound on memory, not on the context.
MAX_GATHERED = 65536


def paged_attention(
    query: Tensor,  # [T, H, D]
    kv_cache: Tensor,  # [2, P, page_size, K, D]
    batch: Batch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See the door."""
    num_decodes, max_length, chunks = _host_facts(batch)
    if num_decodes == 1:
        # Alone, a row that decodes is a chunk of one token: its pages are cut exactly, nothing has to be masked.
        num_decodes, chunks = 0, ((0, 0, 1, max_length), *chunks)
    result = torch.empty_like(query)
    num_at_once = max(1, MAX_GATHERED // max(max_length, 1))
    for start in range(0, num_decodes, num_at_once):
        rows = slice(start, min(start + num_at_once, num_decodes))
        tables = (batch.page_table[rows], batch.kv_length[rows])
        result[rows] = _attend_decodes(query[rows], kv_cache, *tables, max_length, scale, window, soft_cap)
    for row, start, end, length in chunks:
        pages = batch.page_table[row, : -(-length // batch.page_size)]
        context = kv_cache.index_select(1, pages).flatten(1, 2)[:, :length]
        result[start:end] = _attend_chunk(query[start:end], context, scale, window, soft_cap)
    result[max(num_decodes, chunks[-1][2] if chunks else 0) :] = 0  # padded tokens
    return result


def _host_facts(batch: Batch) -> tuple[int, int, tuple[tuple[int, int, int, int], ...]]:
    """(number of decode rows, their longest context, prefills); asks the device when the batch does not say."""
    if batch.num_decodes is not None and batch.max_decode_kv_length is not None and batch.prefills is not None:
        return batch.num_decodes, batch.max_decode_kv_length, batch.prefills
    starts, lengths = batch.query_start.tolist(), batch.kv_length.tolist()
    rows = zip(range(len(lengths)), starts, starts[1:], lengths, strict=False)
    return 0, 0, tuple(row for row in rows if row[2] > row[1] and row[3] > 0)


def _attend_decodes(
    query: Tensor,  # [B, H, D]
    kv_cache: Tensor,  # [2, P, page_size, K, D]
    page_table: Tensor,  # [B, max_pages] int32
    kv_length: Tensor,  # [B] int32
    max_length: int,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:  # [B, H, D]
    """One token each, at the end of its context. The G heads that share a key act as G queries of one head."""
    num_rows, num_heads, head_dim = query.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    position = torch.arange(max_length, dtype=torch.int32, device=query.device)
    last = kv_length[:, None] - 1
    # A position past the end reads the last one's slot: finite, and masked below.
    clamped = torch.minimum(position, last)
    page = page_table.gather(1, (clamped // page_size).long())
    slot = page * page_size + clamped % page_size
    context = kv_cache.view(2, -1, num_kv_heads * head_dim).index_select(1, slot.flatten())
    key, value = context.view(2, num_rows, max_length, num_kv_heads, head_dim).transpose(2, 3)  # [B, K, L, D] each
    mask = position <= last
    if window is not None:
        mask &= position > last - window
    grouped = query.view(num_rows, num_kv_heads, -1, head_dim)
    result = _attend(grouped, key, value, mask[:, None, None], scale, soft_cap)
    return result.reshape(num_rows, num_heads, head_dim)


def _attend_chunk(
    query: Tensor,  # [N, H, D]
    context: Tensor,  # [2, L, K, D]
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:  # [N, H, D]
    """Tokens of one row, the end of its context."""
    num_tokens, num_heads, head_dim = query.shape
    if window is not None:
        context = context[:, max(0, context.shape[1] - num_tokens - window + 1) :]
    length, num_kv_heads = context.shape[1:3]
    key, value = context.transpose(1, 2)[:, :, None]  # [K, 1, L, D] each: the G heads of a key share it
    if num_tokens == 1:
        grouped = query.view(num_kv_heads, 1, -1, head_dim)  # the G heads act as G queries
        return _attend(grouped, key, value, None, scale, soft_cap).view(num_tokens, num_heads, head_dim)
    mask = torch.ones(num_tokens, length, dtype=torch.bool, device=query.device).tril(length - num_tokens)
    if window is not None:
        mask = mask.triu(length - num_tokens - window + 1)
    group = num_heads // num_kv_heads
    grouped = query.view(num_tokens, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [K, G, N, D]
    shape = (num_kv_heads, group, length, head_dim)
    result = _attend(grouped, key.expand(shape), value.expand(shape), mask, scale, soft_cap)
    return result.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _attend(
    query: Tensor,  # [A, B, N, D]
    key: Tensor,  # [A, B, L, D]
    value: Tensor,  # [A, B, L, D]
    mask: Tensor | None,  # bool, broadcast to [A, B, N, L]; None: all is visible
    scale: float,
    soft_cap: float | None,
) -> Tensor:  # [A, B, N, D]
    """Scores, soft cap, mask, softmax in float32, weighted values."""
    if soft_cap is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return torch.matmul(weights, value.float()).to(query.dtype)
