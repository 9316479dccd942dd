"""Attention over the paged cache with shapes that depend on the bucket only: every token is a row of its own.

Each token reads max_pages * page_size positions, so this is the formulation for correctness on XLA, and for decode
with short page tables. Letters as in the door; L = max_pages * page_size, G = H / K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchinfer.batch import Batch, KVCache


def paged_attention(
    query: Tensor,  # [T, H, D]
    kv_cache: KVCache,
    batch: Batch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See the door. A padded token is at position 0: it sees one slot of its row's first page."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.data.shape[3]
    pages = batch.page_table[batch.row].flatten()  # [T * max_pages]
    shape = (2, num_tokens, -1, num_kv_heads)
    context = _gather(kv_cache.data, pages).view(*shape, head_dim).float()  # [2, T, L, K, D]
    mask = _visible(batch.positions, context.shape[2], window)  # [T, L]
    # Zero, not only masked: zero times NaN is NaN, and slots past the context may hold it.
    key, value = torch.where(mask[None, :, :, None, None], context, 0)
    grouped = query.float().view(num_tokens, num_kv_heads, -1, head_dim)
    scores = torch.einsum("tkgd,tlkd->tkgl", grouped, key)
    scales = None
    if kv_cache.scale is not None:
        scales = torch.where(mask[None, :, :, None], _gather(kv_cache.scale, pages).view(shape), 0)
        scales = scales.transpose(2, 3)[:, :, :, None]  # [2, T, K, 1, L]
        scores = scores * scales[0]
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    if scales is not None:
        weights = weights * scales[1]
    result = torch.einsum("tkgl,tlkd->tkgd", weights, value)
    return result.reshape(num_tokens, num_heads, head_dim).to(query.dtype)


def _gather(stored: Tensor, pages: Tensor) -> Tensor:
    """[2, P, ...] -> [2 * pages, ...], rows of one dimension: along the second one XLA would transpose the cache.

    torch_xla 2.9 dies in index_select with an int32 index that is a view; brackets have no float8 on the CPU.
    """
    index = torch.cat((pages, pages + stored.shape[1])).long()
    return stored.flatten(0, 1).index_select(0, index)


def _visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """[T] int32 -> [T, length] bool: which positions of its context each token sees."""
    other = torch.arange(length, dtype=positions.dtype, device=positions.device)
    mask = other <= positions[:, None]
    if window is not None:
        mask = mask & (other > positions[:, None] - window)
    return mask
