"""Runs plans on a device: one transfer in, forward, sampling on the device, one transfer of ids out.

`launch` returns at once where the device works on its own (CUDA, XLA), so that the next step can be planned
meanwhile; `collect` waits. Ids that the host does not know yet are fed from the last step's ids on the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from torchinfer.batch import KVCache
from torchinfer.device import one_torch_thread
from torchinfer.kernels import greedy, sample
from torchinfer.logit_edits import LogitEdits, collect_edits
from torchinfer.models.decoder import Decoder
from torchinfer.models.moe import MoE
from torchinfer.request import TokenLogprobs
from torchinfer.sampler import LogprobTensors, apply_edits, logprobs_of
from torchinfer.scheduler import Chunk, Plan
from torchinfer.sequence import Sequence
from torchinfer.step_input import Ints, StepShape, pack, unpack, unpack_sampling

LOGITS_ROWS = 64  # of prompt log-probabilities at a time: bounds the memory for [rows, vocabulary]


@dataclass(slots=True)
class PromptLogprobs:
    """Log-probabilities of prompt positions [start, start + len(entries))."""

    sequence: Sequence
    start: int
    entries: list[TokenLogprobs]


@dataclass(slots=True)
class StepOutput:
    """What a step gives to the host, in the order of `plan.sampled`."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by index in `plan.sampled`
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class Launched:
    """A step that runs, or has run, on the device."""

    plan: Plan
    ids: Tensor  # [>= sampled] int32
    logprobs: LogprobTensors | None
    prompt_logprobs: list[tuple[Chunk, LogprobTensors]]


class Runner(Protocol):
    """What the engine needs of a runner; `torchinfer.testing.FakeRunner` is another one."""

    overlaps: bool  # whether `launch` returns before the device has finished

    @property
    def num_compilations(self) -> int: ...

    def warm_up(self, progress: bool) -> None: ...
    def launch(self, plan: Plan, page_table: Ints) -> Launched: ...
    def collect(self, launched: Launched) -> StepOutput: ...
    def num_dropped_expert_tokens(self) -> int: ...


