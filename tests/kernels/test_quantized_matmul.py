"""Products with quantized matrices against float64, and the grouped ones of experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torchinfer.kernels.reference.dequantize import dequantize
from torchinfer.kernels.reference.grouped_matmul import grouped_matmul as grouped_reference
from torchinfer.kernels.reference.quantize_rows import quantize_groups, quantize_rows, round_groups
from torchinfer.kernels.reference.quantized_matmul import DTYPES as ROUNDED
from torchinfer.kernels.reference.quantized_matmul import quantized_matmul
from torchinfer.kernels.tpu.grouped_matmul import grouped_matmul as grouped_static
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import assert_close, exact_product

SHAPES = [(1, 128, 5), (3, 256, 130), (17, 384, 33), (0, 128, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(name: str, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    packed: dict[str, Tensor | None] = dict(SCHEMES[name].pack(weight))
    return SCHEMES[name].weight(packed, columns, ())


def random_input(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_equals_the_dequantized_matrix_in_float64(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    num_tokens, columns, rows = shape
    weight, x = random_weight(name, rows, columns), random_input(num_tokens, columns, dtype)
    actual = quantized_matmul(x, weight)
    assert actual.dtype == dtype
    assert_close(actual, exact_product(x, weight))


@pytest.mark.parametrize("name", SCHEMES)
def test_float16_holds_the_product_though_not_the_sum_of_integers(name: str) -> None:
    weight = random_weight(name, 4, 1024)
    weight = replace(weight, values=weight.values.view(torch.int8).fill_(0x77).view(weight.values.dtype))
    x = torch.full((1, 1024), 8.0, dtype=torch.float16)
    weight = replace(weight, scale=torch.full_like(weight.scale, 1e-3))
    assert_close(quantized_matmul(x, weight), exact_product(x, weight))


def test_integers_are_summed_exactly() -> None:
    columns = 20_000  # float32 alone would round the sum
    values = torch.full((2, columns), 127, dtype=torch.int8)
    values[1, ::2] = -126
    weight = QuantizedWeight(values, torch.ones(2, 1), 1, columns, "int8")
    x = torch.full((1, columns), 127.0)
    x[0, 1] = 126
    expected = x.long() @ values.long().T
    assert quantized_matmul(x.double(), weight).long().tolist() == expected.float().long().tolist()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rows_of_any_size_are_rounded_by_their_own_largest(kind: str) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -2e-30], [3e38, 1e38], [1.0, -1.0]])
    numbers, scale = quantize_rows(x, ROUNDED[kind])
    assert numbers.float().isfinite().all()
    largest = x.abs().amax(1, keepdim=True).clamp(min=1e-20)
    assert_close(numbers.float() * scale[:, None] / largest, x / largest, dtype=torch.bfloat16)


def test_groups_of_a_row_are_rounded_by_their_own_largest() -> None:
    x = torch.tensor([[448.0, 3.3, 1.0, 0.01, 896.0], [0.0, 0.0, -7.0, 3.5, 0.0]])
    numbers, scale = quantize_groups(x, torch.float8_e4m3fn, 2)
    assert numbers.float().tolist() == [[448.0, 3.25, 448.0, 4.5, 448.0], [0.0, 0.0, -448.0, 224.0, 0.0]]
    least = torch.finfo(torch.float32).tiny
    assert torch.equal(scale, torch.tensor([[1.0, 1 / 448, 2.0], [least, 7 / 448, least]]))
    expected = torch.tensor([[448.0, 3.25, 1.0, 4.5 / 448, 896.0], [0.0, 0.0, -7.0, 3.5, 0.0]])
    assert_close(round_groups(x, torch.float8_e4m3fn, 2), expected)


@pytest.mark.parametrize(("kind", "expected"), [("int8", [127.0, -128.0, 64.0]), ("fp8", [448.0, -448.0, 64.0])])
def test_beyond_a_given_scale_inputs_are_cut_off(kind: str, expected: list[float]) -> None:
    numbers, _ = quantize_rows(torch.tensor([[1e6, -1e6, 63.5]]), ROUNDED[kind], torch.ones(1))
    assert numbers.float().tolist() == [expected]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_merged_parts_have_their_own_input_scale(kind: str) -> None:
    name = "int8_w8a8" if kind == "int8" else "fp8_w8a8"
    weight = replace(random_weight(name, 10, 128), part_rows=(7, 3), input_scale=torch.tensor([0.01, 0.05]))
    x = random_input(4, 128)
    expected = torch.cat([exact_product(x, part) for part in weight.parts()], 1)
    assert_close(quantized_matmul(x, weight), expected)


def test_zeros_and_the_order_of_groups_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 16, (5, 8), generator=generator)
    zero = torch.randint(0, 16, (5, 2), generator=generator)
    scale = torch.rand(5, 2, generator=generator) + 0.5
    groups = torch.randint(0, 2, (2, 8), generator=generator)
    weight = QuantizedWeight(
        values=(numbers[:, 0::2] | numbers[:, 1::2] << 4).to(torch.uint8),
        scale=scale,
        row_block=1,
        column_block=4,
        zero=zero.to(torch.uint8),
        group_index=groups.to(torch.int32),
        part_rows=(2, 3),
    )
    expected = torch.empty(5, 8)
    for row in range(5):
        for column in range(8):
            group = groups[0 if row < 2 else 1, column]
            expected[row, column] = (numbers[row, column] - zero[row, group]) * scale[row, group]
    assert_close(dequantize(weight), expected)
    x = random_input(3, 8)
    assert_close(quantized_matmul(x, weight), x.double() @ expected.double().T)


@pytest.mark.parametrize("port", [grouped_reference, grouped_static])
@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 0], [8, 0, 0], [1, 2, 0]])
@pytest.mark.parametrize("name", ["int8", "int8_w8a8", "fp8_block", "fp8_block_w8a8", "int4", "int4_w4a8"])
def test_experts_equal_each_expert_alone(name: str, sizes: list[int], port) -> None:
    experts = [random_weight(name, 6, 128, seed) for seed in range(3)]
    stacked = replace(
        experts[0],
        values=torch.stack([expert.values.view(torch.uint8) for expert in experts]).view(experts[0].values.dtype),
        scale=torch.stack([expert.scale for expert in experts]),
    )
    x = random_input(9, 128)
    expected = torch.zeros(9, 6, dtype=torch.float64)
    start = 0
    for expert, size in zip(experts, sizes, strict=True):
        expected[start : start + size] = exact_product(x[start : start + size], expert)
        start += size
    assert_close(port(x, stacked, torch.tensor(sizes, dtype=torch.int32)), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_traces_without_graph_breaks(name: str) -> None:
    weight, x = random_weight(name, 6, 128), random_input(4, 128)
    torch._dynamo.reset()  # there are more schemes than a function may be compiled for
    compiled = torch.compile(quantized_matmul, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, weight), quantized_matmul(x, weight))
