"""Tokens drawn by inversion of the cumulative distribution in vocabulary order, which filters leave in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.reference.greedy import greedy

if TYPE_CHECKING:
    from torchinfer.batch import SamplingTensors


def sample(logits: Tensor, params: SamplingTensors, any_filter: bool) -> Tensor:
    """See the door."""
    is_greedy = params.temperature == 0
    scaled = logits / torch.where(is_greedy, 1.0, params.temperature)[:, None]
    if any_filter:
        scaled = scaled.masked_fill(scaled < filter_threshold(scaled, params)[:, None], -torch.inf)
    cumulative = torch.softmax(scaled, -1).cumsum(-1)
    target = params.uniform * cumulative[:, -1]
    index = (cumulative <= target[:, None]).sum(-1).int()
    # Rounding can put the target onto the total; no token is beyond it then. Of NaN and infinity there is no total.
    is_outside = (index >= logits.shape[-1]) | ~torch.isfinite(target)
    return torch.where(is_greedy | is_outside, greedy(logits), index)


def filter_threshold(logits: Tensor, params: SamplingTensors) -> Tensor:
    """The smallest logit [R] that top_k, then top_p among those, then min_p keep; ties with it are kept.

    logits: [R, V] float32, temperature applied. Source: arXiv 1904.09751 (top-p), 2407.01082 (min-p).
    """
    size = logits.shape[-1]
    top = logits.sort(-1, descending=True).values
    rank = torch.arange(size, device=logits.device)
    limit = torch.where(params.top_k == 0, size, params.top_k.clamp(max=size))
    probability = torch.softmax(top.masked_fill(rank >= limit[:, None], -torch.inf), -1)
    before = probability.cumsum(-1) - probability
    # top_p = 1 keeps all: the sum before a token can round up to 1.
    is_kept = (before < params.top_p[:, None]) | (params.top_p >= 1)[:, None]
    last = torch.minimum(is_kept.sum(-1), limit).clamp(min=1) - 1
    threshold = top.gather(-1, last.long()[:, None])[:, 0]
    return torch.maximum(threshold, top[:, 0] + torch.log(params.min_p))
