"""One step's input as one array: packed on the host, sent in one transfer, taken apart on the device.

    int32[size]:  6 x T (tokens, positions, slot, row, rope_length, feed) | 2 x R (kv_length, sample_index)
                | R + 1 query_start | R x W page_table | R top_k | 4 x R float32 bits

T tokens, R request rows, W pages per row: padded to buckets on XLA (see batch.py) and where requests decode on CUDA,
exact elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer.batch import Batch, SamplingTensors
from torchinfer.request import SamplingParams
from torchinfer.scheduler import Plan
from torchinfer.sequence import Sequence

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The padded sizes of a step; one compiled program each on XLA, one graph each on CUDA."""

    num_tokens: int
    num_requests: int
    table_width: int
    is_decode: bool = False  # each row has one token, those that pad, too: they are requests in page 0

    @property
    def ends(self) -> tuple[int, int, int, int, int]:
        """Where the sections end: per token, per request, query_start, page table, sampling."""
        requests = 6 * self.num_tokens + 2 * self.num_requests
        table = requests + self.num_requests + 1
        forward = table + self.num_requests * self.table_width
        return 6 * self.num_tokens, requests, table, forward, forward + 5 * self.num_requests

    @property
    def num_forward(self) -> int:
        """Numbers that the forward pass needs; those for sampling, 5 * R, come behind them."""
        return self.ends[3]

    @property
    def size(self) -> int:
        return self.ends[4]


@dataclass(frozen=True, slots=True)
class StepInput:
    """A step on the device."""

    batch: Batch
    feed: Tensor  # [T] int32, row of the last step's ids that holds this token; -1 where `batch.tokens` has it
    sample_index: Tensor  # [R] int32, the token whose hidden state is sampled from

    def fed(self, last_ids: Tensor) -> StepInput:
        """The same step with the tokens that the last step sampled put in."""
        tokens = torch.where(self.feed >= 0, last_ids[self.feed.clamp(min=0)], self.batch.tokens)
        return replace(self, batch=replace(self.batch, tokens=tokens))


@dataclass(slots=True)
class PackedStep:
    """The sections of a packed step as views into one array."""

    packed: Ints  # [size]
    tokens: Ints
    positions: Ints
    slot: Ints
    row: Ints
    rope_length: Ints
    feed: Ints
    kv_length: Ints
    sample_index: Ints
    query_start: Ints
    page_table: Ints  # [R, W]
    sampling: Ints  # [5 * R]

    @classmethod
    def empty(cls, shape: StepShape, memory: Ints | None = None) -> Self:
        """All zeros, in memory [size] that is given, or in its own."""
        a, b, c, d, end = shape.ends
        packed = np.empty(end, np.int32) if memory is None else memory
        packed[:] = 0
        per_token = packed[:a].reshape(6, shape.num_tokens)
        per_request = packed[a:b].reshape(2, shape.num_requests)
        page_table = packed[c:d].reshape(shape.num_requests, shape.table_width)
        parts = [packed, *per_token, *per_request, packed[b:c], page_table, packed[d:]]
        return cls(*parts)


def buckets(smallest: int, largest: int, factor: int = 2) -> list[int]:
    """`smallest` times powers of `factor`, up to the first that holds `largest`."""
    sizes = [smallest]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] * factor)
    return sizes


def pack(plan: Plan, page_table: Ints, page_size: int, shape: StepShape, memory: Ints | None = None) -> PackedStep:
    """Write a plan into one array. `page_table` is the scheduler's, [rows, pages]; `memory`: see `PackedStep.empty`."""
    step = PackedStep.empty(shape, memory)
    _pack_decodes(plan, step)
    _pack_chunks(plan, step)
    rows = [s.row for s in plan.decodes] + [chunk.sequence.row for chunk in plan.chunks]
    step.page_table[: len(rows)] = page_table[rows, : shape.table_width]
    if shape.is_decode:
        _pack_decode_padding(len(rows), step)
    elif plan.num_tokens < shape.num_tokens or len(rows) < shape.num_requests:
        _pack_padding(plan.num_tokens, len(rows), step)
    n = plan.num_tokens
    page, offset = np.divmod(step.positions[:n], page_size)
    np.add(step.page_table[step.row[:n], page] * page_size, offset, out=step.slot[:n])
    if not plan.all_greedy:  # nobody reads them otherwise
        _pack_sampling(plan.sampled, step.sampling)
    return step


def _pack_decodes(plan: Plan, step: PackedStep) -> None:
    n = len(plan.decodes)
    step.query_start[: n + 1] = numbers = np.arange(n + 1)
    if n:
        step.tokens[:n] = [s.tokens[-1] for s in plan.decodes]
        step.kv_length[:n] = step.rope_length[:n] = [s.num_computed for s in plan.decodes]
        np.subtract(step.kv_length[:n], 1, out=step.positions[:n])
        step.feed[:n] = plan.feed
        step.row[:n] = step.sample_index[:n] = numbers[:n]


def _pack_chunks(plan: Plan, step: PackedStep) -> None:
    at = sampled = len(plan.decodes)
    for index, chunk in enumerate(plan.chunks, start=len(plan.decodes)):
        here = slice(at, at + chunk.end - chunk.start)
        at = here.stop
        step.tokens[here] = chunk.sequence.tokens[chunk.start : chunk.end]
        step.positions[here] = np.arange(chunk.start, chunk.end)
        step.rope_length[here] = np.maximum(step.positions[here] + 1, chunk.sequence.num_prompt)
        step.row[here] = index
        step.feed[here] = -1
        step.query_start[index + 1] = at
        step.kv_length[index] = chunk.end
        if chunk.samples:
            step.sample_index[sampled] = at - 1
            sampled += 1


