"""Runs plans on XLA: a few compiled programs per bucket, all compiled at the start.

    forward   (T, R)  step, last ids -> hidden [T, H], logits [R, V]; writes the caches in place
    sample    (R)     logits -> ids, greedy or with all sampling parameters
    edit      (R)     logits and EDITS_AT_A_TIME edits -> logits
    logprobs  (R)     logits, ids -> log-probabilities
    head      (T)     hidden, rows -> logits, for prompt log-probabilities

Token counts are padded to powers of two from 16, request counts from 8. A compilation after the warm-up is a bug:
`num_compilations` counts them all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from tqdm import tqdm

from torchinfer.batch import KVCache, SamplingTensors, split_layers
from torchinfer.device import count_compilations, mark_as_donated, synchronize
from torchinfer.kernels import greedy, sample
from torchinfer.logit_edits import LogitEdits, collect_edits, pieces
from torchinfer.models.decoder import Decoder
from torchinfer.models.moe import COUNTER
from torchinfer.request import MAX_LOGPROBS
from torchinfer.runner import Launched, StepOutput, counting, prompt_targets, to_output
from torchinfer.sampler import LogprobTensors, apply_edits, logprobs_of
from torchinfer.scheduler import Chunk, Plan
from torchinfer.step_input import Ints, StepShape, buckets, pack, split_sampling, unpack
from torchinfer.xla_program import CompiledFunction

logger = logging.getLogger(__name__)

MIN_TOKENS = 16
MIN_REQUESTS = 8
EDITS_AT_A_TIME = 1024


class XlaRunner:
    """Padded shapes, compiled. Caches and counters go into a forward pass and come out of it, in the same memory."""

    overlaps = True
    _num_chips = 1  # among which rows of logits are divided

    def __init__(
        self,
        model: Decoder,
        kv_caches: list[KVCache],
        page_size: int,
        device: torch.device,
        *,
        table_width: int,
        max_num_requests: int,
        max_num_tokens: int,
    ) -> None:
        self._model = model
        self._page_size = page_size
        self._device = device
        self._table_width = table_width
        self._token_buckets = buckets(MIN_TOKENS, max_num_tokens)
        self._request_buckets = request_buckets(max_num_requests, self._num_chips)
        self._num_last_ids = self._request_buckets[-1]
        self._last_ids = self._send(np.zeros(self._num_last_ids, np.int32))
        self._counters = self._counter_tensors()
        self._state = [tensor for cache in kv_caches for tensor in cache.tensors] + list(self._counters.values())
        self._pages = kv_caches[0].pages
        self._forward = {shape: CompiledFunction(partial(self._forward_eager, shape)) for shape in self.shapes()}
        self._head = CompiledFunction(self._head_eager)
        self._sample = CompiledFunction(self._sample_eager)
        self._greedy = CompiledFunction(self._greedy_eager)
        self._edit_chunk = CompiledFunction(self._edit_eager)
        self._logprobs = CompiledFunction(self._logprobs_eager)

    @property
    def num_compilations(self) -> int:
        """Programs compiled since the process started."""
        return count_compilations()

    def shapes(self) -> Iterator[StepShape]:
        """Every shape a step can have: a request has at least one token."""
        for num_requests in self._request_buckets:
            for num_tokens in self._token_buckets:
                if num_tokens >= num_requests or num_tokens == self._token_buckets[-1]:
                    yield StepShape(num_tokens, num_requests, self._table_width)

    @torch.no_grad()
    def warm_up(self, progress: bool) -> None:
        """Compile every program, the largest first, so that a lack of memory shows at once."""
        shapes = sorted(self.shapes(), key=lambda s: (s.num_tokens, s.num_requests), reverse=True)
        for shape in tqdm(shapes, desc="compiling", unit="program", disable=None if progress else True):
            logits, hidden = self._run_forward(np.zeros(shape.size, np.int32), shape)
            if shape.num_requests == self._request_buckets[0]:
                self._prompt_rows(hidden, 0, [0], 0)
            if shape.num_tokens == max(s.num_tokens for s in shapes if s.num_requests == shape.num_requests):
                self._warm_up_sampling(logits)
            synchronize(self._device)
        logger.info("compiled programs for %d shapes: %d compilations", len(shapes), self.num_compilations)

    def _warm_up_sampling(self, logits: Tensor) -> None:
        num_requests = logits.shape[0]
        one = np.zeros(1, np.int32)
        edits = LogitEdits(one, one, one.astype(np.float32) + 1, one.astype(np.float32))
        for each in (logits, self._edit(logits, edits)):
            self._greedy(each)
            (self._last_ids,) = self._sample(each, *self._send_sampling(np.zeros(5 * num_requests, np.int32)))
            self._logprobs(each, self._last_ids)

    @torch.no_grad()
    def launch(self, plan: Plan, page_table: Ints) -> Launched:
        shape = self._shape(plan)
        packed = pack(plan, page_table, self._page_size, shape).packed
        logits, hidden = self._run_forward(packed, shape)
        sampled = plan.sampled
        edited = self._edit(logits, collect_edits(sampled))
        if plan.all_greedy:
            (ids,) = self._greedy(edited)
        else:
            (ids,) = self._sample(edited, *self._send_sampling(packed[shape.num_forward :]))
        self._last_ids = ids
        wants_logprobs = any(s.params.logprobs is not None for s in sampled)
        logprobs = LogprobTensors(*self._logprobs(logits, ids)) if wants_logprobs else None
        return Launched(plan, ids, logprobs, self._prompt_logprobs(hidden, plan))

    def collect(self, launched: Launched) -> StepOutput:
        return to_output(launched)

    def num_dropped_expert_tokens(self) -> int:
        return sum(int(counter.item()) for counter in self._state[len(self._state) - len(self._counters) :])

    def _shape(self, plan: Plan) -> StepShape:
        num_requests = len(plan.decodes) + len(plan.chunks)
        padded_requests = next(size for size in self._request_buckets if size >= num_requests)
        at_least = max(plan.num_tokens, min(padded_requests, self._token_buckets[-1]))
        return StepShape(
            next(size for size in self._token_buckets if size >= at_least), padded_requests, self._table_width
        )

    def _run_forward(self, packed: Ints, shape: StepShape) -> tuple[Tensor, Tensor]:
        ints = self._send(packed[: shape.num_forward])
        *self._state, hidden, logits = self._forward[shape](ints, self._last_ids, *self._state)
        return logits, hidden

    def _send(self, array: NDArray[Any]) -> Tensor:
        """The program's call sends it."""
        return torch.from_numpy(array)

    def _send_divided(self, array: NDArray[Any]) -> Tensor:
        """An array with a part for each chip."""
        return self._send(array)

    def _send_sampling(self, sampling: Ints) -> tuple[Tensor, Tensor]:
        """In two pieces: XLA has no view of int32 as float32 through torch."""
        top_k, reals = split_sampling(sampling)
        return self._send(top_k), self._send(reals)

    def _edit(self, logits: Tensor, edits: LogitEdits | None) -> Tensor:
        """Apply edits in pieces of one size."""
        if edits is None:
            return logits
        edited = logits
        for piece in pieces(edits, logits.shape[0], self._num_chips, EDITS_AT_A_TIME):
            (edited,) = self._edit_chunk(edited, *(self._send_divided(array) for array in piece.arrays))
        return edited

    def _prompt_logprobs(self, hidden: Tensor, plan: Plan) -> list[tuple[Chunk, LogprobTensors]]:
        found = []
        at = len(plan.decodes)
        for chunk in plan.chunks:
            next_ids = prompt_targets(chunk)
            for start in range(0, len(next_ids), self._request_buckets[0]):
                ids = next_ids[start : start + self._request_buckets[0]]
                first = chunk.start + start
                part = Chunk(chunk.sequence, first, first + len(ids), False)
                found.append((part, self._prompt_rows(hidden, at + start, ids, len(ids))))
            at += chunk.end - chunk.start
        return found

    def _prompt_rows(self, hidden: Tensor, start: int, ids: list[int], count: int) -> LogprobTensors:
        rows = np.full(self._request_buckets[0], start, np.int32)
        rows[:count] = np.arange(start, start + count)
        targets = np.zeros(self._num_last_ids, np.int32)
        targets[: len(ids)] = ids
        (logits,) = self._head(hidden, self._send(rows))
        return LogprobTensors(*self._logprobs(logits, self._send(targets)))

    def _counter_tensors(self) -> dict[str, Tensor]:
        """Besides the caches, what a forward pass writes to, by name."""
        return {f"{name}.{COUNTER}": module.num_dropped for name, module in counting(self._model)}

    def _forward_eager(self, shape: StepShape, ints: Tensor, last_ids: Tensor, *state: Tensor) -> list[Tensor]:
        """The state afterwards, in the same memory, hidden states [T, H], logits [R, V].

        In this order, because XLA pairs what is donated with results of the same type as they come.
        """
        mark_as_donated(list(state))
        num_written = len(state) - len(self._counters)
        caches = split_layers(state[:num_written], self._model.config.num_layers, self._pages)
        counters = dict(zip(self._counters, state[num_written:], strict=True))
        step = unpack(ints, shape, self._page_size, None).fed(last_ids)
        hidden: Tensor = functional_call(self._model, counters, (step.batch, caches))
        return [*state, hidden, self._model.logits(hidden[step.sample_index])]

    def _head_eager(self, hidden: Tensor, rows: Tensor) -> list[Tensor]:
        return [self._model.logits(hidden[rows])]

    def _greedy_eager(self, logits: Tensor) -> list[Tensor]:
        return [self._feed(greedy(logits))]

    def _sample_eager(self, logits: Tensor, top_k: Tensor, reals: Tensor) -> list[Tensor]:
        temperature, top_p, min_p, uniform = reals.unbind()
        params = SamplingTensors(temperature, top_k, top_p, min_p, uniform)
        return [self._feed(sample(logits, params, any_filter=True))]

    def _feed(self, ids: Tensor) -> Tensor:
        """One size for the next step's feed, whatever the bucket."""
        return functional.pad(ids, (0, self._num_last_ids - ids.shape[0]))

    def _edit_eager(self, logits: Tensor, row: Tensor, token: Tensor, factor: Tensor, addend: Tensor) -> list[Tensor]:
        return [apply_edits(logits, row, token, factor, addend)]

    def _logprobs_eager(self, logits: Tensor, token_ids: Tensor) -> Sequence[Tensor]:
        return logprobs_of(logits, token_ids[: logits.shape[0]], min(MAX_LOGPROBS, logits.shape[-1])).tensors


def request_buckets(largest: int, num_chips: int) -> list[int]:
    """Request counts that programs are compiled for, up to the first that holds `largest`: chips divide them."""
    return buckets(-(-MIN_REQUESTS // num_chips) * num_chips, largest)
