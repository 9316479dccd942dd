"""Rotation and cache in one launch: the bits of the two ops one after the other, in the results and in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer import kernels
from torchinfer.batch import KVCache
from torchinfer.kernels.cuda import rotate_and_write as module
from torchinfer.kernels.cuda.rotary_embedding import rotary_embedding
from torchinfer.kernels.cuda.rotate_and_write import rotate_and_write
from torchinfer.kernels.cuda.write_kv_pages import write_kv_pages
from torchinfer.kernels.reference.rotate_and_write import rotate_and_write as reference
from torchinfer.testing import assert_close, poisoned_cache

SHAPES = [  # queries' heads, key-value heads, head size, angles
    (1, 1, 2, 1),
    (5, 1, 64, 32),
    (4, 2, 80, 32),
    (6, 3, 96, 48),
    (9, 9, 128, 64),
    (3, 1, 256, 32),
    (71, 1, 64, 7),
]
CACHES = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
PAGE_SIZE = 4


def make_step(
    shape: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query_key, value, cos and sin: heads of one wider tensor, as a layer has them, with NaN around them."""
    num_heads, num_kv_heads, size, num_angles = shape
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.full((num_tokens + 2, num_heads + 2 * num_kv_heads + 2, size + 3), torch.nan).to(dtype)
    inside = rows[1:-1, 1:-1, 1:-2]
    inside.copy_(torch.randn(inside.shape, generator=generator) * 3)
    angles = torch.randn(num_tokens, num_angles, generator=generator) * 10
    query_key, value = rows.to(device)[1:-1, 1:-1, 1:-2].tensor_split((num_heads + num_kv_heads,), 1)
    return query_key, value, angles.cos().to(device), angles.sin().to(device)


def one_by_one(
    query_key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool, kv_cache: KVCache, slot: Tensor
) -> Tensor:
    """The kernels of the two ops."""
    rotated = rotary_embedding(query_key, cos, sin, is_interleaved)
    write_kv_pages(rotated[:, -value.shape[1] :], value, kv_cache, slot)
    return rotated[:, : -value.shape[1]]


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(*(x.contiguous().cpu().view(torch.uint8) for x in (actual, expected)))


def results(call: Any, step: tuple[Tensor, ...], is_interleaved: bool, cache: torch.dtype, slot: Tensor) -> Any:
    """The rotated queries, and what is in the cache then."""
    _, num_kv_heads, size = step[1].shape
    kv_cache = poisoned_cache((2, 5, PAGE_SIZE, num_kv_heads, size), cache, slot.device)
    return call(*step, is_interleaved, kv_cache, slot), kv_cache.tensors


