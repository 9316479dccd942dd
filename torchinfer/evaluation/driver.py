"""Drives windows of a text through a model as the engine drives prompts: chunk by chunk, several at once, so that
attention reads keys and values out of the paged cache in its dtype."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchinfer import sequence as sequences
from torchinfer.device import synchronize
from torchinfer.evaluation.passes import DECODE_REQUESTS, LOGITS_ROWS, Layout, Pass
from torchinfer.evaluation.windows import Window
from torchinfer.kv_cache.pages import PagePool
from torchinfer.request import SamplingParams
from torchinfer.scheduler import Plan, Scheduler

DECODE_PROMPT, DECODE_STEPS = 32, 16  # tokens


@dataclass(frozen=True, slots=True)
class Scored:
    """Logits that predict tokens [first, first + N) of the text, where `window` scores them."""

    window: Window
    first: int
    logits: Tensor  # [N, vocabulary] float32


class Driver:
    """Computes windows. `seconds` is the time of the model alone: what is done with the logits does not count."""

    def __init__(self, model_pass: Pass, layout: Layout, device: torch.device) -> None:
        self.seconds = 0.0
        self.num_tokens = 0
        self._pass = model_pass
        self._layout = layout
        self._device = device

    def score(self, windows: Sequence[Window], prefix: Sequence[int], text: Sequence[int]) -> Iterator[Scored]:
        """The logits of all tokens that the windows score, in the order in which they are computed."""
        scheduler = self._scheduler()
        for index, window in enumerate(windows):
            tokens = [*prefix[: window.num_prefix], *text[window.start : window.end]]
            scheduler.add(_sequence(index, tokens, max_tokens=1))
        while scheduler.has_work:
            plan = scheduler.schedule()
            hidden = self._forward(plan, scheduler)
            for sequence, at, start, end in _spans(plan):
                yield from self._scored(hidden, windows[sequence.arrival], at, start, end)
            scheduler.update(plan, [0] * len(plan.sampled))  # what would follow the window is not asked for

    def decode_tokens_per_second(self, text: Sequence[int]) -> float:
        """Of greedy decoding, several requests at once; their prompts are short."""
        scheduler = self._scheduler()
        num_steps = min(DECODE_STEPS, max(1, self._layout.max_length // 2 - 1))
        for index in range(min(DECODE_REQUESTS, self._layout.max_requests)):
            length = min(DECODE_PROMPT, self._layout.max_length - num_steps - 1)
            prompt = [text[(index * DECODE_PROMPT + k) % len(text)] for k in range(max(1, length))]
            scheduler.add(_sequence(index, prompt, num_steps + 1))
        seconds, num_tokens = 0.0, 0
        while scheduler.has_work:
            plan = scheduler.schedule()
            start = time.perf_counter()
            token_ids = self._greedy(plan, scheduler)
            if not plan.chunks:
                seconds += time.perf_counter() - start
                num_tokens += len(token_ids)
            scheduler.update(plan, token_ids)
        return num_tokens / seconds if seconds else 0.0

    def _scheduler(self) -> Scheduler:
        layout = self._layout
        return Scheduler(
            PagePool(layout.num_pages),
            page_size=layout.page_size,
            max_num_requests=layout.max_requests,
            max_num_batched_tokens=layout.max_tokens,
            max_model_len=layout.max_length,
            prefix_cache=None,
        )

    def _forward(self, plan: Plan, scheduler: Scheduler) -> Tensor:
        start = time.perf_counter()
        hidden = self._pass.forward(plan, scheduler.page_table)
        synchronize(self._device)
        self.seconds += time.perf_counter() - start
        self.num_tokens += plan.num_tokens
        return hidden

    def _scored(self, hidden: Tensor, window: Window, at: int, start: int, end: int) -> Iterator[Scored]:
        """Of tokens [start, end) of a window, prefix included, whose hidden states begin at row `at`."""
        offset = window.start - window.num_prefix + 1  # from a token of the window to the one of the text after it
        first, last = max(start + offset, window.first), min(end + offset, window.end)
        for token in range(first, last, LOGITS_ROWS):
            row = at + token - offset - start
            begin = time.perf_counter()
            logits = self._pass.logits(hidden, row, row + min(LOGITS_ROWS, last - token))
            synchronize(self._device)
            self.seconds += time.perf_counter() - begin
            yield Scored(window, token, logits)

    def _greedy(self, plan: Plan, scheduler: Scheduler) -> list[int]:
        hidden = self._pass.forward(plan, scheduler.page_table)
        if not plan.chunks:
            return _argmax(self._pass.logits(hidden, 0, len(plan.decodes)))
        ends = [at + end - start for sequence, at, start, end in _spans(plan) if end == len(sequence.tokens)]
        return [token for end in ends for token in _argmax(self._pass.logits(hidden, end - 1, end))]


def _argmax(logits: Tensor) -> list[int]:
    token_ids: list[int] = logits.argmax(-1).tolist()
    return token_ids


def _sequence(index: int, tokens: list[int], max_tokens: int) -> sequences.Sequence:
    return sequences.Sequence(
        str(index),
        0,
        tokens,
        SamplingParams(temperature=0.0),
        priority=0,
        arrival=index,
        stop_ids=frozenset(),
        max_length=len(tokens) + max_tokens,
        sampling_record=b"",
    )


def _spans(plan: Plan) -> Iterator[tuple[sequences.Sequence, int, int, int]]:
    """(sequence, first row in the step, first token, end token) of all that a step computes."""
    for row, sequence in enumerate(plan.decodes):
        yield sequence, row, sequence.num_computed - 1, sequence.num_computed
    at = len(plan.decodes)
    for chunk in plan.chunks:
        yield chunk.sequence, at, chunk.start, chunk.end
        at += chunk.end - chunk.start
