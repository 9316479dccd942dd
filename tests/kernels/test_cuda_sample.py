"""Sampling in Triton: what the filters keep, and which token a number picks, by float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer.batch import SamplingTensors
from torchinfer.kernels.cuda import sample as module
from torchinfer.kernels.cuda.sample import sample
from torchinfer.kernels.reference.sample import sample as reference

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 3, "temperature": 0.7},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.9999, "min_p": 0.3},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
]


def params(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5) -> SamplingTensors:
    reals = [v if isinstance(v, Tensor) else torch.full((rows,), v) for v in (temperature, top_p, min_p, uniform)]
    return SamplingTensors(reals[0], torch.full((rows,), top_k, dtype=torch.int32), *reals[1:])


def run(gpu: str, logits: Tensor, p: SamplingTensors) -> list[int]:
    fields = (p.temperature, p.top_k, p.top_p, p.min_p, p.uniform)
    return sample(logits.to(gpu), SamplingTensors(*(f.to(gpu) for f in fields)), True).tolist()


def intervals(logits: Tensor, p: SamplingTensors, row: int) -> tuple[Tensor, Tensor]:
    """The part of [0, 1) that each token of a row has, from the definitions: where it begins and where it ends."""
    x = logits[row].double() / p.temperature[row].double()
    order = x.argsort(descending=True, stable=True)
    limit = min(int(p.top_k[row]) or len(x), len(x))
    share = x[order][:limit].softmax(0)
    num_kept = int((share.cumsum(0) - share < p.top_p[row].double()).sum()) if p.top_p[row] < 1 else limit
    is_kept = (x >= x[order][min(num_kept, limit) - 1]) & (x >= x.max() + p.min_p[row].double().log())
    end = x.masked_fill(~is_kept, -torch.inf).softmax(0).cumsum(0)
    return torch.cat((torch.zeros(1, dtype=torch.float64), end[:-1])), end


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 1e-6},
    ],
    ids=str,
)
def test_a_number_picks_the_token_in_whose_interval_it_lies(
    gpu: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_IN_BLOCK", 64)  # so that a row has two blocks
    rows = 2
    logits = torch.randn(rows, 101) * 2
    p = params(rows, **options, uniform=torch.rand(rows))
    for row, token in enumerate(run(gpu, logits, p)):
        begin, end = intervals(logits, p, row)
        assert begin[token] - 1e-5 <= p.uniform[row].item() < end[token] + 1e-5 and begin[token] < end[token]


def test_those_that_equal_the_last_one_are_kept(gpu: str) -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]]).expand(6, 6).contiguous()
    uniform = torch.tensor([0.0, 0.07, 0.5, 0.7, 0.9, 0.97])
    assert run(gpu, logits, params(6, top_k=3, uniform=uniform)) == [0, 0, 1, 2, 3, 4]
    # top_p counts only one of the three, where top_k leaves one: e^3 + e^2 are 0.910 of what top_k leaves.
    assert run(gpu, logits[:2], params(2, top_k=3, top_p=0.9, uniform=uniform[[2, 4]])) == [1, 3]
    assert run(gpu, logits[:2], params(2, top_k=3, top_p=0.92, uniform=uniform[[2, 5]])) == [1, 4]
    # And two where it leaves two: then e^3 is 0.79 of what top_k leaves, with one 0.88.
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert run(gpu, logits, params(1, top_k=3, top_p=0.83, uniform=0.99)) == [3]


def test_the_threshold_may_be_in_a_block_that_a_sweep_left_out(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IN_BLOCK", 64)
    logits = torch.full((1, 128), -1000.0)
    logits[0, 0], logits[0, 64:] = 20.0, 7.6
    logits[0, 70:74] = torch.tensor([8.0, 7.9, 7.8, 7.7])  # with the first these are five
    assert run(gpu, logits, params(1, top_k=5, uniform=1 - 2.0**-24)) == [73]


def test_temperature_zero_and_rows_without_a_distribution_are_greedy(gpu: str) -> None:
    logits = torch.randn(5, 300)
    logits[1, 7], logits[2, 9], logits[3, 4], logits[3, 200] = torch.nan, torch.inf, 50.0, 50.0
    temperature = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])
    ids = run(gpu, logits, params(5, temperature=temperature, uniform=0.999))
    assert ids == [int(logits[0].argmax()), 7, 9, 4, int(logits[4].argmax())]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_interval_pick_a_token_with_probability(gpu: str, uniform: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 7] = 0.0
    assert run(gpu, logits, params(1, uniform=uniform)) == [7]


def awkward_rows(size: int) -> Tensor:
    """Whole numbers, all alike, zeros with signs, mostly minus infinity, of all magnitudes, far below zero, peaked."""
    normal, is_kept = torch.randn(size), torch.arange(size) % 128 < 20  # none in every second block
    return torch.stack(
        (
            (2 * normal).round(),
            torch.full((size,), -3.25),
            torch.where(normal < 0, -0.0, 0.0),
            normal.masked_fill(~is_kept, -torch.inf),
            normal * 10.0 ** torch.randint(-3, 3, (size,)),
            2 * normal - 1e4,
            torch.where(torch.rand(size) < 5 / size, 12 + normal, 2 * normal),
        )
    )


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("size", [1, 64, 65, 300])
def test_awkward_rows_have_the_ids_of_the_reference(
    gpu: str, size: int, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_IN_BLOCK", 64)
    logits = awkward_rows(size)
    p = params(len(logits), **options, uniform=torch.linspace(0.03, 0.97, len(logits)))
    expected = reference(logits, p, True)
    for row, (token, other) in enumerate(zip(run(gpu, logits, p), expected.tolist(), strict=True)):
        if token != other:  # a sum's last bits decide where a number lies between two tokens
            begin, end = intervals(logits, p, row)
            assert begin[token] - 1e-5 <= p.uniform[row].item() < end[token] + 1e-5 and begin[token] < end[token]


def test_where_the_temperature_makes_infinity_of_logits_the_first_of_the_largest_is_drawn(gpu: str) -> None:
    logits = torch.randn(2, 200) - torch.tensor([[0.0], [10.0]])
    logits[0, [30, 150]], logits[1, [30, 150]] = 5.0, -5.0
    assert run(gpu, logits, params(2, temperature=1e-38, uniform=0.99)) == [30, 30]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40])
def test_near_temperature_zero_the_largest_is_drawn(gpu: str, temperature: float) -> None:
    logits = torch.randn(3, 200)
    logits[0, 150], logits[1, 20], logits[2, 199] = 5.0, 5.0, 5.0
    for options in ({}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1}):
        assert run(gpu, logits, params(3, temperature=temperature, uniform=0.99, **options)) == [150, 20, 199]


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How many of a row's logits the kernel reads: in the interpreter every load can be seen."""
    from triton.runtime.interpreter import InterpreterBuilder

    def count(logits: Tensor, **options: float) -> int:
        begin, num_bytes, load = logits.data_ptr(), logits.nbytes, InterpreterBuilder.create_masked_load
        counts = []

        def noted(self: Any, places: Any, mask: Any, *rest: Any) -> Any:
            offset = np.asarray(places.data).astype(np.int64) - begin
            counts.append(int(((offset >= 0) & (offset < num_bytes) & mask.data).sum()))
            return load(self, places, mask, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(module, "MOST_IN_BLOCK", 64)
            patch.setattr(InterpreterBuilder, "create_masked_load", noted)
            run("cpu", logits, params(1, **options))
        return sum(counts)

    return count


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads are counted in the interpreter")
def test_a_row_is_read_once_and_then_only_blocks_in_question(gpu: str, num_read: Any) -> None:
    size, block = 16 * 64, 64
    logits = torch.randn(1, size)
    assert num_read(logits, temperature=0.0) == size
    assert num_read(logits, temperature=0.7) == size + block
    peaked = logits.clone()
    peaked[0, 130:140] = torch.arange(10) / 4 + 15  # in one block, far above all others
    for options in ({"min_p": 0.2}, {"top_k": 7}, {"top_p": 0.9}, {"top_k": 7, "top_p": 0.9, "min_p": 0.01}):
        assert size < num_read(peaked, **options) <= size + 12 * block
    # Without a block that stands out still fewer than a sweep for each bit.
    assert num_read(logits, top_k=40) < 12 * size and num_read(logits, top_p=0.9) < 18 * size
    assert num_read(torch.zeros(1, size), top_k=40, top_p=0.9) < 6 * size


def test_a_row_alone_gives_what_it_gives_in_a_batch(gpu: str) -> None:
    logits = torch.randn(4, 99)
    p = params(4, temperature=0.9, top_k=40, top_p=0.95, uniform=torch.rand(4))
    together = run(gpu, logits, p)
    for row in (0, 3):
        alone = SamplingTensors(*(getattr(p, f)[row : row + 1] for f in SamplingTensors.__dataclass_fields__))
        assert run(gpu, logits[row : row + 1], alone) == [together[row]]


def test_what_does_not_fit_is_refused(gpu: str) -> None:
    with pytest.raises(ValueError, match=r"float32 \[R, V\].*bfloat16"):
        run(gpu, torch.randn(2, 5).bfloat16(), params(2))
    with pytest.raises(ValueError, match=r"\[3\]"):
        run(gpu, torch.randn(2, 5), params(3))
    assert run(gpu, torch.randn(0, 5), params(0)) == []
