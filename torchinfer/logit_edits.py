"""Sparse changes of the logits that depend on a sequence's ids: penalties, logit_bias, min_tokens.

An edit of (row, token) is a factor and an addend. The factor is a repetition penalty: positive logits are divided
by it, negative ones multiplied. They are few, so they are made here and sent to the device in one piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchinfer.sequence import Sequence


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
    entries = [(row, token, factor, addend) for row, edits in found for token, (factor, addend) in edits.items()]
    if not entries:
        return None
    row, token, factor, addend = zip(*entries, strict=True)
    return LogitEdits(
        np.array(row, np.int32),
        np.array(token, np.int32),
        np.array(factor, np.float32),
        np.array(addend, np.float32),
    )


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


def _edits_of(sequence: Sequence) -> dict[int, tuple[float, float]]:
    params = sequence.params
    edits: dict[int, tuple[float, float]] = {}
    if params.repetition_penalty != 1.0:
        edits = dict.fromkeys(sequence.tokens, (params.repetition_penalty, 0.0))
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(sequence.output_ids).items():
            _add(edits, token, -params.presence_penalty - params.frequency_penalty * count)
    for token, bias in params.logit_bias.items():
        _add(edits, token, bias)
    if sequence.num_output < params.min_tokens:
        for token in sequence.stop_ids:
            _add(edits, token, -np.inf)
    return edits


def _add(edits: dict[int, tuple[float, float]], token: int, addend: float) -> None:
    factor, before = edits.get(token, (1.0, 0.0))
    edits[token] = (factor, before + addend)
