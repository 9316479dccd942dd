"""Matrices into fewer bits, in the CPU library: the bits of the reference, on every level."""

from __future__ import annotations

import math

import pytest
import torch

from torchinfer.kernels.cpu.quantize_matrix import quantize_matrix
from torchinfer.kernels.reference.quantize_matrix import quantize_matrix as reference
from torchinfer.quantization import SCHEMES

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BY_ROW = {"int8", "fp8", "fp8_block"}  # any number of columns
SHAPES = [(1, 128), (5, 384), (130, 256), (257, 1024)]
ODD_SHAPES = [(3, 1), (1, 15), (130, 77), (129, 300)]
CASES = [(name, shape) for name in ("int8", "fp8", "fp8_block", "int4", "int4_g32") for shape in SHAPES]
CASES += [(name, shape) for name in sorted(BY_ROW) for shape in ODD_SHAPES]


def random(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)


def empty(scheme, shape):
    """The scheme's tensors, each in front of a guard."""
    specs = scheme.tensors(*shape).values()
    memory = [
        torch.full((math.prod(spec.shape) * spec.dtype.itemsize + 64,), 0xA5, dtype=torch.uint8) for spec in specs
    ]
    return memory, [part[:-64].view(spec.dtype).view(spec.shape) for part, spec in zip(memory, specs, strict=True)]


def assert_same(name, weight):
    scheme = SCHEMES[name]
    column_block = scheme.column_block or weight.shape[1]
    (actual_memory, actual), (expected_memory, expected) = (empty(scheme, weight.shape) for _ in range(2))
    quantize_matrix(weight, *actual, scheme.row_block, column_block)
    reference(weight, *expected, scheme.row_block, column_block)
    for mine, other in zip(actual_memory, expected_memory, strict=True):
        assert torch.equal(mine, other)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "shape"), CASES, ids=str)
def test_bits_are_those_of_the_reference(level, name, shape, dtype):
    assert_same(name, random(shape, dtype))


@pytest.mark.parametrize("name", ["int8", "fp8_block", "int4_g64"])
def test_rows_may_lie_apart_and_threads_change_nothing(num_threads, name):
    wide = torch.full((300, 1024), torch.nan, dtype=torch.bfloat16)
    wide[:, 128:-128] = random((300, 768), torch.bfloat16)
    assert_same(name, wide[:, 128:-128])
    assert_same(name, random((768, 300 // 128 * 128), torch.float32).T)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-30, 1e19, 1e30])
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_block", "int4"])
def test_tiny_and_huge_numbers_have_the_bits_of_the_reference(level, name, size):
    assert_same(name, random((20, 128), torch.float32) * size)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_ties_and_every_step_have_the_bits_of_the_reference(level, name):
    largest = 127.0 if name == "int8" else 448.0
    steps = torch.cat((torch.arange(-1024, 1024) / 2048, torch.arange(-256, 256) / 2, torch.arange(-448.0, 448.0)))
    rows = steps.clamp(-largest, largest).view(-1, 32)
    assert_same(name, torch.cat((rows, torch.full((len(rows), 1), largest)), 1))  # so that the scale is 1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_block", "int4"])
def test_a_number_that_is_not_finite_shows_in_its_scale_only(level, name, broken):
    weight = random((3, 128), torch.bfloat16)
    weight[1, 77] = broken
    _, tensors = empty(SCHEMES[name], weight.shape)
    quantize_matrix(weight, *tensors, SCHEMES[name].row_block, 128)
    finite = tensors[1].isfinite().flatten().tolist()
    assert finite == ([False] if name == "fp8_block" else [True, False, True])


def test_no_rows_are_no_work():
    quantize_matrix(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.int8), torch.empty(0, 1), 1, 8)


@pytest.mark.parametrize(
    ("weight", "values", "scale", "blocks", "words"),
    [
        (torch.ones(4, 8).int(), torch.empty(4, 8).char(), torch.empty(4, 1), (1, 8), r"int32 \[4, 8\]"),
        (torch.ones(4, 8), torch.empty(4, 8).char(), torch.empty(4, 1), (0, 8), "blocks of 0 x 8"),
        (torch.ones(4, 8), torch.empty(4, 7).char(), torch.empty(4, 1), (1, 8), r"values are \[4, 8\]"),
        (torch.ones(4, 8), torch.empty(4, 8).char(), torch.empty(4, 2), (1, 8), r"float32 \[4, 1\]"),
        (torch.ones(4, 8), torch.empty(8, 4).char().T, torch.empty(4, 1), (1, 8), "contiguous"),
        (torch.ones(4, 8), torch.empty(4, 4).byte(), torch.empty(4, 3), (1, 3), "does not fit"),
        (torch.ones(4, 8), torch.empty(4, 8), torch.empty(4, 1), (1, 8), "does not fit"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_nothing_written(weight, values, scale, blocks, words):
    before = values.clone(), scale.clone()
    with pytest.raises(ValueError, match=words):
        quantize_matrix(weight, values, scale, *blocks)
    for tensor, copy in zip((values, scale), before, strict=True):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))
