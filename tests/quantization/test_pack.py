"""Packing against loops in float64, and what no reference is needed for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchinfer import kernels
from torchinfer.quantization import SCHEMES, Scheme

SHAPES = [(1, 128), (5, 256), (130, 384), (257, 128)]
BY_ROW = [name for name, scheme in SCHEMES.items() if scheme.row_block == 1]


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)


def unpacked(scheme: Scheme, weight: Tensor) -> Tensor:
    """float64: what the packed matrix stands for."""
    return kernels.dequantize(scheme.weight(scheme.pack(weight), weight.shape[1], ())).double()  # type: ignore[arg-type]


def test_int8_by_hand() -> None:
    packed = SCHEMES["int8"].pack(torch.tensor([[-254.0, 127.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0]]))
    assert packed["values"].tolist() == [[-127, 64, 1, 2], [0, 0, 0, 0]]  # 63.5 and 2.5 to the even neighbour
    assert packed["scale"].tolist() == [[2.0], [1.0]]


def test_int4_by_hand() -> None:
    scheme = Scheme(name="int4", values=torch.uint8, column_block=4)
    packed = scheme.pack(torch.tensor([[7.5, -7.5, 3.0, 0.0]]))
    # A scale of 0.94 would be nearer to 7.5, but cost more at 3.0 and -7.5.
    assert packed["scale"].tolist() == [[1.0]]
    assert packed["values"].tolist() == [[15 | 0 << 4, 11 | 8 << 4]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8_block"])
def test_scales_and_values_equal_a_loop_over_blocks(name: str, shape: tuple[int, int]) -> None:
    scheme, weight = SCHEMES[name], random_weight(shape)
    packed = scheme.pack(weight)
    columns = scheme.column_block or shape[1]
    for row in range(0, shape[0], scheme.row_block):
        for column in range(0, shape[1], columns):
            block = (slice(row, row + scheme.row_block), slice(column, column + columns))
            largest = 127 if name == "int8" else 448
            scale = weight[block].abs().max() / largest
            assert packed["scale"][row // scheme.row_block, column // columns] == scale
            exact = weight[block] / scale
            expected = exact.round().to(torch.int8) if name == "int8" else exact.to(torch.float8_e4m3fn)
            assert torch.equal(packed["values"][block].float(), expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    scale = SCHEMES["int8"].pack(weight)["scale"].double()
    error = (unpacked(SCHEMES["int8"], weight) - weight.double()).abs()
    assert (error <= scale * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("name", ["fp8", "fp8_block"])
def test_fp8_is_within_a_sixteenth(name: str) -> None:
    weight = random_weight((130, 384))
    error = (unpacked(SCHEMES[name], weight) - weight).abs()
    smallest = 2.0**-10 * SCHEMES[name].pack(weight)["scale"].max()  # half of the least step of e4m3fn
    assert (error <= weight.abs() / 16 + smallest).all()


@pytest.mark.parametrize("name", ["int4", "int4_g64", "int4_g32"])
def test_int4_has_less_error_in_every_group_than_without_clipping(name: str) -> None:
    scheme, weight = SCHEMES[name], random_weight((33, 256))
    groups = weight.view(33, -1, scheme.column_block or 0).double()
    scale = groups.abs().amax(2, keepdim=True) / 7.5
    plain = (groups / scale).round().clamp(-8, 7) * scale
    error = (unpacked(scheme, weight).view(groups.shape) - groups).square().sum(2)
    plain_error = (plain - groups).square().sum(2)
    assert (error <= plain_error * (1 + 1e-5)).all()
    assert error.sum() < 0.9 * plain_error.sum()


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_do_not_depend_on_those_that_come_with_them(name: str) -> None:
    scheme, weight = SCHEMES[name], random_weight((300, 256), torch.bfloat16)
    whole = scheme.pack(weight)
    pieces = [scheme.pack(piece) for piece in weight.split(scheme.row_block * (2 if scheme.row_block > 1 else 7))]
    for tensor, expected in whole.items():
        actual = torch.cat([piece[tensor] for piece in pieces])
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", ["int8", "fp8_block", "int4"])
def test_a_matrix_on_an_accelerator_is_few_launches(name: str) -> None:
    launched = 0

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal launched
            launched += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        SCHEMES[name].pack(torch.empty(8192, 4096, device="meta"))  # 128 MiB of float32
    assert 10 < launched < 700


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros(name: str) -> None:
    weight = random_weight((4, 128))
    weight[2] = 0
    if SCHEMES[name].row_block > 1:
        weight[:] = 0
    assert (unpacked(SCHEMES[name], weight)[2] == 0).all()


@pytest.mark.parametrize("size", [1e-38, 1e-44, 1e30])
@pytest.mark.parametrize("name", SCHEMES)
def test_numbers_of_any_size_give_finite_ones(name: str, size: float) -> None:
    result = unpacked(SCHEMES[name], random_weight((3, 128)) * size)
    assert result.isfinite().all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_not_finite_shows_in_the_scale(name: str, wrong: float) -> None:
    weight = random_weight((3, 128))
    weight[1, 77] = wrong
    assert not SCHEMES[name].pack(weight)["scale"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "rows", "columns", "words"),
    [
        ("int4", (8,), 4544, "4544 inputs are not a multiple of the group size 128: use int4_g64 or int4_g32"),
        ("int4", (8,), 100, "use int8"),
        ("fp8_block", (48, 48), 128, "parts of 48, 48 outputs are merged"),
        ("int8_w8a8", (8,), 131072, "may overflow int32, which holds 131071"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, rows: tuple[int, ...], columns: int, words: str) -> None:
    (problem,) = SCHEMES[name].problems(rows, columns)
    assert words in problem


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_those_of_the_tensors(name: str) -> None:
    weight = random_weight((130, 256))
    size = sum(tensor.numel() * tensor.element_size() for tensor in SCHEMES[name].pack(weight).values())
    assert SCHEMES[name].num_bytes(130, 256) == size
