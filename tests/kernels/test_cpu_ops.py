"""Cache writes, rotary embedding and gated activations of the CPU library on every level."""

from __future__ import annotations

import pytest
import torch

from torchinfer.batch import KVCache
from torchinfer.kernels.cpu.gated_activation import gated_activation
from torchinfer.kernels.cpu.rotary_embedding import rotary_embedding
from torchinfer.kernels.cpu.write_kv_pages import write_kv_pages
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages as reference
from torchinfer.testing import assert_close, poisoned_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CACHES = [*DTYPES, torch.int8, torch.float8_e4m3fn]


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(x, y):
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def write_both(key, value, slot, cache_dtype, page_size=4):
    num_pages = -(-(int(slot.max()) + 1) // page_size) + 1
    caches = [poisoned_cache((2, num_pages, page_size, *key.shape[1:]), cache_dtype) for _ in range(2)]
    write_kv_pages(key, value, caches[0], slot)
    reference(key, value, caches[1], slot)
    return caches


def assert_same(caches):
    for actual, expected in zip(caches[0].tensors, caches[1].tensors, strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 10), (7, 3, 63), (130, 4, 64), (5, 2, 256)], ids=str)
def test_a_cache_is_written_bit_for_bit_as_by_the_reference(level, shape, dtype, cache_dtype):
    slot = torch.randperm(3 * shape[0], generator=torch.Generator().manual_seed(0))[: shape[0]].int()
    assert_same(write_both(random(shape, dtype), random(shape, dtype, 1) * 7, slot, cache_dtype))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e30, 3e37])
def test_tiny_and_huge_rows_have_the_bits_of_the_reference(level, size, cache_dtype):
    rows = random((20, 3, 63), torch.float32) * size
    assert_same(write_both(rows, -rows, torch.arange(20).int(), cache_dtype))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_ties_and_every_step_have_the_bits_of_the_reference(level, cache_dtype):
    largest = 127.0 if cache_dtype == torch.int8 else 448.0
    steps = torch.cat((torch.arange(-1024, 1024) / 2048, torch.arange(-256, 256) / 2, torch.arange(-448.0, 448.0)))
    rows = steps.clamp(-largest, largest).view(-1, 1, 8)
    rows = torch.cat((rows, torch.full((len(rows), 1, 1), largest)), -1)  # so that the scale is 1
    assert_same(write_both(rows, -rows, torch.arange(len(rows)).int(), cache_dtype))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_does_not_look_sound(level, broken, cache_dtype):
    rows = torch.ones(2, 2, 16)
    rows[0, :, 3] = broken
    kv_cache = KVCache(torch.zeros(2, 1, 4, 2, 16).to(cache_dtype), torch.zeros(2, 1, 4, 2))
    write_kv_pages(rows, rows, kv_cache, torch.tensor([1, 2], dtype=torch.int32))
    assert not kv_cache.scale[:, 0, 1].isfinite().any() and kv_cache.scale[:, 0, 2].isfinite().all()


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_keys_and_values_may_lie_apart_and_share_slot_zero(level, num_threads, cache_dtype):
    wide = random((300, 9, 24), torch.bfloat16)
    slot = torch.arange(300).int()
    slot[200:] = 0
    assert_same(write_both(wide[:, 2:5], wide[:, 5:8], slot, cache_dtype))


@pytest.mark.parametrize("slot", [-1, 8, 2**31 - 1])
def test_a_slot_outside_the_cache_is_refused_and_nothing_written(slot):
    kv_cache = KVCache(torch.zeros(2, 2, 4, 2, 16))
    with pytest.raises(ValueError, match="does not fit"):
        write_kv_pages(torch.ones(2, 2, 16), torch.ones(2, 2, 16), kv_cache, torch.tensor([3, slot]).int())
    assert kv_cache.data.count_nonzero() == 0


def test_keys_and_slots_that_do_not_fit_are_refused():
    kv_cache, rows, slot = KVCache(torch.zeros(2, 2, 4, 2, 16)), torch.ones(2, 2, 16), torch.tensor([3, 4]).int()
    with pytest.raises(ValueError, match=r"\[2, 2, 15\]"):
        write_kv_pages(rows[..., :15], rows[..., :15], kv_cache, slot)
    with pytest.raises(ValueError, match="bfloat16"):
        write_kv_pages(rows, rows.bfloat16(), kv_cache, slot)
    with pytest.raises(ValueError, match="int32"):
        write_kv_pages(rows, rows, kv_cache, slot.long())
    with pytest.raises(ValueError, match="int32"):
        write_kv_pages(rows, rows, kv_cache, slot[:1])
    with pytest.raises(ValueError, match="contiguous"):
        write_kv_pages(rows, rows, KVCache(torch.zeros(2, 2, 2, 4, 16).transpose(2, 3)), slot)
    write_kv_pages(rows[:0], rows[:0], kv_cache, slot[:0])
    assert kv_cache.data.count_nonzero() == 0


def rotated_by_hand(x, angles, is_interleaved):
    half, result = angles.shape[-1], x.double().clone()
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if is_interleaved else (i, half + i)
        a, b, cos, sin = (
            x[..., first].double(),
            x[..., second].double(),
            angles[:, None, i].cos(),
            angles[:, None, i].sin(),
        )
        result[..., first], result[..., second] = a * cos - b * sin, b * cos + a * sin
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (63, 5, 24, 24), (4, 3, 24, 10), (9, 3, 80, 64), (200, 36, 64, 64)])
def test_rotation_equals_float64(level, shape, is_interleaved, dtype):
    tokens, heads, size, rotated = shape
    x = random((tokens, heads + 2, size), dtype)[:, 1:-1]  # heads of a wider row
    angles = random((tokens, rotated // 2), torch.float64) * 10
    actual = rotary_embedding(x, angles.cos().float(), angles.sin().float(), is_interleaved)
    assert actual.dtype == dtype
    assert_close(actual, rotated_by_hand(x, angles, is_interleaved))
    assert torch.equal(actual[..., rotated:], x[..., rotated:])


def test_a_rotation_wider_than_the_head_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        rotary_embedding(torch.ones(2, 3, 8), torch.ones(2, 5), torch.ones(2, 5), False)
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        rotary_embedding(torch.ones(2, 3, 8), torch.ones(1, 4), torch.ones(1, 4), False)


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (7, 126), (3, 10000), (0, 8)])
def test_activations_equal_float64(level, shape, activation, dtype):
    wide = random((shape[0], shape[1] + 3), dtype) * 4
    gate_up = wide[:, 1 : 1 + shape[1]]
    gate, up = gate_up.double().chunk(2, -1)
    actual = gated_activation(gate_up, activation)
    assert actual.dtype == dtype
    assert_close(actual, ACTIVATIONS[activation](gate) * up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_range(level, activation):
    gate = torch.cat((torch.linspace(-200, 200, 40001), torch.tensor([0.0, -0.0, 1e-40, 3e4, -3e4])))
    actual = gated_activation(torch.cat((gate, torch.ones_like(gate)))[None], activation)[0]
    assert_close(actual, ACTIVATIONS[activation](gate.double()))
    broken = torch.tensor([[torch.nan, 1.0, 1.0, 1.0]])
    assert gated_activation(broken, activation).isnan().tolist() == [[True, False]]


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        gated_activation(torch.ones(2, 5), "silu")
