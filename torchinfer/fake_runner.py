"""A runner without a model: each next id is a pure function of the ids found through the page table.

It writes every token into the slot that the plan gives it and reads the whole context back from there, so any wrong
page, lost token or stale cache changes the output. `expected_output` computes the same by hand.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from torchinfer.runner import Launched, StepOutput
from torchinfer.scheduler import Plan
from torchinfer.step_input import Ints, StepShape, pack


def next_id(context: Iterable[int], vocab_size: int) -> int:
    """The id that follows a context: a checksum that depends on every id and its place."""
    value = 7
    for token in context:
        value = (value * 31 + token + 1) % 1_000_003
    return value % vocab_size


def expected_output(prompt_ids: Iterable[int], count: int, vocab_size: int) -> list[int]:
    """The `count` ids that FakeRunner gives for a prompt."""
    context = list(prompt_ids)
    length = len(context)
    while len(context) < length + count:
        context.append(next_id(context, vocab_size))
    return context[length:]


class FakeRunner:
    """`Runner` over a numpy array as cache. With `overlaps`, ids stay unknown to the host for one step longer."""

    def __init__(self, num_pages: int, page_size: int, vocab_size: int, *, overlaps: bool = False) -> None:
        self.overlaps = overlaps
        self.num_compilations = 0
        self.cache = np.full(num_pages * page_size, -1, np.int64)
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._last_ids = np.zeros(1, np.int32)

    def warm_up(self, progress: bool) -> None:
        """Nothing to do."""

    def launch(self, plan: Plan, page_table: Ints) -> Launched:
        shape = StepShape(plan.num_tokens, len(plan.decodes) + len(plan.chunks), page_table.shape[1])
        step = pack(plan, page_table, self._page_size, shape)
        self.cache[step.slot] = np.where(step.feed >= 0, self._last_ids[np.maximum(step.feed, 0)], step.tokens)
        rows = step.row[step.sample_index[: len(plan.sampled)]]
        ids = [self._sample(step.page_table[row], step.kv_length[row]) for row in rows]
        self._last_ids = np.array(ids or [0], np.int32)
        return Launched(plan, torch.tensor(ids, dtype=torch.int32), None, [])

    def collect(self, launched: Launched) -> StepOutput:
        return StepOutput(launched.ids.tolist())

    def num_dropped_expert_tokens(self) -> int:
        return 0

    def _sample(self, pages: Ints, length: int) -> int:
        position = np.arange(length)
        context = self.cache[pages[position // self._page_size] * self._page_size + position % self._page_size]
        return next_id(context.tolist(), self._vocab_size)