def _pack_padding(num_tokens: int, num_rows: int, step: PackedStep) -> None:
    """Padded tokens: slot 0, position 0, the last row. Padded rows: no tokens, no context."""
    step.query_start[num_rows + 1 :] = num_tokens
    step.row[num_tokens:] = max(num_rows - 1, 0)
    step.rope_length[num_tokens:] = 1
    step.feed[num_tokens:] = -1


def _pack_decode_padding(num_rows: int, step: PackedStep) -> None:
    """Padded rows: a request of one token, at position 0 of page 0, which it writes and reads."""
    numbers = np.arange(num_rows, len(step.kv_length) + 1)
    step.query_start[num_rows:] = numbers
    step.row[num_rows:] = step.sample_index[num_rows:] = numbers[:-1]
    step.kv_length[num_rows:] = step.rope_length[num_rows:] = 1
    step.feed[num_rows:] = -1


def split_sampling(sampling: Ints) -> tuple[Ints, NDArray[np.float32]]:
    """top_k [R] and the bits of temperature, top_p, min_p and uniform [4, R], as views."""
    num_requests = len(sampling) // 5
    return sampling[:num_requests], sampling[num_requests:].view(np.float32).reshape(4, num_requests)


def sampling_record(params: SamplingParams, seed: int) -> bytes:
    """What a sequence's rows have in common, as `RECORD`; made once, because there are many steps."""
    key = _mix(np.array([seed], np.uint64) + GAMMA)  # close seeds give keys far apart
    reals = np.array([params.temperature, params.top_p, params.min_p], np.float32)
    return np.int32(params.top_k).tobytes() + reals.tobytes() + key.tobytes()


def _pack_sampling(sampled: list[Sequence], sampling: Ints) -> None:
    n, rows = len(sampled), sampling.reshape(5, -1)
    rows[2, n:].view(np.float32)[:] = 1.0  # top_p
    records = np.frombuffer(b"".join([s.sampling_record for s in sampled]), RECORD)
    rows[:4, :n] = records["params"].T
    # The index of the new token among the outputs: all before it are computed in this step.
    counts = np.array([s.num_computed - s.num_prompt for s in sampled], np.uint64)
    rows[4, :n] = uniform_numbers(records["key"], counts).view(np.int32)


RECORD = np.dtype([("params", np.int32, 4), ("key", np.uint64)])  # top_k; bits of temperature, top_p, min_p
GAMMA, FIRST, SECOND = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)


def uniform_numbers(keys: NDArray[np.uint64], counts: NDArray[np.uint64]) -> NDArray[np.float32]:
    """One number in [0, 1) for each (key, count), 24 bits: SplitMix64 (Steele et al., OOPSLA 2014) of their mix."""
    bits = _mix(keys + counts * GAMMA)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    return z ^ (z >> np.uint64(31))


def unpack(packed: Tensor, shape: StepShape, page_size: int, plan: Plan | None) -> StepInput:
    """Take the forward part of a packed step, [num_forward], apart as views.

    `plan` gives the host's knowledge; None leaves it out (XLA). Where rows decode, the shape knows enough.
    """
    a, b, c, d, _ = shape.ends
    tokens, positions, slot, row, rope_length, feed = packed[:a].view(6, shape.num_tokens).unbind()
    kv_length, sample_index = packed[a:b].view(2, shape.num_requests).unbind()
    batch = Batch(
        tokens=tokens,
        positions=positions,
        slot=slot,
        row=row,
        rope_length=rope_length,
        query_start=packed[b:c],
        kv_length=kv_length,
        page_table=packed[c:d].view(shape.num_requests, shape.table_width),
        page_size=page_size,
        **_host_facts(shape, page_size, plan),
    )
    return StepInput(batch, feed, sample_index)


def _host_facts(shape: StepShape, page_size: int, plan: Plan | None) -> dict[str, Any]:
    """The fields of a batch that no device is asked for."""
    if shape.is_decode:
        longest = shape.table_width * page_size
        return {"num_decodes": shape.num_requests, "max_decode_kv_length": longest, "prefills": ()}
    if plan is None:
        return {}
    longest = plan.max_decode_kv_length
    return {"num_decodes": len(plan.decodes), "max_decode_kv_length": longest, "prefills": _prefills(plan)}


def unpack_sampling(sampling: Tensor) -> SamplingTensors:
    """The sampling part of a packed step, int32 [5 * R], as parameters; a view."""
    rows = sampling.view(5, -1)
    temperature, top_p, min_p, uniform = rows.view(torch.float32)[1:].unbind()
    return SamplingTensors(temperature, rows[0], top_p, min_p, uniform)


def _prefills(plan: Plan) -> tuple[tuple[int, int, int, int], ...]:
    at = len(plan.decodes)
    found = []
    for row, chunk in enumerate(plan.chunks, start=len(plan.decodes)):
        found.append((row, at, at + chunk.end - chunk.start, chunk.end))
        at = found[-1][2]
    return tuple(found)
