"""From logits to token ids: pure functions on tensors, the same on every device.

Randomness is one number in [0, 1) for each row, made on the host from the request's seed and the token's index, so
a request's text does not depend on the batch it ran in. It picks the token by inversion of the cumulative
distribution in vocabulary order, which filters leave in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Parameters of the rows that sample."""

    temperature: Tensor  # [R] float32, 0 is greedy
    top_k: Tensor  # [R] int32, 0 keeps all
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    uniform: Tensor  # [R] float32 in [0, 1)

    def first(self, count: int) -> SamplingTensors:
        """The first `count` rows."""
        values = (self.temperature, self.top_k, self.top_p, self.min_p, self.uniform)
        return SamplingTensors(*(value[:count] for value in values))


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of N positions and of the most probable tokens there."""

    logprob: Tensor  # [N] float32, of the token that was taken
    rank: Tensor  # [N] int64, from 1
    top_ids: Tensor  # [N, k] int64
    top_logprobs: Tensor  # [N, k] float32


def apply_edits(logits: Tensor, row: Tensor, token: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """Penalize and bias single logits [R, V] float32; the others are [N]. Equal (row, token) must be equal edits."""
    row, token = row.long(), token.long()
    value = logits[row, token]
    value = torch.where(value > 0, value / factor, value * factor) + addend
    return logits.index_put((row, token), value)


def greedy(logits: Tensor) -> Tensor:
    """The most probable token ids [R] int32 from logits [R, V]; the smallest id of equal ones."""
    return logits.argmax(-1).int()


def sample(logits: Tensor, params: SamplingTensors, *, any_filter: bool) -> Tensor:
    """Token ids [R] int32 from logits [R, V] float32. `any_filter`: some row has top_k, top_p or min_p."""
    is_greedy = params.temperature == 0
    scaled = logits / torch.where(is_greedy, 1.0, params.temperature)[:, None]
    if any_filter:
        scaled = scaled.masked_fill(scaled < filter_threshold(scaled, params)[:, None], -torch.inf)
    cumulative = torch.softmax(scaled, -1).cumsum(-1)
    target = params.uniform * cumulative[:, -1]
    index = (cumulative <= target[:, None]).sum(-1).int()
    # Rounding can put the target onto the total; no token is beyond it then.
    is_outside = index >= logits.shape[-1]
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


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [N] and of the `num_top` most probable, from logits [N, V] float32."""
    logprobs = torch.log_softmax(logits, -1)
    taken = logprobs.gather(-1, token_ids.long()[:, None])
    top = logprobs.topk(num_top, dim=-1)
    return LogprobTensors(taken[:, 0], (logprobs > taken).sum(-1) + 1, top.indices, top.values)
