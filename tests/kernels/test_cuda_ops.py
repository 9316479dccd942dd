"""Norms, rotation, activations, cache writes and rows in 8 bits in Triton: on a GPU, or in its interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from torchinfer.batch import KVCache
from torchinfer.kernels.cuda.gated_activation import gated_activation
from torchinfer.kernels.cuda.quantize_rows import quantize_rows
from torchinfer.kernels.cuda.rms_norm import rms_norm
from torchinfer.kernels.cuda.rotary_embedding import rotary_embedding
from torchinfer.kernels.cuda.write_kv_pages import write_kv_pages
from torchinfer.kernels.reference.gated_activation import gated_activation as activation_reference
from torchinfer.kernels.reference.quantize_rows import quantize_groups
from torchinfer.kernels.reference.quantize_rows import quantize_rows as rows_reference
from torchinfer.kernels.reference.rms_norm import rms_norm as norm_reference
from torchinfer.kernels.reference.rotary_embedding import rotary_embedding as rotary_reference
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages as write_reference
from torchinfer.testing import assert_close, poisoned_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALED = [torch.int8, torch.float8_e4m3fn]


def random(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(x, y):
    return torch.equal(x.cpu().view(torch.uint8), y.cpu().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (9, 63), (3, 5000), (2, 3, 128)], ids=str)
def test_norms_equal_the_reference(gpu, shape, offset, dtype):
    x, weight = random(shape, dtype) * 3, random(shape[-1:], dtype, 1)
    actual = rms_norm(x.to(gpu), weight.to(gpu), 1e-6, offset)
    assert actual.dtype == dtype and actual.shape == x.shape
    assert_close(actual.cpu(), norm_reference(x.double(), weight.double(), 1e-6, offset), dtype)


def test_norms_of_heads_of_a_wider_row(gpu):
    wide = torch.full((5, 9, 40), torch.nan)
    wide[:, 2:5, :24] = random((5, 3, 24))
    heads = wide.to(gpu)[:, 2:5, :24]
    weight = random((24,), seed=1).to(gpu)
    assert_close(rms_norm(heads, weight, 1e-5, 0.0), norm_reference(heads, weight, 1e-5, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (9, 5, 24, 24), (4, 3, 24, 10), (3, 36, 80, 64)], ids=str)
def test_rotation_equals_the_reference(gpu, shape, is_interleaved, dtype):
    tokens, heads, size, rotated = shape
    x = random((tokens, heads + 2, size), dtype)[:, 1:-1]  # heads of a wider row
    angles = random((tokens, rotated // 2)) * 10
    actual = rotary_embedding(x.to(gpu), angles.cos().to(gpu), angles.sin().to(gpu), is_interleaved).cpu()
    assert_close(
        actual, rotary_reference(x.double(), angles.double().cos(), angles.double().sin(), is_interleaved), dtype
    )
    assert torch.equal(actual[..., rotated:], x[..., rotated:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 2), (7, 126), (2, 4100)], ids=str)
def test_activations_equal_the_reference(gpu, shape, activation, dtype):
    wide = random((shape[0], shape[1] + 3), dtype) * 4
    gate_up = wide[:, 1 : 1 + shape[1]]
    actual = gated_activation(gate_up.to(gpu), activation).cpu()
    assert actual.dtype == dtype
    assert_close(actual, activation_reference(gate_up.double(), activation), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_over_the_whole_range(gpu, activation):
    gate = torch.cat((torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-40, 3e4, -3e4])))
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    assert_close(
        gated_activation(gate_up.to(gpu), activation).cpu(), activation_reference(gate_up.double(), activation)
    )


def write_both(gpu, key, value, slot, cache_dtype, page_size=4):
    num_pages = -(-(int(slot.max()) + 1) // page_size) + 1
    caches = [poisoned_cache((2, num_pages, page_size, *key.shape[1:]), cache_dtype, device) for device in (gpu, "cpu")]
    write_kv_pages(key.to(gpu), value.to(gpu), caches[0], slot.to(gpu))
    write_reference(key, value, caches[1], slot)
    return caches


def assert_same(caches):
    for actual, expected in zip(caches[0].tensors, caches[1].tensors, strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize("cache_dtype", [*DTYPES, *SCALED])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 10), (7, 3, 63), (5, 20, 256)], ids=str)
def test_a_cache_is_written_bit_for_bit_as_by_the_reference(gpu, shape, dtype, cache_dtype):
    slot = torch.randperm(3 * shape[0], generator=torch.Generator().manual_seed(0))[: shape[0]].int()
    assert_same(write_both(gpu, random(shape, dtype), random(shape, dtype, 1) * 7, slot, cache_dtype))


@pytest.mark.parametrize("cache_dtype", SCALED)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30, 3e37])
def test_tiny_and_huge_rows_have_the_bits_of_the_reference(gpu, size, cache_dtype):
    rows = random((4, 3, 63)) * size
    assert_same(write_both(gpu, rows, -rows, torch.arange(4).int(), cache_dtype))


@pytest.mark.parametrize("dtype", SCALED)
def test_ties_and_every_step_have_the_bits_of_the_reference(gpu, dtype):
    largest = 127.0 if dtype == torch.int8 else 448.0
    steps = torch.cat((torch.arange(-1024, 1024) / 2048, torch.arange(-256, 256) / 2, torch.arange(-448.0, 448.0)))
    rows = torch.cat((steps.clamp(-largest, largest).view(4, -1), torch.full((4, 1), largest)), 1)  # the scale is 1
    for actual, expected in zip(quantize_rows(rows.to(gpu), dtype), rows_reference(rows, dtype), strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "group"), [(256, 128), (250, 128), (1100, 128), (70, 32), (640, 256)])
def test_groups_of_a_row_have_the_bits_of_the_reference(gpu, size, group, dtype):
    rows = random((3, size), dtype) * torch.tensor([1e-4, 1.0, 300.0])[:, None].to(dtype)
    rows[1, :group] = 0
    numbers, scale = quantize_rows(rows.to(gpu), torch.float8_e4m3fn, group=group)
    expected, expected_scale = quantize_groups(rows, torch.float8_e4m3fn, group)
    assert same_bits(numbers, expected) and same_bits(scale, expected_scale.T.contiguous())


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("scale", [[0.02], [0.02, 0.5, 0.01]], ids=str)
def test_with_a_scale_given_beforehand_numbers_beyond_it_are_cut_off(gpu, scale, dtype):
    rows, given = random((3, 70), torch.bfloat16) * 4, torch.tensor(scale)
    actual, _ = quantize_rows(rows.to(gpu), dtype, given.to(gpu))
    assert same_bits(actual, rows_reference(rows, dtype, given)[0])


@pytest.mark.parametrize("cache_dtype", SCALED)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_does_not_look_sound(gpu, broken, cache_dtype):
    rows = torch.ones(2, 2, 16)
    rows[0, :, 3] = broken
    kv_cache = KVCache(torch.zeros(2, 1, 4, 2, 16).to(cache_dtype).to(gpu), torch.zeros(2, 1, 4, 2, device=gpu))
    write_kv_pages(rows.to(gpu), rows.to(gpu), kv_cache, torch.tensor([1, 2], dtype=torch.int32, device=gpu))
    assert not kv_cache.scale[:, 0, 1].isfinite().any() and kv_cache.scale[:, 0, 2].isfinite().all()


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_keys_and_values_may_lie_apart_and_share_slot_zero(gpu, cache_dtype):
    wide = random((9, 9, 24), torch.bfloat16)
    slot = torch.tensor([3, 1, 2, 4, 5, 6, 7, 0, 0], dtype=torch.int32)
    wide[8] = wide[7]  # on a card, which of two that share a slot stays is open
    assert_same(write_both(gpu, wide[:, 2:5], wide[:, 5:8], slot, cache_dtype))


@pytest.mark.parametrize("slot", [-1, 8, 2**31 - 1])
def test_a_slot_outside_of_the_cache_is_not_written(gpu, slot):
    memory = torch.zeros(4, 2, 4, 2, 16, device=gpu)
    rows = torch.ones(2, 2, 16, device=gpu)
    write_kv_pages(rows, rows, KVCache(memory[1:3]), torch.tensor([3, slot], dtype=torch.int32, device=gpu))
    assert memory.count_nonzero() == 2 * 32 and memory[1:3, 0, 3].count_nonzero() == 2 * 32


def test_what_does_not_fit_is_refused(gpu):
    kv_cache, slot = KVCache(torch.zeros(2, 2, 4, 2, 16, device=gpu)), torch.tensor([3, 4], device=gpu).int()
    rows = torch.ones(2, 2, 16, device=gpu)
    with pytest.raises(ValueError, match=r"\[2, 2, 15\]"):
        write_kv_pages(rows[..., :15], rows[..., :15], kv_cache, slot)
    with pytest.raises(ValueError, match="int32"):
        write_kv_pages(rows, rows, kv_cache, slot.long())
    with pytest.raises(ValueError, match="contiguous"):
        write_kv_pages(rows, rows, KVCache(torch.zeros(2, 2, 2, 4, 16, device=gpu).transpose(2, 3)), slot)
    with pytest.raises(ValueError, match="8 bits has scales"):
        write_kv_pages(rows, rows, KVCache(kv_cache.data.to(torch.int8)), slot)
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        rotary_embedding(
            torch.ones(2, 3, 8, device=gpu), torch.ones(2, 5, device=gpu), torch.ones(2, 5, device=gpu), False
        )
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        gated_activation(torch.ones(2, 5, device=gpu), "silu")
    with pytest.raises(ValueError, match=r"\[7\]"):
        rms_norm(torch.ones(2, 8, device=gpu), torch.ones(7, device=gpu), 1e-6, 0.0)


def test_nothing_is_written_for_no_tokens(gpu):
    kv_cache, slot = KVCache(torch.zeros(2, 2, 4, 2, 16, device=gpu)), torch.zeros(0, dtype=torch.int32, device=gpu)
    write_kv_pages(torch.ones(0, 2, 16, device=gpu), torch.ones(0, 2, 16, device=gpu), kv_cache, slot)
    assert kv_cache.data.count_nonzero() == 0
