"""Quantized and grouped products in Triton against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer.kernels.cuda.grouped_gated_matmul import grouped_gated_matmul
from torchinfer.kernels.cuda.grouped_matmul import grouped_matmul
from torchinfer.kernels.cuda.matrix import is_supported
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul
from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import assert_close, exact_product, moved, random_matrix

# Rows, inputs, outputs: tiles of 16 to 64 rows, square ones of 128; whole and cut in each direction.
SHAPES = [(1, 128, 64), (5, 250, 33), (33, 384, 70), (130, 64, 34)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [[3, 0, 17, 1], [0, 0, 0, 0], [23, 0, 0, 0], [0, 0, 0, 23], [2, 3, 0, 0]]


def experts(matrices: list[QuantizedWeight]) -> QuantizedWeight:
    """Several matrices as those of experts."""
    fields = ("values", "scale", "zero", "input_scale")
    tensors = {name: [getattr(matrix, name) for matrix in matrices] for name in fields}
    return replace(matrices[0], **{name: torch.stack(t) for name, t in tensors.items() if t[0] is not None})


def make_input(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def check(gpu: str, x: Tensor, weight: QuantizedWeight) -> None:
    assert is_supported(x, weight)
    actual = quantized_matmul(x.to(gpu), moved(weight, gpu)).cpu()
    assert actual.dtype == x.dtype
    assert_close(actual, exact_product(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_equals_float64(gpu: str, name: str, shape: tuple[int, int, int]) -> None:
    rows, columns, outputs = shape
    if columns % (SCHEMES[name].column_block or 1) and name.startswith("int4"):
        columns = 256
    for dtype in DTYPES:
        check(gpu, make_input(rows, columns, dtype), random_matrix(name, outputs, columns))


@pytest.mark.parametrize("rows", [3, 130])
@pytest.mark.parametrize("values", [torch.int8, torch.uint8])
def test_zeros_of_groups(gpu: str, values: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    is_nibbles = values == torch.uint8
    least, most = (0, 256) if is_nibbles else (-127, 128)
    numbers = torch.randint(least, most, (40, 64 if is_nibbles else 128), generator=generator).to(values)
    zero = torch.randint(*((0, 16) if is_nibbles else (-120, 120)), (40, 2), generator=generator).to(values)
    scale = torch.rand(40, 2, generator=generator) / 500
    check(gpu, make_input(rows, 128), QuantizedWeight(numbers, scale, 1, 64, zero=zero))


@pytest.mark.parametrize("name", ["int8_w8a8", "fp8_w8a8", "int4_w4a8"])
def test_scales_of_inputs_that_were_given_beforehand(gpu: str, name: str) -> None:
    weight = random_matrix(name, 70, 128)
    check(gpu, make_input(5, 128), replace(weight, input_scale=torch.tensor([0.02])))
    parts = replace(weight, input_scale=torch.tensor([0.02, 0.01]), part_rows=(33, 37))
    x = make_input(5, 128)
    expected = torch.cat([exact_product(x, part) for part in parts.parts()], 1)
    assert_close(quantized_matmul(x.to(gpu), moved(parts, gpu)).cpu(), expected)


def test_what_no_tile_fits_goes_to_the_reference(gpu: str) -> None:
    x = make_input(3, 128)
    weight = replace(random_matrix("int4", 8, 128), group_index=torch.arange(128).remainder(2).int()[None])
    weight = replace(weight, scale=weight.scale.repeat(1, 2))
    odd = QuantizedWeight(torch.ones(8, 128, dtype=torch.int8), torch.ones(8, 6), 1, 24)
    for one in (weight, odd):
        assert not is_supported(x, one)
    assert_close(quantized_matmul(x, odd), exact_product(x, odd))


@pytest.mark.parametrize("name", ["int8", "int4_g64", "fp8_block", "int8_w8a8", "fp8_block_w8a8", "int4_w4a8"])
def test_a_row_has_the_same_bits_alone_and_in_a_batch_that_takes_the_same_tile(gpu: str, name: str) -> None:
    x, weight = make_input(13, 256).to(gpu), moved(random_matrix(name, 70, 256), gpu)
    together = quantized_matmul(x, weight)
    for row in (0, 7, 12):
        assert torch.equal(quantized_matmul(x[row : row + 1], weight)[0], together[row])


def by_group(x: Tensor, sizes: list[int], outputs: int, product) -> Tensor:
    expected = torch.zeros(len(x), outputs, dtype=torch.float64)
    start = 0
    for group, size in enumerate(sizes):
        if size:
            expected[start : start + size] = product(x[start : start + size], group)
        start += size
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups_equal_float64(gpu: str, sizes: list[int], dtype: torch.dtype) -> None:
    x, weight = make_input(23, 63, dtype), (make_input(4 * 37, 63, torch.float32) / 8).view(4, 37, 63).to(dtype)
    actual = grouped_matmul(x.to(gpu), weight.to(gpu), torch.tensor(sizes, dtype=torch.int32, device=gpu)).cpu()
    assert actual.dtype == dtype
    assert_close(actual, by_group(x, sizes, 37, lambda rows, group: rows.double() @ weight[group].double().T))


@pytest.mark.parametrize("name", SCHEMES)
def test_quantized_groups_equal_float64(gpu: str, name: str) -> None:
    weight = experts([random_matrix(name, 37, 128, seed) for seed in range(4)])
    sizes, x = SIZES[0], make_input(23, 128)
    actual = grouped_matmul(x.to(gpu), moved(weight, gpu), torch.tensor(sizes, dtype=torch.int32, device=gpu)).cpu()
    assert_close(actual, by_group(x, sizes, 37, lambda rows, group: exact_product(rows, weight.expert(group))))


@pytest.mark.parametrize("name", ["int8_w8a8", "fp8_w8a8", "fp8_block_w8a8", "int4_w4a8"])
def test_each_group_may_have_a_scale_of_inputs(gpu: str, name: str) -> None:
    matrices = [random_matrix(name, 37, 128, seed) for seed in range(4)]
    weight = experts([replace(m, input_scale=torch.tensor([0.01 * (i + 1)])) for i, m in enumerate(matrices)])
    sizes, x = SIZES[0], make_input(23, 128)
    actual = grouped_matmul(x.to(gpu), moved(weight, gpu), torch.tensor(sizes, dtype=torch.int32, device=gpu)).cpu()
    assert_close(actual, by_group(x, sizes, 37, lambda rows, group: exact_product(rows, weight.expert(group))))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4", "int8_w8a8", "fp8_block_w8a8", "int4_w4a8"])
def test_gated_groups_equal_float64(gpu: str, name: str, activation: str) -> None:
    sizes, x = SIZES[0], make_input(23, 128)
    group_sizes = torch.tensor(sizes, dtype=torch.int32, device=gpu)
    if name == "bfloat16":
        plain = (make_input(4 * 74, 128, torch.float32) / 8).view(4, 74, 128).bfloat16()
        actual = grouped_gated_matmul(x.to(gpu), plain.to(gpu), group_sizes, activation).cpu()
        products = by_group(x, sizes, 74, lambda rows, group: rows.double() @ plain[group].double().T)
    else:
        weight = experts([random_matrix(name, 74, 128, seed) for seed in range(4)])
        actual = grouped_gated_matmul(x.to(gpu), moved(weight, gpu), group_sizes, activation).cpu()
        products = by_group(x, sizes, 74, lambda rows, group: exact_product(rows, weight.expert(group)))
    assert_close(actual, gated_activation(products, activation))


def test_many_rows_of_few_groups(gpu: str) -> None:
    sizes, x = [150, 0, 129, 1], make_input(300, 64)
    weight = (make_input(4 * 40, 64, torch.float32) / 8).view(4, 40, 64).bfloat16()
    actual = grouped_matmul(x.to(gpu), weight.to(gpu), torch.tensor(sizes, dtype=torch.int32, device=gpu)).cpu()
    assert_close(actual, by_group(x, sizes, 40, lambda rows, group: rows.double() @ weight[group].double().T))


def test_what_does_not_fit_is_refused(gpu: str) -> None:
    weight, x = moved(random_matrix("int8", 8, 128), gpu), make_input(3, 128).to(gpu)
    with pytest.raises(ValueError, match=r"x \[N, 128\].*\[3, 127\]"):
        quantized_matmul(x[:, :127], weight)
    with pytest.raises(ValueError, match="contiguous"):
        quantized_matmul(x, replace(weight, values=weight.values.T.contiguous().T))
    with pytest.raises(ValueError, match=r"a size \[E\] int32"):
        grouped_matmul(
            x, torch.ones(2, 5, 128, dtype=x.dtype, device=gpu), torch.ones(3, dtype=torch.int32, device=gpu)
        )
    assert quantized_matmul(x[:0], weight).shape == (0, 8)
