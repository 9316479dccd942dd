"""Sampling against definitions worked out by hand and against transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from torchinfer.batch import SamplingTensors
from torchinfer.kernels.reference.greedy import greedy
from torchinfer.kernels.reference.sample import filter_threshold, sample
from torchinfer.sampler import apply_edits, logprobs_of
from torchinfer.step_input import uniform_numbers


def params(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5) -> SamplingTensors:
    reals = [torch.full((rows,), v) if isinstance(v, float) else v for v in (temperature, top_p, min_p, uniform)]
    return SamplingTensors(reals[0], torch.full((rows,), top_k, dtype=torch.int32), *reals[1:])


def kept(logits: Tensor, p: SamplingTensors) -> Tensor:
    return logits >= filter_threshold(logits, p)[:, None]


@pytest.mark.parametrize("k", [1, 2, 17, 63, 64])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    logits = torch.randn(5, 63)
    expected = TopKLogitsWarper(k)(None, logits) > -torch.inf
    assert torch.equal(kept(logits, params(5, top_k=k)), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(p: float) -> None:
    logits = torch.randn(5, 63) * 3
    expected = TopPLogitsWarper(p)(None, logits) > -torch.inf
    assert torch.equal(kept(logits, params(5, top_p=p)), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(p: float) -> None:
    logits = torch.randn(5, 63) * 3
    expected = MinPLogitsWarper(p)(None, logits) > -torch.inf
    assert torch.equal(kept(logits, params(5, min_p=p)), expected)


def test_top_p_works_on_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of the two that top_k leaves, the first has 4/7 = 0.571 of the mass.
    assert kept(logits, params(1, top_k=2, top_p=0.57)).tolist() == [[True, False, False, False]]
    assert kept(logits, params(1, top_k=2, top_p=0.58)).tolist() == [[True, True, False, False]]


def test_no_filter_keeps_everything() -> None:
    logits = torch.randn(3, 4001)
    assert kept(logits, params(3)).all()


def test_uniform_numbers_pick_tokens_in_proportion_to_their_probability() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(10_000, 4).contiguous()
    uniform = torch.from_numpy(uniform_numbers(np.full(10_000, 5, np.uint64), np.arange(10_000, dtype=np.uint64)))
    share = sample(logits, params(10_000, uniform=uniform), any_filter=False).bincount(minlength=4) / 10_000
    # Four standard deviations of a share of 10,000 draws are at most 0.02.
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02, rtol=0)


def test_temperature_sharpens_as_a_power_of_the_probability() -> None:
    logits = torch.tensor([0.2, 0.8]).log().expand(10_000, 2).contiguous()
    uniform = torch.arange(10_000) / 10_000
    ids = sample(logits, params(10_000, temperature=0.5, uniform=uniform), any_filter=False)
    assert (ids == 0).float().mean().item() == pytest.approx(0.04 / 0.68, abs=2e-4)


def test_filtered_tokens_are_never_picked() -> None:
    logits = torch.randn(2000, 50)
    p = params(2000, top_k=3, top_p=0.7, min_p=0.1, uniform=torch.rand(2000))
    ids = sample(logits, p, any_filter=True)
    assert kept(logits, p).gather(1, ids.long()[:, None]).all()


def test_the_largest_uniform_number_picks_a_token_with_probability() -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 7] = 0.0
    assert sample(logits, params(1, uniform=1 - 2.0**-24), any_filter=False).tolist() == [7]


def test_temperature_zero_is_greedy_in_a_mixed_batch() -> None:
    logits = torch.randn(4, 30)
    temperature = torch.tensor([0.0, 1.0, 0.0, 1.0])
    ids = sample(logits, params(4, temperature=temperature, uniform=0.999), any_filter=False)
    assert ids[[0, 2]].tolist() == greedy(logits)[[0, 2]].tolist()


@pytest.mark.parametrize("any_filter", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_without_a_distribution_is_greedy(value: float, any_filter: bool) -> None:
    logits = torch.randn(2, 30)
    logits[0, 7] = value
    p = params(2, top_k=5, top_p=0.9) if any_filter else params(2)
    assert sample(logits, p, any_filter=any_filter)[0] == greedy(logits)[0] == 7


@pytest.mark.parametrize("any_filter", [False, True])
def test_a_row_alone_gives_what_it_gives_in_a_batch(any_filter: bool) -> None:
    logits = torch.randn(16, 301)
    p = params(16, temperature=0.9, top_k=40, top_p=0.95, uniform=torch.rand(16))
    together = sample(logits, p, any_filter=any_filter)
    for row in range(16):
        alone = SamplingTensors(*(getattr(p, f)[row : row + 1] for f in SamplingTensors.__dataclass_fields__))
        assert sample(logits[row : row + 1], alone, any_filter=any_filter).item() == together[row].item()


def test_a_row_without_filters_does_not_notice_the_filters_of_others() -> None:
    logits, uniform = torch.randn(200, 99), torch.rand(200)
    plain = params(200, uniform=uniform)
    assert torch.equal(sample(logits, plain, any_filter=True), sample(logits, plain, any_filter=False))


def test_edits_divide_positive_and_multiply_negative_logits_then_add() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [3.0, 4.0, 5.0]])
    row, token = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    edited = apply_edits(logits, row, token, torch.tensor([2.0, 2.0, 1.0]), torch.tensor([0.0, 0.5, -torch.inf]))
    assert edited.tolist() == [[1.0, -3.5, 1.0], [3.0, 4.0, -torch.inf]]
    assert logits[0, 0] == 2.0, "the logits themselves are kept for log-probabilities"


def test_logprobs_rank_and_alternatives() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    found = logprobs_of(logits, torch.tensor([2], dtype=torch.int32), 2)
    expected = torch.log_softmax(logits.double(), -1)[0]
    assert found.rank.tolist() == [2] and found.top_ids.tolist() == [[1, 2]]
    torch.testing.assert_close(found.logprob.double(), expected[2:])
    torch.testing.assert_close(found.top_logprobs[0].double(), expected[[1, 2]])


def test_uniform_numbers_depend_on_seed_and_count_only_and_lie_in_the_unit_interval() -> None:
    seeds = np.array([1, 1, 2, 2**64 - 1], np.uint64)
    counts = np.array([0, 1, 0, 3], np.uint64)
    numbers = uniform_numbers(seeds, counts)
    assert len(set(numbers.tolist())) == 4
    assert numbers[1] == uniform_numbers(seeds[1:2], counts[1:2])[0]
    many = uniform_numbers(np.full(100_000, 9, np.uint64), np.arange(100_000, dtype=np.uint64))
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.005
