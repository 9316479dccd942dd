"""The table of measured launches, and the search that fills it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torchinfer.kernels.cuda import matmul
from torchinfer.kernels.cuda.library_matmul import has_library, library_matmul
from torchinfer.kernels.cuda.matmul import device_name, multiply_rows, product_of, tiles_for
from torchinfer.kernels.cuda.matmul_kernel import matmul_kernel
from torchinfer.kernels.cuda.matrix import as_matrix
from torchinfer.kernels.cuda.quantize_rows import quantize_rows
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul
from torchinfer.kernels.cuda.tiles import Product, Tiles, choose_tiles
from torchinfer.kernels.cuda.tuned_table import ROWS, Launch, Tuned, load_table, save_entry
from torchinfer.kernels.cuda.tuning import least_library_rows, search
from torchinfer.kernels.reference.dequantize import dequantize
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import assert_close

OUTPUTS, INPUTS = 40, 512
TUNED = Tuned(4, {8: Launch(32, 1, 3), 16: Launch(64, 2, 5), 128: Launch(64, 4, 2, 1)})
ENTRY = {
    "format": "int8",
    "outputs": OUTPUTS,
    "inputs": INPUTS,
    "matrices": 1,
    "splits": 4,
    "library_rows": 0,
    "launches": {"8": {"outputs": 32, "warps": 1, "stages": 3, "per_processor": 0}},
}
WALKING = {"outputs": 64, "warps": 8, "stages": 3, "per_processor": 1}


def make_weight(name: str = "int8") -> QuantizedWeight:
    weight = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) / INPUTS**0.5
    return SCHEMES[name].weight(dict(SCHEMES[name].pack(weight)), INPUTS, ())


def on(device: str, weight: QuantizedWeight) -> QuantizedWeight:
    return replace(weight, values=weight.values.to(device), scale=weight.scale.to(device))


def make_input(rows: int) -> torch.Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_the_table_that_ships_is_one() -> None:
    assert isinstance(load_table(), dict)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_entry_changes_the_launch_and_not_the_result(gpu: str, name: str, tmp_path: Path) -> None:
    x, weight = make_input(3), make_weight(name)
    matrix, on_card = as_matrix(on(gpu, weight)), x.to(gpu)
    path, product = tmp_path / "table.json", product_of(on_card, matrix)
    save_entry(path, (device_name(on_card.device), product.format, OUTPUTS, INPUTS, 1), TUNED)
    save_entry(path, ("another card", product.format, OUTPUTS, INPUTS, 1), Tuned(8, {}))
    tiles = tiles_for(on_card, matrix, load_table(path))
    assert tiles == Tiles(8, 32, 128, 1, 3, 4, True) != tiles_for(on_card, matrix, {})
    actual = multiply_rows(on_card, None, matrix, None, x.dtype, tiles=tiles).cpu()
    assert_close(actual, x.double() @ dequantize(weight).double().T)


def test_products_ask_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, dict[str, Any]]] = []
    weight, x = on("meta", make_weight()), make_input(3).to("meta")
    monkeypatch.setattr(matmul, "load_table", lambda: {("meta", "int8", OUTPUTS, INPUTS, 1): TUNED})
    monkeypatch.setattr(
        type(matmul_kernel), "__getitem__", lambda _, grid: lambda *a, **named: launched.append((grid, named))
    )
    quantized_matmul(x, weight)
    (grid, named), _ = launched  # and the sum of splits
    assert grid == (2, 4)  # blocks of 32 outputs, splits
    assert (named["BLOCK_OUTPUTS"], named["num_warps"], named["num_stages"]) == (32, 1, 3)


def test_no_table_makes_splits_depend_on_rows() -> None:
    product = product_of(make_input(1), as_matrix(make_weight()))
    tiles = [choose_tiles(product, rows, 132, TUNED) for rows in range(1, 65)]
    assert {one.splits for one in tiles} == {4} and {one.inputs for one in tiles} == {128}
    assert {(one.rows, one.outputs, one.num_warps) for one in tiles} > {(8, 32, 1), (16, 64, 2)}
    assert choose_tiles(product, 65, 132, TUNED) == Tiles(128, 64, 64, 4, 2, per_processor=1)


def test_an_entry_that_is_saved_again_is_replaced_and_others_stay(tmp_path: Path) -> None:
    path, keys = tmp_path / "table.json", [("a card", "int8", 64, inputs, 1) for inputs in (128, 256)]
    save_entry(path, keys[0], Tuned(2, {}))
    save_entry(path, keys[1], TUNED)
    save_entry(path, keys[0], Tuned(1, {64: Launch(128, 4, 3)}, 1024))
    assert load_table(path) == {keys[0]: Tuned(1, {64: Launch(128, 4, 3)}, 1024), keys[1]: TUNED}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ENTRY | {"splits": 3}, r"splits of the int8 matrix \[40, 512\] of a card is 3, but must be one of \(1, 2, 4"),
        (ENTRY | {"splits": True}, "splits .* is True"),
        (ENTRY | {"outputs": 0}, r"outputs of .* is 0, but must be a whole number above 0"),
        (ENTRY | {"launches": {"7": {}}}, "rows of .* is '7', but must be one of"),
        (
            ENTRY | {"launches": {"8": {"outputs": 32}}},
            "8 rows of .* an object of outputs, warps, stages, per_processor",
        ),
        (ENTRY | {"launches": {"8": WALKING | {"outputs": 48}}}, "outputs for 8 rows of .* is 48"),
        (ENTRY | {"launches": {"128": WALKING | {"per_processor": 3}}}, "per_processor for 128 rows of .* is 3"),
        (
            ENTRY | {"launches": {"64": WALKING}},
            "per_processor for 64 rows of .* is 1, but must be 0 but for 128 rows of",
        ),
        (
            ENTRY | {"launches": {"128": WALKING}, "matrices": 2},
            "per_processor for 128 rows of .* 0 but .* of one matrix",
        ),
        (ENTRY | {"library_rows": 64}, "library_rows of .* is 64, but must be a whole number above 64, or 0 for never"),
        ({"format": "int8"}, "an entry of a card is .* an object of format, inputs, launches"),
        (None, "an entry of a card is None"),
    ],
)
def test_what_is_no_table_is_refused_with_the_value_the_rule_and_a_way_out(
    tmp_path: Path, entry: Any, message: str
) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"a card": [entry]}))
    with pytest.raises(ValueError, match=rf"table.json: {message}.*; tune again with benchmarks/cuda_tune.py"):
        load_table(path)


@pytest.mark.parametrize("text", ["", "[]", '{"a card": {}}', "{"])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"table.json: it is .* or write \{\} into the file"):
        load_table(path)


def test_the_search_finds_the_fastest_launches_that_fit(gpu: str) -> None:
    """A timer that makes one choice the best for each number of rows, and every launch compute what it must."""
    weight = make_weight("int4")
    matrix = as_matrix(on(gpu, weight))
    best = {8: (32, 1, 2), 16: (64, 2, 5), 32: (128, 4, 3), 64: (32, 8, 4), 128: (64, 4, 2)}
    walking = {128: 2}
    inputs = {rows: make_input(rows) for rows in ROWS}
    expected = {rows: x.double() @ dequantize(weight).double().T for rows, x in inputs.items()}

    def seconds(rows: int, tiles: Tiles) -> float | None:
        actual = multiply_rows(inputs[rows].to(gpu), None, matrix, None, torch.bfloat16, tiles=tiles).cpu()
        assert_close(actual, expected[rows])
        if tiles.num_stages == 6:
            return None
        outputs, warps, stages = best[rows]
        lost = (tiles.outputs != outputs) + (tiles.num_warps != warps) + (tiles.num_stages != stages) / 2
        lost += (tiles.per_processor != walking.get(rows, 0)) / 4
        wanted = 1 if rows == 64 else 2  # what three of four want is what all get
        return 1.0 + lost + (0.5 * (tiles.splits != wanted) if rows < 128 else 0)

    product = product_of(inputs[8].to(gpu), matrix)
    expected_launches = {rows: Launch(*choice, walking.get(rows, 0)) for rows, choice in best.items()}
    assert search(product, 132, seconds, lambda rows: None) == Tuned(2, expected_launches)


def test_the_search_asks_for_programs_that_walk_over_tiles_of_many_rows_of_one_matrix() -> None:
    asked: set[tuple[int, int, int]] = set()

    def seconds(rows: int, tiles: Tiles) -> float:
        asked.add((product.num_matrices, rows, tiles.per_processor))
        return 1.0

    for num_matrices in (1, 8):
        product = Product("int8", 4096, 4096, num_matrices, 2, 0, False)
        search(product, 132, seconds, lambda rows: None)
    assert {one for one in asked if one[2]} == {(1, 128, 1), (1, 128, 2)}


@pytest.mark.parametrize(
    ("wins", "expected"), [((), 0), ((4096,), 4096), ((256, 4096), 4096), ((256, 1024, 4096), 256), ((256, 1024), 0)]
)
def test_the_library_has_all_rows_from_those_on_where_it_is_faster(wins: tuple[int, ...], expected: int) -> None:
    tiles = Tiles(128, 128, 64, 8, 3)
    assert least_library_rows(tiles, lambda rows, _: 2.0, lambda rows: 1.0 if rows in wins else 3.0) == expected
    assert least_library_rows(tiles, lambda rows, _: 2.0, lambda rows: None) == 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8_w8a8", torch.bfloat16), ("fp8_w8a8", torch.float16), ("fp8_block_w8a8", torch.bfloat16), ("fp8", None)],
)
def test_products_of_many_rows_are_the_library_s_if_the_table_says_so(
    name: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    whole, tuned = make_weight(name), Tuned(1, {}, 256)
    weight = on("meta", replace(whole, values=whole.values[:32], scale=whole.scale[:32]))
    key = "meta", as_matrix(weight).format, 32, INPUTS, 1
    monkeypatch.setattr(matmul, "load_table", lambda: {key: tuned})

    def note(kernel: Any, grid: Any) -> Any:
        return lambda *a, **named: launched.append(kernel.fn.__name__)

    monkeypatch.setattr(type(matmul_kernel), "__getitem__", note)
    for rows in (255, 256):
        x = make_input(rows).to("meta", dtype or torch.bfloat16)
        assert quantized_matmul(x, weight).shape == (rows, 32)
    is_library_s = name == "fp8_w8a8" and dtype == torch.bfloat16
    assert launched.count("matmul_kernel") == (1 if is_library_s else 2)


@pytest.mark.cuda
def test_on_a_gpu_the_library_computes_the_same(gpu: str) -> None:
    weight = SCHEMES["fp8_w8a8"].weight(dict(SCHEMES["fp8_w8a8"].pack(torch.randn(64, INPUTS, device=gpu))), INPUTS, ())
    matrix = as_matrix(weight)
    x, row_scale = quantize_rows(make_input(300).to(gpu), torch.float8_e4m3fn)
    assert has_library(matrix, torch.bfloat16)
    expected = x.double() @ dequantize(weight).double().T * row_scale.double()[:, None]
    assert_close(library_matmul(x, row_scale, matrix), expected, torch.bfloat16)


def test_the_script_writes_a_table(tmp_path: Path) -> None:
    script, path = Path(__file__).parents[2] / "benchmarks" / "cuda_tune.py", tmp_path / "table.json"
    command = [sys.executable, str(script), "--tiny", "--schemes", "int8,fp8_block_w8a8", "--out", str(path)]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_table(path)
    assert set(found) == {("cpu", name, 40, 256, 1) for name in ("int8", "float8_e4m3fn-g128-rows")}
    assert all(set(tuned.launches) == set(ROWS) for tuned in found.values())


def test_a_launch_that_does_not_compile_is_passed_over(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    timer: Any = import_module("cuda_tune").timer
    seconds = timer([as_matrix(on(gpu, make_weight("int4")))])
    tiles = Tiles(8, 32, 128, 2, 3, 1, True)
    assert seconds(8, tiles) > 0
    assert seconds(8, replace(tiles, inputs=32)) is None  # products of 8 inputs, which the matrix unit does not have
