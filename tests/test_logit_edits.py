"""Edits of logits in pieces, divided among chips by rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from torchinfer.logit_edits import LogitEdits, collect_edits, pieces
from torchinfer.request import SamplingParams
from torchinfer.sampler import apply_edits
from torchinfer.sequence import Sequence

NUM_ROWS, VOCABULARY = 12, 50


def random_edits(counts: list[int], rng: np.random.Generator) -> LogitEdits:
    """So many of each row; some ban a token."""
    row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    token = np.concatenate([rng.permutation(VOCABULARY)[:count] for count in counts]).astype(np.int32)
    addend = np.where(rng.random(len(row)) < 0.2, -np.inf, rng.normal(size=len(row)))
    return LogitEdits(row, token, rng.uniform(0.5, 2, len(row)).astype(np.float32), addend.astype(np.float32))


def apply(logits: Tensor, edits: LogitEdits) -> Tensor:
    return apply_edits(logits, *map(torch.from_numpy, edits.arrays))


@pytest.mark.parametrize("num_parts", [1, 3, 4])
@pytest.mark.parametrize(
    "counts",
    [
        [3, 0, 5, 1, 1, 1, 0, 0, 0, 20, 2, 7],  # parts with many, few and none
        [0] * 11 + [1],
        [VOCABULARY] * 12,
    ],
)
def test_each_part_gets_the_edits_of_its_rows_in_pieces_of_one_size(counts: list[int], num_parts: int) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(NUM_ROWS, VOCABULARY)).astype(np.float32))
    edits, size = random_edits(counts, rng), 4
    parts = list(logits.chunk(num_parts))
    for piece in pieces(edits, NUM_ROWS, num_parts, size):
        assert [array.shape for array in piece.arrays] == [(num_parts * size,)] * 4
        assert [array.dtype for array in piece.arrays] == [np.int32, np.int32, np.float32, np.float32]
        own = [LogitEdits(*arrays) for arrays in zip(*(np.split(a, num_parts) for a in piece.arrays), strict=True)]
        parts = [apply(part, each) for part, each in zip(parts, own, strict=True)]
    assert torch.equal(torch.cat(parts), apply(logits, edits))
    assert not torch.equal(torch.cat(parts), logits)


def test_there_are_as_many_pieces_as_the_part_with_the_most_edits_needs() -> None:
    edits = random_edits([9, 0, 4, 4], np.random.default_rng(1))
    assert len(list(pieces(edits, 4, 1, 4))) == 5
    assert len(list(pieces(edits, 4, 2, 4))) == 3
    assert len(list(pieces(edits, 8, 4, 8))) == 2


def make_sequence(prompt: list[int], output: list[int], **params: object) -> Sequence:
    facts = {"priority": 0, "arrival": 0, "stop_ids": frozenset({7, 9}), "max_length": 99, "sampling_record": b""}
    sequence = Sequence("r", 0, prompt, SamplingParams(max_tokens=50, **params), **facts)
    sequence.tokens += output
    return sequence


def by_hand(sequence: Sequence, logits: Tensor) -> Tensor:
    """One token after the other, in float64."""
    p, edited = sequence.params, logits.double().clone()
    for token in set(sequence.tokens):
        edited[token] = (
            edited[token] / p.repetition_penalty if edited[token] > 0 else edited[token] * p.repetition_penalty
        )
    for token in sequence.output_ids:
        edited[token] -= p.frequency_penalty
    for token in set(sequence.output_ids):
        edited[token] -= p.presence_penalty
    for token, bias in p.logit_bias.items():
        edited[token] += bias
    if sequence.num_output < p.min_tokens:
        edited[[*sequence.stop_ids]] = -torch.inf
    return edited


PARAMS: list[dict[str, object]] = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 0.5, "frequency_penalty": -0.25},
    {"logit_bias": {3: 2.0, 49: -5.0}},
    {"min_tokens": 6},
    {"min_tokens": 5},
    {},
    {
        "repetition_penalty": 0.7,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {3: 1.0, 7: 4.0, 40: 9.0},
        "min_tokens": 20,
    },
]


def test_edits_of_a_step_are_those_of_each_sequence_by_hand() -> None:
    sampled = [make_sequence([3, 3, 4, 40, 3], [5, 3, 5, 8, 5], **params) for params in PARAMS]
    logits = torch.randn(len(sampled), VOCABULARY, generator=torch.Generator().manual_seed(0))
    edits = collect_edits(sampled)
    assert edits is not None
    assert [array.dtype for array in edits.arrays] == [np.int32, np.int32, np.float32, np.float32]
    pairs = list(zip(edits.row.tolist(), edits.token.tolist(), strict=True))
    assert pairs == sorted(set(pairs)) and {0, 1, 2, 3, 6} == {row for row, _ in pairs}
    expected = torch.stack([by_hand(*pair) for pair in zip(sampled, logits, strict=True)])
    torch.testing.assert_close(apply(logits, edits).double(), expected, atol=1e-6, rtol=1e-6)


def test_a_step_without_edits_has_none() -> None:
    assert collect_edits([make_sequence([1], [2, 3], min_tokens=2), make_sequence([1], [])]) is None
    assert collect_edits([make_sequence([1], [], presence_penalty=1.0)]) is None
