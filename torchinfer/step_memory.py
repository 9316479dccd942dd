"""The memory of an accelerator whose steps allocate: what the largest steps take, and what is left for the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torchinfer.request import MAX_LOGPROBS, SamplingParams
from torchinfer.scheduler import Chunk, Plan
from torchinfer.sequence import Sequence
from torchinfer.step_input import Ints, buckets, sampling_record

GIB = 2**30
LEAST_TOKENS = 8  # of a step of the warm-up: kernels have tiles for 8 rows, and for twice as many up to 128
# Everything that a request can ask for and that takes memory.
PARAMS = SamplingParams(
    max_tokens=1, temperature=1.0, top_p=0.9, logprobs=MAX_LOGPROBS, prompt_logprobs=MAX_LOGPROBS, logit_bias={0: 1.0}
)
Step = tuple[Plan, Ints]  # with the page table that goes with it


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the bytes of a device go."""

    total: int
    taken: int  # before the cache is there: by the weights, and by whatever else is on the device
    step: int  # by the largest steps, measured
    graphs: int  # by graphs, which have memory of their own; as much as the largest step that they hold
    cache: int = 0

    @property
    def free(self) -> int:
        """What is left, for the cache or beside it."""
        return max(0, self.total - self.taken - self.step - self.graphs - self.cache)

    def __str__(self) -> str:
        names = ("taken before (weights, other programs)", "the largest step", "graphs", "the KV cache", "left")
        parts = (self.taken, self.step, self.graphs, self.cache, self.free)
        terms = " + ".join(f"{size / GIB:.2f} GiB {name}" for size, name in zip(parts, names, strict=True))
        return f"{self.total / GIB:.2f} GiB = {terms}"


def too_large(plan: Plan, memory: MemoryPlan | None, error: Exception) -> str:
    """What to say of a step that did not fit."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    planned = "" if memory is None else f" Planned at the start: {memory}."
    return (
        f"a step of {plan.num_tokens} tokens of {len(plan.decodes) + len(plan.chunks)} requests did not fit into the "
        f"device's memory, and its requests have been ended: {reason}{planned} Send them again; if it happens often, "
        "lower kv_cache_memory, max_num_batched_tokens or max_num_requests"
    )


def largest_steps(max_num_tokens: int, max_num_requests: int, table_width: int, page_size: int) -> tuple[Step, Step]:
    """The steps that take most: chunks of prompts up to all tokens, and as many requests as there can be, one of them
    at the end of the longest context. Their pages are page 0, which belongs to nobody."""
    longest = table_width * page_size
    decodes = [_sequence(1, row) for row in range(max_num_requests)]
    decodes[0].num_computed = longest
    plan = Plan(decodes, [-1] * max_num_requests, [], max_num_requests, longest, decodes, all_greedy=False)
    chunks = _chunk_step(max_num_tokens, max_num_requests, table_width, page_size)
    return chunks, (plan, np.zeros((max_num_requests, table_width), np.int32))


def warm_up_steps(max_num_tokens: int, max_num_requests: int, table_width: int, page_size: int) -> Iterator[Step]:
    """Steps after which every kernel has been compiled that a step can need: the largest first."""
    yield from largest_steps(max_num_tokens, max_num_requests, table_width, page_size)
    for num_tokens in buckets(LEAST_TOKENS, max_num_tokens)[:-1]:
        yield _chunk_step(num_tokens, max_num_requests, table_width, page_size)


def _chunk_step(num_tokens: int, max_num_requests: int, table_width: int, page_size: int) -> Step:
    """Prompts as long as they can be; fewer tokens where so many requests do not have them."""
    longest = table_width * page_size
    num_tokens = min(num_tokens, max_num_requests * longest)
    sizes = [longest] * (num_tokens // longest) + [num_tokens % longest]
    chunks = [Chunk(_sequence(size, row), 0, size, True) for row, size in enumerate(sizes) if size]
    sampled = [chunk.sequence for chunk in chunks]
    plan = Plan(chunks=chunks, num_tokens=num_tokens, sampled=sampled, all_greedy=False)
    return plan, np.zeros((len(chunks), table_width), np.int32)


def _sequence(num_tokens: int, row: int) -> Sequence:
    record = sampling_record(PARAMS, 0)
    sequence = Sequence(
        "warm-up",
        0,
        [0] * num_tokens,
        PARAMS,
        priority=0,
        arrival=0,
        stop_ids=frozenset(),
        max_length=num_tokens + 1,
        sampling_record=record,
    )
    sequence.num_computed, sequence.row = num_tokens, row
    return sequence