class EagerRunner:
    """Runs each op as Python reaches it: CPU and CUDA, exact shapes."""

    def __init__(self, model: Decoder, kv_caches: list[KVCache], page_size: int, device: torch.device) -> None:
        self.overlaps = device.type == "cuda"
        self.num_compilations = 0
        self._model = model
        self._kv_caches = kv_caches
        self._page_size = page_size
        self._device = device
        self._has_own_threads = device.type == "cpu" and model.is_prepared()
        self._last_ids = torch.zeros(1, dtype=torch.int32, device=device)

    def warm_up(self, progress: bool) -> None:
        """Nothing to compile."""

    def launch(self, plan: Plan, page_table: Ints) -> Launched:
        with one_torch_thread() if self._has_own_threads else nullcontext():
            return self._launch(plan, page_table)

    @torch.inference_mode()
    def _launch(self, plan: Plan, page_table: Ints) -> Launched:
        shape = StepShape(
            plan.num_tokens, len(plan.decodes) + len(plan.chunks), -(-plan.max_kv_length // self._page_size)
        )
        packed = self._send(pack(plan, page_table, self._page_size, shape).packed)
        step = unpack(packed[: shape.num_forward], shape, self._page_size, plan)
        if max(plan.feed, default=-1) >= 0:
            step = step.fed(self._last_ids)
        hidden: Tensor = self._model(step.batch, self._kv_caches)
        sampled = plan.sampled
        logits = self._model.logits(hidden[step.sample_index[: len(sampled)]])
        edited = self._edit(logits, collect_edits(sampled))
        if plan.all_greedy:
            ids = greedy(edited)
        else:
            sampling = unpack_sampling(packed[shape.num_forward :]).first(len(sampled))
            ids = sample(edited, sampling, any_filter=any(s.has_filter for s in sampled))
        self._last_ids = ids
        return Launched(plan, ids, self._logprobs(logits, ids, sampled), self._prompt_logprobs(hidden, plan))

    def collect(self, launched: Launched) -> StepOutput:
        return to_output(launched)

    def num_dropped_expert_tokens(self) -> int:
        return count_dropped(self._model)

    def _send(self, packed: Ints) -> Tensor:
        host = torch.from_numpy(packed)
        if self._device.type == "cpu":
            return host
        return host.pin_memory().to(self._device, non_blocking=True)

    def _edit(self, logits: Tensor, edits: LogitEdits | None) -> Tensor:
        if edits is None:
            return logits
        arrays = (edits.row, edits.token, edits.factor, edits.addend)
        return apply_edits(logits, *(torch.from_numpy(array).to(self._device) for array in arrays))

    def _logprobs(self, logits: Tensor, ids: Tensor, sampled: list[Sequence]) -> LogprobTensors | None:
        num_top = max((s.params.logprobs for s in sampled if s.params.logprobs is not None), default=None)
        return None if num_top is None else logprobs_of(logits, ids, min(num_top, logits.shape[-1]))

    def _prompt_logprobs(self, hidden: Tensor, plan: Plan) -> list[tuple[Chunk, LogprobTensors]]:
        found = []
        at = len(plan.decodes)
        for chunk in plan.chunks:
            next_ids = prompt_targets(chunk)
            for start in range(0, len(next_ids), LOGITS_ROWS):
                ids = torch.tensor(next_ids[start : start + LOGITS_ROWS], device=self._device)
                logits = self._model.logits(hidden[at + start : at + start + len(ids)])
                part = Chunk(chunk.sequence, chunk.start + start, chunk.start + start + len(ids), False)
                num_top = min(chunk.sequence.params.prompt_logprobs or 0, logits.shape[-1])
                found.append((part, logprobs_of(logits, ids, num_top)))
            at += chunk.end - chunk.start
        return found


def prompt_targets(chunk: Chunk) -> list[int]:
    """The prompt tokens whose log-probabilities the chunk's hidden states give; none where they are not wanted."""
    sequence = chunk.sequence
    if not sequence.wants_prompt_logprobs:
        return []
    return sequence.tokens[chunk.start + 1 : min(chunk.end + 1, sequence.num_prompt)]


def count_dropped(model: Decoder) -> int:
    """(token, expert) pairs that MoE layers in capacity mode have dropped since the start."""
    return sum(int(module.num_dropped.item()) for module in model.modules() if isinstance(module, MoE))


def to_output(launched: Launched) -> StepOutput:
    """Wait for the device and turn its tensors into plain values."""
    sampled = launched.plan.sampled
    # Cut on the host: slicing on XLA would be one more program for each length.
    output = StepOutput(launched.ids.tolist()[: len(sampled)])
    if launched.logprobs is not None:
        entries = to_entries(launched.logprobs, output.token_ids, [s.params.logprobs or 0 for s in sampled])
        output.logprobs = {row: e for row, e in enumerate(entries) if sampled[row].params.logprobs is not None}
    for part, tensors in launched.prompt_logprobs:
        ids = part.sequence.tokens[part.start + 1 : part.end + 1]
        num_top = part.sequence.params.prompt_logprobs or 0
        entries = to_entries(tensors, ids, [num_top] * len(ids))
        output.prompt_logprobs.append(PromptLogprobs(part.sequence, part.start + 1, entries))
    return output


def to_entries(tensors: LogprobTensors, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """One entry a position, with `num_top` alternatives each."""
    logprob, rank = tensors.logprob.tolist(), tensors.rank.tolist()
    top_ids, top_logprobs = tensors.top_ids.tolist(), tensors.top_logprobs.tolist()
    return [
        TokenLogprobs(token, logprob[i], rank[i], list(zip(top_ids[i][:k], top_logprobs[i][:k], strict=True)))
        for i, (token, k) in enumerate(zip(token_ids, num_top, strict=True))
    ]
