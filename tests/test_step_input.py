"""Packing a plan: positions, slots, rows and padding, worked out by hand."""

from __future__ import annotations

import numpy as np
import torch

from torchinfer.request import SamplingParams
from torchinfer.scheduler import Chunk, Plan
from torchinfer.sequence import Sequence
from torchinfer.step_input import StepShape, buckets, pack, sampling_record, unpack, unpack_sampling

PAGE_SIZE = 4
PAGE_TABLE = np.array([[3, 5, 0], [7, 2, 9]], np.int32)


def sequence(tokens: list[int], num_prompt: int, num_computed: int, row: int, **params: object) -> Sequence:
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    rest = {"priority": 0, "arrival": 0, "stop_ids": frozenset(), "max_length": 99}
    record = sampling_record(sampling, 3)
    found = Sequence("r", 0, tokens[:num_prompt], sampling, sampling_record=record, **rest)
    found.tokens, found.num_computed, found.row = tokens, num_computed, row
    return found


def plan() -> Plan:
    """A decode of token 15 at position 5 in row 1, and tokens 1 to 3 of a prompt of six in row 0."""
    decode = sequence([10, 11, 12, 13, 14, 15], 4, 6, 1, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)
    prompt = sequence([20, 21, 22, 23, 24, 25], 6, 4, 0)
    return Plan([decode], [-1], [Chunk(prompt, 1, 4, samples=False)], 4, 6, sampled=[decode], all_greedy=False)


def test_exact_shapes() -> None:
    step = pack(plan(), PAGE_TABLE, PAGE_SIZE, StepShape(4, 2, 3))
    assert step.tokens.tolist() == [15, 21, 22, 23]
    assert step.positions.tolist() == [5, 1, 2, 3]
    assert step.slot.tolist() == [2 * 4 + 1, 3 * 4 + 1, 3 * 4 + 2, 3 * 4 + 3]
    assert step.row.tolist() == [0, 1, 1, 1]
    assert step.rope_length.tolist() == [6, 6, 6, 6]
    assert step.query_start.tolist() == [0, 1, 4]
    assert step.kv_length.tolist() == [6, 4]
    assert step.page_table.tolist() == [[7, 2, 9], [3, 5, 0]]
    assert step.sample_index.tolist() == [0, 0]


def test_padding_goes_to_page_zero_and_the_last_row() -> None:
    step = pack(plan(), PAGE_TABLE, PAGE_SIZE, StepShape(8, 4, 3))
    assert step.slot[4:].tolist() == [0] * 4 and step.positions[4:].tolist() == [0] * 4
    assert step.row[4:].tolist() == [1] * 4 and step.feed[4:].tolist() == [-1] * 4
    assert step.query_start.tolist() == [0, 1, 4, 4, 4]
    assert step.kv_length.tolist() == [6, 4, 0, 0]


def test_unpacking_gives_views_and_the_hosts_knowledge() -> None:
    shape = StepShape(4, 2, 3)
    packed = torch.from_numpy(pack(plan(), PAGE_TABLE, PAGE_SIZE, shape).packed)
    batch = unpack(packed[: shape.num_forward], shape, PAGE_SIZE, plan()).batch
    assert batch.tokens.tolist() == [15, 21, 22, 23] and batch.page_table.tolist() == [[7, 2, 9], [3, 5, 0]]
    assert (batch.num_decodes, batch.max_decode_kv_length, batch.prefills) == (1, 6, ((1, 1, 4, 4),))
    without = unpack(packed[: shape.num_forward], shape, PAGE_SIZE, None).batch
    assert (without.num_decodes, without.max_decode_kv_length, without.prefills) == (None, None, None)
    assert batch.tokens.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_sampling_parameters_survive_the_trip_as_bits() -> None:
    shape = StepShape(4, 2, 3)
    packed = torch.from_numpy(pack(plan(), PAGE_TABLE, PAGE_SIZE, shape).packed)
    sampling = unpack_sampling(packed[shape.num_forward :]).first(1)
    assert sampling.top_k.tolist() == [5]
    expected = torch.tensor([0.7, 0.9, 0.1])
    torch.testing.assert_close(torch.cat((sampling.temperature, sampling.top_p, sampling.min_p)), expected)
    assert 0 <= sampling.uniform.item() < 1


def test_padded_rows_that_decode_are_requests_of_one_token_in_page_zero() -> None:
    decode = plan().decodes[0]
    shape = StepShape(4, 4, 3, is_decode=True)
    memory = np.full(shape.size, -7, np.int32)
    step = pack(Plan([decode], [-1], [], 1, 6, sampled=[decode]), PAGE_TABLE, PAGE_SIZE, shape, memory)
    assert step.packed is memory
    assert step.tokens.tolist() == [15, 0, 0, 0] and step.positions.tolist() == [5, 0, 0, 0]
    assert step.slot.tolist() == [2 * 4 + 1, 0, 0, 0] and step.rope_length.tolist() == [6, 1, 1, 1]
    assert step.kv_length.tolist() == [6, 1, 1, 1] and step.query_start.tolist() == [0, 1, 2, 3, 4]
    assert step.row.tolist() == step.sample_index.tolist() == [0, 1, 2, 3] and step.feed.tolist() == [-1] * 4
    assert step.page_table.tolist() == [[7, 2, 9], [0] * 3, [0] * 3, [0] * 3]
    batch = unpack(torch.from_numpy(memory)[: shape.num_forward], shape, PAGE_SIZE, None).batch
    assert (batch.num_decodes, batch.max_decode_kv_length, batch.prefills) == (4, 12, ())


def test_fed_tokens_come_from_the_last_steps_ids() -> None:
    fed = plan()
    fed.feed = [2]
    shape = StepShape(4, 2, 3)
    packed = torch.from_numpy(pack(fed, PAGE_TABLE, PAGE_SIZE, shape).packed)
    step = unpack(packed[: shape.num_forward], shape, PAGE_SIZE, fed).fed(torch.tensor([90, 91, 92], dtype=torch.int32))
    assert step.batch.tokens.tolist() == [92, 21, 22, 23]


def test_buckets_are_powers_of_two_that_hold_the_largest() -> None:
    assert buckets(16, 16) == [16]
    assert buckets(8, 64) == [8, 16, 32, 64]
    assert buckets(16, 500) == [16, 32, 64, 128, 256, 512]
    assert buckets(128, 2049, 4) == [128, 512, 2048, 8192]