@pytest.fixture
def only_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ops by themselves are not to be had by the one."""

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("rotated or written by itself")

    monkeypatch.setattr(module, "rotary_embedding", refuse)
    monkeypatch.setattr(module, "write_kv_pages", refuse)


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_launch_has_the_bits_of_two(
    gpu: str, shape: tuple[int, int, int, int], is_interleaved: bool, cache: torch.dtype, only_fused: None
) -> None:
    slot = torch.tensor([7, 19, 5], dtype=torch.int32, device=gpu)
    for dtype in (torch.bfloat16, torch.float32):
        step = make_step(shape, len(slot), dtype, gpu)
        actual, written = results(rotate_and_write, step, is_interleaved, cache, slot)
        expected, wanted = results(one_by_one, step, is_interleaved, cache, slot)
        assert_same_bits(actual, expected)
        for ours, theirs in zip(written, wanted, strict=True):
            assert_same_bits(ours, theirs)
        rotated, _ = results(reference, step, is_interleaved, cache, slot)
        assert_close(actual, rotated)


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_padded_tokens_share_slot_zero_and_slots_outside_of_the_cache_are_not_written(
    gpu: str, cache: torch.dtype
) -> None:
    slot = torch.tensor([6, 0, 0, -1, 20, 2**31 - 1], dtype=torch.int32, device=gpu)
    step = make_step((3, 2, 24, 8), len(slot), torch.bfloat16, gpu)
    for tensor in step:
        tensor[2] = tensor[1]  # on a card, which of two that share a slot stays is open
    memory = torch.zeros(4, 5, PAGE_SIZE, 2, 24, device=gpu).to(cache)
    scale = torch.zeros(4, 5, PAGE_SIZE, 2, device=gpu) if cache.itemsize == 1 else None
    kv_cache = KVCache(memory[1:3], None if scale is None else scale[1:3])
    actual = rotate_and_write(*step, False, kv_cache, slot)
    expected, wanted = results(one_by_one, step, False, cache, slot)
    assert_same_bits(actual, expected)
    for ours, theirs in zip(kv_cache.tensors, wanted, strict=True):
        for flat in (0, 6):
            place = (slice(None), flat // PAGE_SIZE, flat % PAGE_SIZE)
            assert_same_bits(ours[place], theirs[place])
    for tensor in (memory, *(() if scale is None else (scale,))):
        is_written = tensor.view(torch.uint8).flatten(3).any(3)  # [4, pages, page size]
        assert is_written.nonzero().tolist() == [[half, *place] for half in (1, 2) for place in ([0, 0], [1, 2])]


def test_a_row_that_is_broken_does_not_look_sound_and_harms_no_other(gpu: str) -> None:
    slot = torch.tensor([1, 2], dtype=torch.int32, device=gpu)
    step = make_step((2, 2, 16, 4), 2, torch.bfloat16, gpu)
    step[0][0, 3, 5], step[1][0, 0, 9] = torch.nan, torch.inf
    _, (_, scale) = results(rotate_and_write, step, False, torch.int8, slot)
    assert scale[:, 0, 1].isfinite().tolist() == [[True, False], [False, True]] and scale[:, 0, 2].isfinite().all()


def test_without_tokens_or_angles_it_is_two_ops(gpu: str) -> None:
    for num_tokens, num_angles in ((0, 4), (2, 0)):
        slot = torch.arange(num_tokens, dtype=torch.int32, device=gpu)
        step = make_step((2, 1, 16, num_angles), num_tokens, torch.bfloat16, gpu)
        actual, written = results(rotate_and_write, step, True, torch.int8, slot)
        expected, wanted = results(one_by_one, step, True, torch.int8, slot)
        assert actual.shape == (num_tokens, 2, 16)
        assert_same_bits(actual, expected)
        for ours, theirs in zip(written, wanted, strict=True):
            assert_same_bits(ours, theirs)


def test_where_a_device_has_no_port_the_door_calls_its_two_ops() -> None:
    slot = torch.tensor([7, 19, 5], dtype=torch.int32)
    step = make_step((4, 2, 24, 8), 3, torch.float32, "cpu")

    def two_ops(query_key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        *angles, kv_cache, slot = rest
        query, key = kernels.rotary_embedding(query_key, *angles).tensor_split((4,), 1)
        kernels.write_kv_pages(key, value, kv_cache, slot)
        return query

    assert "rotate_and_write" not in kernels.load_ports("cpu")
    actual, written = results(kernels.rotate_and_write, step, False, torch.int8, slot)
    expected, wanted = results(two_ops, step, False, torch.int8, slot)
    for ours, theirs in zip((actual, *written), (expected, *wanted), strict=True):
        assert_same_bits(ours, theirs)


def test_what_does_not_fit_is_refused(gpu: str) -> None:
    slot = torch.tensor([1, 2], dtype=torch.int32, device=gpu)
    query_key, value, cos, sin = make_step((2, 2, 16, 4), 2, torch.bfloat16, gpu)
    with pytest.raises(ValueError, match=r"\[2, 2, 15\]"):
        results(rotate_and_write, (query_key, value[..., 1:], cos, sin), False, torch.int8, slot)
    with pytest.raises(ValueError, match=r"cos and sin float32.*\[1, 4\]"):
        results(rotate_and_write, (query_key, value, cos[:1], sin), False, torch.int8, slot)
    with pytest.raises(ValueError, match="int32"):
        results(rotate_and_write, (query_key, value, cos, sin), False, torch.int8, slot.long())
    with pytest.raises(ValueError, match=r"\[T, H \+ K, D\].*\[2, 32\]"):
        rotate_and_write(
            query_key, value.flatten(1), cos, sin, False, poisoned_cache((2, 5, 4, 2, 16), torch.int8), slot
        )
