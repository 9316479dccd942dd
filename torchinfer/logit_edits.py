"""Sparse changes of the logits that depend on a sequence's ids: penalties, logit_bias, min_tokens.

An edit of (row, token) is a factor and an addend. The factor is a repetition penalty: positive logits are divided
by it, negative ones multiplied. They are few, so they are made here and sent to the device in one piece.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchinfer.sequence import Sequence


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Edits of one step, at most one for each (row, token)."""

    row: NDArray[np.int32]  # [N]
    token: NDArray[np.int32]  # [N]
    factor: NDArray[np.float32]  # [N]
    addend: NDArray[np.float32]  # [N], may be -inf


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
