"""Edits of logits in pieces, divided among chips by rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from torchinfer.logit_edits import LogitEdits, pieces
from torchinfer.sampler import apply_edits

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
