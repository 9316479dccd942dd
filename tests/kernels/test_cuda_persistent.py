"""Products of programs that walk over tiles, in Triton: the bits of those that have a tile each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer.kernels.cuda import matmul
from torchinfer.kernels.cuda.matmul import multiply_rows
from torchinfer.kernels.cuda.matmul_kernel import matmul_kernel
from torchinfer.kernels.cuda.matrix import Matrix, as_matrix
from torchinfer.kernels.cuda.packed_weight import prepare
from torchinfer.kernels.cuda.persistent_kernel import persistent_matmul_kernel
from torchinfer.kernels.cuda.quantize_rows import quantize_rows
from torchinfer.kernels.cuda.tiles import Tiles
from torchinfer.quantization import SCHEMES
from torchinfer.testing import assert_close, exact_product, moved, random_matrix, rows_beside_nan

# Rows, inputs, outputs: whole tiles, tiles that are cut in each direction, and one row in fewer tiles than programs.
SHAPES = [(64, 256, 96), (50, 250, 70), (1, 384, 130)]
PROCESSORS = 3


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The kernels that were launched, and how many programs of each; on a card of few processors."""
    found: list[tuple[str, int]] = []
    get = type(matmul_kernel).__getitem__

    def note(kernel: Any, grid: Any) -> Any:
        found.append((kernel.fn.__name__, grid[0]))
        return get(kernel, grid)

    monkeypatch.setattr(type(matmul_kernel), "__getitem__", note)
    monkeypatch.setattr(matmul, "num_processors", lambda device: PROCESSORS)
    return found


def rows_for(x: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """Rows as the matrix is multiplied with."""
    if matrix.activations == "none":
        return x, None
    return quantize_rows(x, matrix.rounded, None, matrix.input_group)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_bits_are_those_of_programs_with_a_tile_each(
    gpu: str, launched: list[tuple[str, int]], name: str, shape: tuple[int, int, int]
) -> None:
    rows, inputs, outputs = shape
    inputs = 256 if name.startswith("int4") and inputs == 250 else inputs
    weight, x = random_matrix(name, outputs, inputs), rows_beside_nan(rows, inputs)
    matrix = prepare(moved(weight, gpu)) or as_matrix(moved(weight, gpu))
    numbers, scale = rows_for(x.to(gpu), matrix)
    tiles = Tiles(16, 32, min(128, matrix.group or 128), 4, 3, rows_last=matrix.is_nibbles)
    num_tiles = -(-rows // 16) * -(-outputs // 32)
    launched.clear()
    found = [
        multiply_rows(numbers, scale, matrix, None, x.dtype, tiles=replace(tiles, per_processor=number))
        for number in (0, 1, 2)
    ]
    assert launched == [
        ("matmul_kernel", num_tiles),
        *(("persistent_matmul_kernel", min(num_tiles, number * PROCESSORS)) for number in (1, 2)),
    ]
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    assert_close(found[1].cpu(), exact_product(x, weight))


def test_groups_of_rows_have_a_program_for_each_tile(gpu: str, launched: list[tuple[str, int]]) -> None:
    weight = random_matrix("int8", 40, 128)
    experts = replace(weight, values=weight.values[None], scale=weight.scale[None])
    x, sizes = rows_beside_nan(20, 128).to(gpu), torch.tensor([20], dtype=torch.int32, device=gpu)
    tiles = Tiles(16, 32, 128, 4, 3, per_processor=1)
    actual = multiply_rows(x, None, as_matrix(moved(experts, gpu)), sizes, x.dtype, tiles=tiles)
    assert [name for name, _ in launched] == ["matmul_kernel"]
    assert_close(actual.cpu(), exact_product(x.cpu(), weight))


@pytest.mark.parametrize(
    ("rows", "num_blocks"), [(1, 1), (8, 1), (9, 1), (64, 1), (65, 1), (128, 1), (129, 2), (256, 2)]
)
def test_no_program_computes_rows_that_are_not_there(
    launched: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, rows: int, num_blocks: int
) -> None:
    monkeypatch.setattr(type(persistent_matmul_kernel), "__getitem__", lambda kernel, grid: launch_of(launched, grid))
    matrix = as_matrix(moved(random_matrix("int8", 32, 128), "meta"))
    multiply_rows(torch.empty(rows, 128, device="meta"), None, matrix, None, torch.float32)
    assert launched == [("", num_blocks)]


def launch_of(launched: list[tuple[str, int]], grid: tuple[int, ...]) -> Any:
    """A launch that computes nothing."""
    return lambda **arguments: launched.append(("", grid[0]))
