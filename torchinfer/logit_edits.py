"""Sparse changes of the logits that depend on a sequence's ids: penalties, logit_bias, min_tokens.

An edit of (row, token) is a factor and an addend. The factor is a repetition penalty: positive logits are divided
by it, negative ones multiplied. They are few, so they are made here and sent to the device in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchinfer.sequence import Sequence

Ids = NDArray[np.int32]
Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Edits of one step, at most one for each (row, token)."""

    row: NDArray[np.int32]  # [N], ascending
    token: NDArray[np.int32]  # [N]
    factor: NDArray[np.float32]  # [N]
    addend: NDArray[np.float32]  # [N], may be -inf

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """In the order in which they are given."""
        return self.row, self.token, self.factor, self.addend


def collect_edits(sampled: list[Sequence]) -> LogitEdits | None:
    """The edits of the sequences that sample in this step; row is the index in `sampled`."""
    found = [(row, _edits_of(sequence)) for row, sequence in enumerate(sampled) if sequence.may_have_edits]
    found = [(row, edits) for row, edits in found if len(edits[0])]
    if not found:
        return None
    rows = [np.full(len(token), row, np.int32) for row, (token, _, _) in found]
    token, factor, addend = (np.concatenate(arrays) for arrays in zip(*(edits for _, edits in found), strict=True))
    return LogitEdits(np.concatenate(rows), token, factor.astype(np.float32), addend.astype(np.float32))


def pieces(edits: LogitEdits, num_rows: int, num_parts: int, size: int) -> Iterator[LogitEdits]:
    """At a time `size` edits for each of `num_parts` equal parts of the rows, one part behind the other:
    [num_parts * size], with rows counted from the first of their part."""
    first_rows = np.arange(num_parts + 1) * (num_rows // num_parts)
    ends = np.searchsorted(edits.row, first_rows)
    for offset in range(0, int(np.diff(ends).max()), size):
        parts = [
            _piece(edits, start + offset, stop, first_row, size).arrays
            for start, stop, first_row in zip(ends[:-1], ends[1:], first_rows[:-1], strict=True)
        ]
        yield LogitEdits(*map(np.concatenate, zip(*parts, strict=True)))


def _piece(edits: LogitEdits, start: int, stop: int, first_row: int, size: int) -> LogitEdits:
    """`size` of the edits [start, stop): the first again, or one that changes nothing, in place of what lacks."""
    if start >= stop:
        zeros = np.zeros(size, np.int32)
        return LogitEdits(zeros, zeros, np.ones(size, np.float32), np.zeros(size, np.float32))
    at = np.arange(start, start + size)
    at[at >= stop] = start
    return LogitEdits(edits.row[at] - np.int32(first_row), edits.token[at], edits.factor[at], edits.addend[at])


def _edits_of(sequence: Sequence) -> tuple[Ids, Reals, Reals]:
    """Tokens, each once and ascending, with their factors and addends. Arrays: a prompt has thousands of tokens."""
    params = sequence.params
    penalized = _distinct(sequence.tokens)[0] if params.repetition_penalty != 1.0 else np.empty(0, np.int32)
    parts = list(_addends_of(sequence))
    token, place = np.unique(np.concatenate([penalized, *(part for part, _ in parts)]), return_inverse=True)
    factor, addend = np.ones(len(token)), np.zeros(len(token))
    factor[place[: len(penalized)]] = params.repetition_penalty
    if parts:
        np.add.at(addend, place[len(penalized) :], np.concatenate([values for _, values in parts]))
    return token, factor, addend


def _addends_of(sequence: Sequence) -> Iterator[tuple[Ids, Reals]]:
    """Tokens and what is added to their logits; a token may be in several parts."""
    params = sequence.params
    if params.presence_penalty or params.frequency_penalty:
        token, count = _distinct(sequence.output_ids)
        yield token, (-params.presence_penalty - params.frequency_penalty * count).astype(np.float64)
    if params.logit_bias:
        yield np.array([*params.logit_bias], np.int32), np.array([*params.logit_bias.values()], np.float64)
    if sequence.num_output < params.min_tokens:
        yield np.array([*sequence.stop_ids], np.int32), np.full(len(sequence.stop_ids), -np.inf)


def _distinct(tokens: list[int]) -> tuple[Ids, NDArray[np.int64]]:
    """Each token once, and how often it is there."""
    return np.unique(np.array(tokens, np.int32), return_counts=True)
