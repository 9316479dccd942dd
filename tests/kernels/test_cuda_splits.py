"""Products whose inputs are split between programs, in Triton, against float64: where outputs are few and rows too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer.kernels.cuda.grouped_gated_matmul import grouped_gated_matmul
from torchinfer.kernels.cuda.grouped_matmul import grouped_matmul
from torchinfer.kernels.cuda.matmul_kernel import sum_splits_kernel
from torchinfer.kernels.cuda.matrix import is_supported
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul
from torchinfer.kernels.cuda.tiles import LEAST_SPAN, Product, choose_tiles, num_processors
from torchinfer.kernels.reference.dequantize import dequantize
from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.quantization import SCHEMES
from torchinfer.testing import assert_close, exact_product, moved, random_matrix, rows_beside_nan

# Rows, inputs, outputs, splits: whole spans, a last one that is shorter, and a last step that is cut.
SHAPES = [(1, 2048, 70, 4), (5, 1153, 33, 2), (33, 2177, 64, 4), (64, 1024, 31, 2)]


@pytest.fixture(autouse=True)
def memory_that_nobody_wrote_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)


def splits_of(x: Tensor, num_outputs: int, num_matrices: int = 1) -> int:
    """The rule's. Formats make no difference to it."""
    product = Product("int8", num_outputs, x.shape[1], num_matrices, 2, 0, False)
    return choose_tiles(product, -(-len(x) // num_matrices), num_processors(x.device)).splits


@pytest.mark.parametrize(("shape", "dtype"), [(s, torch.bfloat16) for s in SHAPES] + [(SHAPES[2], torch.float16)])
@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "int4_g32"])
def test_equals_float64(gpu: str, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, inputs, outputs, splits = shape
    if SCHEMES[name].column_block:
        inputs = -(-inputs // 128) * 128
    x, weight = rows_beside_nan(rows, inputs, dtype), random_matrix(name, outputs, inputs)
    assert is_supported(x, weight) and splits_of(x, outputs) == splits
    actual = quantized_matmul(x.to(gpu), moved(weight, gpu)).cpu()
    assert actual.dtype == dtype
    assert_close(actual, exact_product(x, weight))


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4", "int8_w8a8", "fp8_block_w8a8"])
def test_groups_equal_float64_and_rows_of_none_are_zeros(gpu: str, name: str) -> None:
    sizes, x = [3, 0, 17, 1], rows_beside_nan(23, 1024)  # of the 23 rows two are in no group
    matrices = [random_matrix("int8" if name == "bfloat16" else name, 74, 1024, seed) for seed in range(4)]
    plain = torch.stack([dequantize(matrix) for matrix in matrices]).bfloat16()
    stacked = {f: torch.stack([getattr(m, f) for m in matrices]) for f in ("values", "scale")}
    weight = plain.to(gpu) if name == "bfloat16" else moved(replace(matrices[0], **stacked), gpu)
    expected, start = torch.zeros(23, 74, dtype=torch.float64), 0
    for group, size in enumerate(sizes):
        rows = x[start : start + size]
        is_plain = name == "bfloat16"
        product = rows.double() @ plain[group].double().T if is_plain else exact_product(rows, matrices[group])
        expected[start : start + size], start = product, start + size
    assert splits_of(x, 74, 4) == 2
    group_sizes = torch.tensor(sizes, dtype=torch.int32, device=gpu)
    actual = grouped_matmul(x.to(gpu), weight, group_sizes).cpu()
    assert_close(actual, expected)
    assert not actual[21:].any()
    gate_up = grouped_gated_matmul(x.to(gpu), weight, group_sizes, "silu").cpu()
    assert_close(gate_up, gated_activation(expected, "silu"))


@pytest.mark.parametrize("name", ["int8", "int4_g64", "fp8_block", "int8_w8a8", "fp8_block_w8a8"])
def test_a_row_has_the_same_bits_alone_and_with_others(gpu: str, name: str) -> None:
    x, weight = rows_beside_nan(13, 2048).to(gpu), moved(random_matrix(name, 70, 2048), gpu)
    together = quantized_matmul(x, weight)
    for row in (0, 7, 12):
        assert torch.equal(quantized_matmul(x[row : row + 1], weight)[0], together[row])


def test_splits_are_added_the_first_one_first(gpu: str) -> None:
    partial = torch.randn(8, 3, 700, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(8).view(8, 1, 1)
    expected = partial[0].clone()
    for one in partial[1:]:
        expected += one
    assert not torch.equal(expected, partial.flip(0).sum(0))  # so that the order shows
    result = torch.empty(3, 700, device=gpu)
    sum_splits_kernel[(3, 2)](partial.to(gpu), result, 3, 700, SPLITS=8, ACTIVATION="none", BLOCK=512)
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("processors", [40, 108, 132])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(4096, 4096), (4096, 14336), (6144, 4096), (28672, 4096), (1024, 1024)]
)
def test_splits_follow_from_matrix_and_card_and_not_from_rows(outputs: int, inputs: int, processors: int) -> None:
    product = Product("int8", outputs, inputs, 1, 2, 0, False)
    tiles = [choose_tiles(product, rows, processors) for rows in (1, 2, 16, 17, 32, 33, 64)]
    (splits,) = {one.splits for one in tiles}
    (num_blocks,) = {-(-outputs // one.outputs) for one in tiles}
    is_filled = 2 * num_blocks * splits >= 3 * processors
    assert is_filled or inputs < 2 * splits * LEAST_SPAN
    assert splits == 1 or inputs >= splits * LEAST_SPAN
    assert len({one.inputs for one in tiles}) == 1
    assert choose_tiles(product, 65, processors).splits == 1
