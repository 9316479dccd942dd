"""Attention over the paged cache with shapes that depend on the bucket only: every token is a row of its own.

Each token reads max_pages * page_size positions, so this is the formulation for correctness on XLA, and for decode
with short page tables. Letters as in the door; L = max_pages * page_size, G = H / K.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchinfer.batch import Batch


def paged_attention(
    query: Tensor,  # [T, H, D]
    kv_cache: Tensor,  # [2, P, page_size, K, D]
    batch: Batch,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See the door. A padded token is at position 0: it sees one slot of its row's first page."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.shape[3]
    # Indexed with brackets: torch_xla 2.9 dies in index_select with an int32 index that is a view.
    pages = batch.page_table[batch.row]  # [T, max_pages]
    context = kv_cache[:, pages.flatten()].view(2, num_tokens, -1, num_kv_heads, head_dim)
    mask = _visible(batch.positions, context.shape[2], window)  # [T, L]
    # Zero, not only masked: zero times NaN is NaN, and slots past the context may hold it.
    context = torch.where(mask[None, :, :, None, None], context, 0)
    key, value = context[0].float(), context[1].float()  # [T, L, K, D]
    grouped = query.float().view(num_tokens, num_kv_heads, -1, head_dim)
    scores = torch.einsum("tkgd,tlkd->tkgl", grouped, key) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    result = torch.einsum("tkgl,tlkd->tkgd", weights, value)
    return result.reshape(num_tokens, num_heads, head_dim).to(query.dtype)


def _visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """[T] int32 -> [T, length] bool: which positions of its context each token sees."""
    other = torch.arange(length, dtype=positions.dtype, device=positions.device)
    mask = other <= positions[:, None]
    if window is not None:
        mask = mask & (other > positions[:, None] - window)
    return mask
