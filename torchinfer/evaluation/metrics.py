"""From logits to numbers: of each token, then their means with standard errors, overall and by length of context.

    nll     -ln Q(token)
    KL      sum over the vocabulary of P * (ln P - ln Q), P being the reference's distribution, Q the one measured
    equal   whether both have the same most probable token

All in float64. Standard errors take tokens for independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer.evaluation.windows import buckets

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of each token that was scored, in the order of the text."""

    nll: Floats
    kl: Floats
    is_equal: Floats  # 1.0 or 0.0
    context: NDArray[np.int64]  # tokens before it in its window

    @classmethod
    def empty(cls, num_tokens: int) -> TokenScores:
        """NaN where nothing was scored yet."""
        nll, kl, is_equal = (np.full(num_tokens, np.nan) for _ in range(3))
        return cls(nll, kl, is_equal, np.zeros(num_tokens, np.int64))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Means over some tokens. `change` is that of ln perplexity, from differences of tokens: its error is small."""

    num_tokens: int
    perplexity: float
    ln_perplexity: Estimate
    change: Estimate
    kl: Estimate
    top1: Estimate  # share of tokens where both have the same most probable one


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens with `first` to `last` tokens of context."""

    first: int
    last: int
    summary: Summary


def score_rows(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Floats, Floats, Floats]:
    """nll, KL and equality [N] from logits [N, V], the reference's [N, V] and the tokens [N] that came."""
    ours, theirs = (torch.log_softmax(values.double(), -1) for values in (logits, reference))
    nll = -ours.gather(-1, targets[:, None])[:, 0]
    # The sum cannot be negative but by rounding.
    kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0)
    is_equal = logits.argmax(-1) == reference.argmax(-1)
    return nll.cpu().numpy(), kl.cpu().numpy(), is_equal.double().cpu().numpy()


def summarize(scores: TokenScores, reference: TokenScores, chosen: NDArray[np.bool_] | slice = slice(None)) -> Summary:
    """Means over the chosen tokens; there must be one."""
    nll = scores.nll[chosen]
    mean = float(nll.mean())
    return Summary(
        num_tokens=len(nll),
        perplexity=math.exp(min(mean, 700.0)),
        ln_perplexity=_estimate(nll),
        change=_estimate(nll - reference.nll[chosen]),
        kl=_estimate(scores.kl[chosen]),
        top1=_estimate(scores.is_equal[chosen]),
    )


def summarize_by_context(scores: TokenScores, reference: TokenScores) -> tuple[Bucket, ...]:
    """A summary for each range of context lengths that has tokens."""
    longest = int(scores.context.max())
    found = []
    for first, end in buckets(longest):
        chosen = (scores.context >= first) & (scores.context < end)
        if chosen.any():
            found.append(Bucket(first, min(end - 1, longest), summarize(scores, reference, chosen)))
    return tuple(found)


def _estimate(values: Floats) -> Estimate:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error)
