"""Numbers of tokens and their means, against arithmetic by hand."""

import math

import numpy as np
import torch

from torchinfer.evaluation.metrics import TokenScores, score_rows, summarize, summarize_by_context


def by_hand(logits: list[float], reference: list[float], target: int) -> tuple[float, float]:
    """nll and KL, term by term."""
    q, p = ([math.exp(x) / math.fsum(map(math.exp, row)) for x in row] for row in (logits, reference))
    return -math.log(q[target]), math.fsum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True))


def scores(count: int = 40) -> TokenScores:
    random = np.random.default_rng(0)
    nll, kl = random.random(count), random.random(count)
    return TokenScores(nll, kl, (random.random(count) > 0.3).astype(float), np.arange(1, count + 1))


def test_nll_kl_and_top1_are_those_computed_by_hand():
    logits, reference = torch.randn(7, 11) * 3, torch.randn(7, 11) * 3
    reference[:3] = logits[:3] + torch.randn(3, 11) * 1e-3
    targets = torch.tensor([0, 10, 3, 3, 5, 1, 2])
    nll, kl, is_equal = score_rows(logits, reference, targets)
    expected = [by_hand(*row) for row in zip(logits.tolist(), reference.tolist(), targets.tolist(), strict=True)]
    np.testing.assert_allclose(np.stack([nll, kl], 1), expected, rtol=1e-9, atol=1e-14)
    assert is_equal.tolist() == (logits.argmax(-1) == reference.argmax(-1)).double().tolist()
    assert 0 < is_equal.sum() < 7


def test_kl_of_equal_logits_is_exactly_0():
    logits = torch.randn(5, 100) * 30
    assert score_rows(logits, logits.clone(), torch.zeros(5, dtype=torch.long))[1].tolist() == [0.0] * 5


def test_kl_of_logits_far_apart_is_finite():
    logits, reference = torch.tensor([[0.0, 3e4]]), torch.tensor([[3e4, 0.0]])
    nll, kl, _ = score_rows(logits, reference, torch.tensor([0]))
    assert (nll.tolist(), kl.tolist()) == ([3e4], [3e4])


def test_the_error_of_the_change_is_that_of_paired_differences():
    reference = scores()
    ours = TokenScores(reference.nll + 0.01, reference.kl, reference.is_equal, reference.context)
    summary = summarize(ours, reference)
    assert math.isclose(summary.change.mean, 0.01)
    assert summary.change.error < 1e-12 < summary.ln_perplexity.error


def test_a_summary_has_mean_and_standard_error():
    found, summary = scores(), summarize(scores(), scores())
    assert math.isclose(summary.perplexity, math.exp(found.nll.mean()))
    assert math.isclose(summary.kl.error, float(np.std(found.kl, ddof=1)) / math.sqrt(40))
    assert summary.top1.mean == found.is_equal.mean()


def test_each_token_is_in_the_bucket_of_its_context():
    found = scores()
    parts = summarize_by_context(found, found)
    assert [(part.first, part.last, part.summary.num_tokens) for part in parts] == [
        (1, 15, 15),
        (16, 31, 16),
        (32, 40, 9),
    ]
    assert parts[1].summary.kl.mean == found.kl[15:31].mean()
