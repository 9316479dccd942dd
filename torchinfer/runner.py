"""Runs plans on a device: one transfer in, forward, sampling on the device, one transfer of ids out.

`launch` returns at once where the device works on its own (CUDA, XLA), so that the next step can be planned
meanwhile; `collect` waits for that step, and not for one that was launched behind it. Ids that the host does not know
yet are fed from the last step's ids on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer.batch import KVCache
from torchinfer.decode_graphs import DecodeGraphs
from torchinfer.device import one_torch_thread, release_memory, start_copies
from torchinfer.errors import StepMemoryError
from torchinfer.kernels import greedy, sample
from torchinfer.logit_edits import LogitEdits, collect_edits
from torchinfer.models.decoder import Decoder
from torchinfer.models.moe import MoE
from torchinfer.request import TokenLogprobs
from torchinfer.sampler import LogprobTensors, apply_edits, logprobs_of
from torchinfer.scheduler import Chunk, Plan
from torchinfer.sequence import Sequence
from torchinfer.step_input import Ints, StepShape, pack, unpack, unpack_sampling
from torchinfer.step_memory import MemoryPlan, too_large, warm_up_steps

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
    """A step that runs, or has run, on the device. On CUDA its tensors are the host's, filled when `wait` returns."""

    plan: Plan
    ids: Tensor  # [>= sampled] int32
    logprobs: LogprobTensors | None
    prompt_logprobs: list[tuple[Chunk, LogprobTensors]]
    wait: Callable[[], None] | None = None  # None: reading the tensors waits


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
    """Runs each op as Python reaches it, in exact shapes: CPU and CUDA.

    Where all rows decode, `has_buckets` pads the step to one of a few shapes, which CUDA captures in graphs.
    """

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
        has_buckets: bool = False,
        memory: MemoryPlan | None = None,
    ) -> None:
        self.overlaps = device.type == "cuda"
        self.num_compilations = 0
        self._model = model
        self._kv_caches = kv_caches
        self._page_size = page_size
        self._device = device
        self._memory = memory
        self._has_own_threads = device.type == "cpu" and model.is_prepared()
        self._last_ids = torch.zeros(max_num_requests, dtype=torch.int32, device=device)
        self._sizes = (max_num_tokens, max_num_requests, table_width, page_size)
        self._graphs: DecodeGraphs | None = None
        if has_buckets:
            sizes = {"table_width": table_width, "max_num_requests": max_num_requests}
            self._graphs = DecodeGraphs(self._forward_decodes, page_size, device, **sizes)

    def warm_up(self, progress: bool) -> None:
        """On CUDA: compile the kernels that steps of any size need, and capture graphs."""
        if self._device.type != "cuda":
            return
        for plan, page_table in warm_up_steps(*self._sizes):
            self.collect(self.launch(plan, page_table))
        if self._graphs is not None:
            self._graphs.capture(progress)

    def launch(self, plan: Plan, page_table: Ints) -> Launched:
        try:
            with one_torch_thread() if self._has_own_threads else nullcontext():
                return self._launch(plan, page_table)
        except torch.OutOfMemoryError as error:
            message = too_large(plan, self._memory, error)
        # Behind the handler, whose traceback holds the step's tensors.
        release_memory(self._device)
        raise StepMemoryError(message)

    @torch.inference_mode()
    def _launch(self, plan: Plan, page_table: Ints) -> Launched:
        hidden, chosen, sampling = self._run_forward(plan, page_table)
        sampled = plan.sampled
        logits = self._model.logits(chosen)
        edited = self._edit(logits, collect_edits(sampled))
        if plan.all_greedy:
            ids = greedy(edited)
        else:
            parameters = unpack_sampling(sampling).first(len(sampled))
            ids = sample(edited, parameters, any_filter=any(s.has_filter for s in sampled))
        self._last_ids[: len(ids)] = ids
        return fetched(Launched(plan, ids, self._logprobs(logits, ids, sampled), self._prompt_logprobs(hidden, plan)))

    def _run_forward(self, plan: Plan, page_table: Ints) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, those that are sampled from [S, H], and the packed sampling parameters.

        The first are those of all tokens, [T, H], where some prompt's log-probabilities are wanted.
        """
        shape = None if self._graphs is None else self._graphs.shape_of(plan)
        if self._graphs is not None and shape is not None:
            hidden, packed = self._graphs.run(plan, page_table, shape)
            return hidden, hidden[: len(plan.sampled)], packed[shape.num_forward :]
        num_requests = len(plan.decodes) + len(plan.chunks)
        shape = StepShape(plan.num_tokens, num_requests, -(-plan.max_kv_length // self._page_size))
        packed = self._send(pack(plan, page_table, self._page_size, shape).packed)
        step = unpack(packed[: shape.num_forward], shape, self._page_size, plan)
        if max(plan.feed, default=-1) >= 0:
            step = step.fed(self._last_ids)
        wanted = step.sample_index[: len(plan.sampled)]
        if any(prompt_targets(chunk) for chunk in plan.chunks):
            hidden = self._model(step.batch, self._kv_caches)
            return hidden, hidden[wanted], packed[shape.num_forward :]
        # One at least: no kernel gets an empty matrix.
        rows = None if plan.num_tokens == len(wanted) else step.sample_index[: max(len(wanted), 1)]
        hidden = self._model(step.batch, self._kv_caches, rows)
        return hidden, hidden[: len(wanted)], packed[shape.num_forward :]

    def _forward_decodes(self, packed: Tensor, shape: StepShape) -> Tensor:
        """Hidden states [R, H] of a padded step; each row is sampled from."""
        step = unpack(packed[: shape.num_forward], shape, self._page_size, None).fed(self._last_ids)
        hidden: Tensor = self._model(step.batch, self._kv_caches)
        return hidden

    def collect(self, launched: Launched) -> StepOutput:
        return to_output(launched)

    def num_dropped_expert_tokens(self) -> int:
        return count_dropped(self._model)

    def _send(self, array: NDArray[Any]) -> Tensor:
        host = torch.from_numpy(array)
        if self._device.type != "cuda":
            return host.to(self._device)
        return host.pin_memory().to(self._device, non_blocking=True)

    def _edit(self, logits: Tensor, edits: LogitEdits | None) -> Tensor:
        if edits is None:
            return logits
        arrays = (edits.row, edits.token, edits.factor, edits.addend)
        return apply_edits(logits, *(self._send(array) for array in arrays))

    def _logprobs(self, logits: Tensor, ids: Tensor, sampled: list[Sequence]) -> LogprobTensors | None:
        num_top = max((s.params.logprobs for s in sampled if s.params.logprobs is not None), default=None)
        return None if num_top is None else logprobs_of(logits, ids, min(num_top, logits.shape[-1]))

    def _prompt_logprobs(self, hidden: Tensor, plan: Plan) -> list[tuple[Chunk, LogprobTensors]]:
        found = []
        at = len(plan.decodes)
        for chunk in plan.chunks:
            next_ids = prompt_targets(chunk)
            for start in range(0, len(next_ids), LOGITS_ROWS):
                ids = self._send(np.array(next_ids[start : start + LOGITS_ROWS], np.int32))
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
    return sum(int(module.num_dropped.item()) for _, module in counting(model))


def counting(model: Decoder) -> list[tuple[str, MoE]]:
    """By name, the layers that count what they drop."""
    modules = model.named_modules()
    return [(name, m) for name, m in modules if isinstance(m, MoE) and m.config.mode == "capacity"]


def fetched(launched: Launched) -> Launched:
    """The same step with its results on their way to the host."""
    found = [launched.logprobs, *(part for _, part in launched.prompt_logprobs)]
    logprobs = [each for each in found if each is not None]
    copies, wait = start_copies([launched.ids, *(tensor for each in logprobs for tensor in each.tensors)])
    rest = iter(copies[1:])
    on_host = [LogprobTensors(*(next(rest) for _ in each.tensors)) for each in logprobs]
    first = None if launched.logprobs is None else on_host.pop(0)
    chunks = [chunk for chunk, _ in launched.prompt_logprobs]
    return Launched(launched.plan, copies[0], first, list(zip(chunks, on_host, strict=True)), wait)


def to_output(launched: Launched) -> StepOutput:
    """Wait for the device and turn its tensors into plain values."""
    if launched.wait is not None:
        launched.wait()
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
