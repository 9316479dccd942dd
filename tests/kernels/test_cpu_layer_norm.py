"""The CPU library's LayerNorm on every level."""

from __future__ import annotations

import pytest
import torch

from torchinfer.kernels.cpu.layer_norm import layer_norm
from torchinfer.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(shape, dtype, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def vectors(size, dtype):
    return random((size,), dtype, 1), random((size,), dtype, 2)


def by_hand(x, weight, bias, epsilon):
    x = x.double()
    distance = x - x.mean(-1, keepdim=True)
    return distance / (distance.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 63), (5, 3, 24), (0, 8), (500, 1), (33, 500), (300, 128)])
def test_equals_float64_by_hand(level, shape, dtype):
    x, (weight, bias) = random(shape, dtype), vectors(shape[-1], dtype)
    actual = layer_norm(x, weight, bias, 1e-5)
    assert actual.dtype == dtype and actual.shape == x.shape
    assert_close(actual, by_hand(x, weight, bias, 1e-5))


def test_a_mean_far_from_zero_costs_no_precision(level):
    x, (weight, bias) = random((7, 63), torch.float32) + 256, vectors(63, torch.float32)
    assert_close(layer_norm(x, weight, bias, 1e-5), by_hand(x, weight, bias, 1e-5))


def test_what_lies_around_the_rows_is_not_read(level):
    wide, (weight, bias) = torch.full((7, 90), torch.nan), vectors(63, torch.float32)
    wide[:, 10:73] = random((7, 63), torch.float32)
    assert_close(layer_norm(wide[:, 10:73], weight, bias, 1e-5), by_hand(wide[:, 10:73], weight, bias, 1e-5))


def test_columns_that_are_apart_are_brought_together(level):
    x, (weight, bias) = random((48, 5), torch.bfloat16).T, vectors(96, torch.bfloat16)
    weight, bias = weight[::2], bias[::2]
    assert_close(layer_norm(x, weight, bias, 1e-5), by_hand(x, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others_or_the_threads(level, num_threads, dtype):
    x, (weight, bias) = random((200, 500), dtype), vectors(500, dtype)
    together = layer_norm(x, weight, bias, 1e-5)
    assert torch.equal(together, torch.cat([layer_norm(row[None], weight, bias, 1e-5) for row in x]))


def test_not_a_number_stays_in_its_row(level):
    x, (weight, bias) = random((3, 63), torch.bfloat16), vectors(63, torch.bfloat16)
    x[1, 62] = torch.nan
    assert layer_norm(x, weight, bias, 1e-5).isnan().any(1).tolist() == [False, True, False]


def test_vectors_of_another_length_are_refused(level):
    with pytest.raises(ValueError, match=r"\[3, 8\].*\[8\].*\[7\]"):
        layer_norm(torch.ones(3, 8), torch.ones(8), torch.ones(7), 1e-5)


def test_misaligned_memory_is_refused(level):
    odd = torch.zeros(41, dtype=torch.uint8)[1:].numpy().view("float32")
    with pytest.raises(ValueError, match="not aligned"):
        layer_norm(torch.from_numpy(odd).view(1, 10), torch.ones(10), torch.ones(10), 1e-5)
