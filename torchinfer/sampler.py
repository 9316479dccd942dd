"""Around the choice of tokens: edits of logits before it, log-probabilities after it. The same on every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of N positions and of the most probable tokens there."""

    logprob: Tensor  # [N] float32, of the token that was taken
    rank: Tensor  # [N] int64, from 1
    top_ids: Tensor  # [N, k] int64
    top_logprobs: Tensor  # [N, k] float32

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order in which they are given."""
        return self.logprob, self.rank, self.top_ids, self.top_logprobs


def apply_edits(logits: Tensor, row: Tensor, token: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """Penalize and bias single logits [R, V] float32; the others are [N]. Equal (row, token) must be equal edits."""
    row, token = row.long(), token.long()
    value = logits[row, token]
    value = torch.where(value > 0, value / factor, value * factor) + addend
    return logits.index_put((row, token), value)


def logprobs_of(logits: Tensor, token_ids: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [N] and of the `num_top` most probable, from logits [N, V] float32."""
    logprobs = torch.log_softmax(logits, -1)
    taken = logprobs.gather(-1, token_ids.long()[:, None])
    top = logprobs.topk(num_top, dim=-1)
    return LogprobTensors(taken[:, 0], (logprobs > taken).sum(-1) + 1, top.indices, top.values)
