"""Sampling in the CPU library on every level: against the reference, and against definitions where it may differ."""

from __future__ import annotations

import pytest
import torch

from torchinfer.batch import SamplingTensors
from torchinfer.kernels.cpu.greedy import greedy
from torchinfer.kernels.cpu.sample import sample
from torchinfer.kernels.reference import greedy as reference_greedy
from torchinfer.kernels.reference import sample as reference


def random(rows, columns, seed=0, spread=3.0):
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)) * spread


def params(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=None):
    if uniform is None:
        uniform = torch.rand(rows, generator=torch.Generator().manual_seed(7))
    reals = [torch.full((rows,), float(value)) for value in (temperature, top_p, min_p)]
    return SamplingTensors(reals[0], torch.full((rows,), top_k, dtype=torch.int32), *reals[1:], uniform)


def exact(logits, p):
    """What is kept, and the cumulative distribution over it, in float64."""
    scaled = logits / p.temperature[:, None]
    is_kept = scaled >= reference.filter_threshold(scaled, p)[:, None]
    return is_kept, torch.softmax(scaled.double().masked_fill(~is_kept, -torch.inf), -1).cumsum(-1)


def assert_drawn(ids, logits, p):
    """Each id is kept, and the number lies in its part of the distribution, but for float32's rounding."""
    is_kept, cumulative = exact(logits, p)
    assert ids.dtype == torch.int32 and is_kept.gather(1, ids.long()[:, None]).all()
    end = cumulative.gather(1, ids.long()[:, None])[:, 0]
    before = torch.where(ids > 0, cumulative.gather(1, (ids.long()[:, None] - 1).clamp(min=0))[:, 0], 0.0)
    uniform = p.uniform.double()
    assert (before - 1e-5 <= uniform).all() and (uniform <= end + 1e-5).all()


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 4000},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
    {"top_p": 0.99, "temperature": 5.0},
]


@pytest.mark.parametrize("columns", [1, 15, 16, 63, 257, 5000])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_what_the_definition_says(level, filters, columns):
    logits, p = random(40, columns), params(40, **filters)
    assert_drawn(sample(logits, p, True), logits, p)


@pytest.mark.parametrize("spread", [0.01, 40.0])
def test_flat_and_steep_logits(level, spread):
    """All within a tenth of each other, or so far apart that the probable ones are few."""
    logits, p = random(20, 3000, spread=spread), params(20, top_p=0.8)
    assert_drawn(sample(logits, p, True), logits, p)


def test_equal_logits_are_kept_or_dropped_together(level):
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(64, 1)
    uniform = torch.arange(64) / 64
    assert set(sample(logits, params(64, top_k=2, uniform=uniform), True).tolist()) == {1, 2, 3}
    assert set(sample(logits, params(64, top_p=0.3, uniform=uniform), True).tolist()) == {1, 2, 3}


def test_equal_logits_at_the_end_of_top_k_share_its_mass(level):
    """Of [e, 1, 1, 1] top_k = 2 keeps the mass e + 1 of which top_p = 0.7 needs the first, 0.74 the second."""
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(64, 1)
    uniform = torch.arange(64) / 64
    assert set(sample(logits, params(64, top_k=2, top_p=0.7, uniform=uniform), True).tolist()) == {0}
    assert set(sample(logits, params(64, top_k=2, top_p=0.74, uniform=uniform), True).tolist()) == {0, 1, 2, 3}


def test_banned_tokens_are_never_drawn_and_the_last_number_has_a_token(level):
    logits = torch.full((3, 1000), -torch.inf)
    logits[0, 7] = logits[1, 999] = logits[2, 0] = -5.0
    for number in (0.0, 0.5, 1 - 2.0**-24):
        p = params(3, top_k=20, top_p=0.9, uniform=torch.full((3,), number))
        assert sample(logits, p, True).tolist() == [7, 999, 0]


def test_rows_without_a_distribution_give_an_id_in_range(level):
    logits = random(4, 300)
    logits[0, 5], logits[1], logits[2, 9], logits[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    ids = sample(logits, params(4, top_k=5, top_p=0.5), True)
    assert ((ids >= 0) & (ids < 300)).all() and ids[2] == 9
    assert ((greedy(logits) >= 0) & (greedy(logits) < 300)).all()


@pytest.mark.parametrize("columns", [1, 15, 255, 256, 300, 4097])
def test_greedy_is_the_first_of_the_largest(level, columns):
    logits = random(50, columns).round()  # many are equal
    expected = [row.tolist().index(row.max()) for row in logits]
    assert greedy(logits).tolist() == expected
    assert reference_greedy.greedy(logits).tolist() == expected
    assert greedy(-logits.abs() - 1).tolist() == [row.tolist().index(row.max()) for row in -logits.abs() - 1]


@pytest.mark.parametrize("lane", [0, 15, 255, 256, 300])
def test_greedy_passes_over_what_is_not_a_number(level, lane):
    logits = torch.zeros(4, 400)
    logits[:, lane] = torch.nan
    logits[torch.arange(4), torch.tensor([3, 16, 254, 399])] = 9.0
    assert greedy(logits).tolist() == [3, 16, 254, 399]
    assert greedy(torch.tensor([[torch.nan, 1.0, 2.0, 9.0]])).tolist() == [3]


def test_temperature_zero_is_greedy_in_a_mixed_batch(level):
    logits, p = random(6, 300), params(6, top_p=0.9)
    p.temperature[::2] = 0
    assert torch.equal(sample(logits, p, True)[::2], greedy(logits)[::2])


def test_a_row_does_not_depend_on_the_others_or_the_threads(level, num_threads):
    logits, p = random(33, 5000), params(33, temperature=0.9, top_k=100, top_p=0.95)
    alone = [SamplingTensors(*(getattr(p, name)[row : row + 1] for name in p.__slots__)) for row in range(33)]
    apart = torch.cat([sample(logits[row : row + 1], alone[row], True) for row in range(33)])
    assert torch.equal(sample(logits, p, True), apart)


def test_what_lies_around_the_rows_is_not_read(level):
    wide = torch.full((5, 400), torch.nan)
    wide[:, 17:317] = random(5, 300)
    p = params(5, top_k=30, top_p=0.9)
    assert torch.equal(sample(wide[:, 17:317], p, True), sample(wide[:, 17:317].contiguous(), p, True))


def test_what_does_not_fit_is_refused(level):
    p = params(3)
    with pytest.raises(ValueError, match=r"logits are float32 \[R, V\].*bfloat16"):
        sample(random(3, 8).bfloat16(), p, True)
    with pytest.raises(ValueError, match=r"logits are float32 \[R, V\].*\[3, 0\]"):
        greedy(torch.empty(3, 0))
    with pytest.raises(ValueError, match=r"temperature is contiguous torch.float32 \[R\]"):
        sample(random(4, 8), p, True)
    assert sample(torch.empty(0, 8), params(0), True).shape == (0,)
