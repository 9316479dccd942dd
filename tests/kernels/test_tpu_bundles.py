"""Static figures of the TPU kernels, by the TPU's own compiler: the same on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.libtpu
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def figures(*arguments: str, benchmark: str = "tpu_kernels") -> list[dict[str, float]]:
    command = [sys.executable, str(BENCHMARKS / f"{benchmark}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])["results"]
    return results


@pytest.mark.parametrize("chip", ["v5e", "v5p"])
def test_a_decodes_bundles_are_below_the_memorys_cycles_and_04_of_upstreams(chip):
    (found,) = figures("--chips", chip, "--shapes", "llama-3-8b", "--dtypes", "int8")
    assert found["bundles"] <= found["hbm_cycles"]
    assert 0 < found["bundles"] <= 0.4 * found["upstream"]


def test_one_kv_head_and_large_heads_are_below_the_memorys_cycles_on_v5p():
    shapes = ("--shapes", "llama-2-70b-of-8-chips", "gemma-7b")
    for found in figures("--chips", "v5p", *shapes, "--dtypes", "int8", "--no-upstream"):
        assert found["bundles"] <= found["hbm_cycles"], found


def test_products_of_16_rows_take_a_part_of_the_memorys_cycles_and_move_the_matrix_once():
    limits = {"int8": 0.15, "int4": 0.36, "fp8": 0.36}
    arguments = ("--chips", "v5e", "--shapes", "dense", "--formats", *limits, "--rows", "16", "--no-xla")
    found = figures(*arguments, benchmark="tpu_matmuls")
    assert [each["format"] for each in found] == list(limits)
    for each in found:
        assert 0 < each["bundles"] <= limits[each["format"]] * each["hbm_cycles"], each
        assert each["moved"] < 1.05, each


def test_experts_with_a_row_take_less_than_half_of_the_memorys_cycles_and_move_their_matrices_once():
    shapes = ("--shapes", "mixtral-gate-up", "qwen3-30b-gate-up", "qwen3-30b-down")
    arguments = ("--chips", "v5e", *shapes, "--formats", "int8", "--rows", "1")
    for found in figures(*arguments, benchmark="tpu_matmuls"):
        assert 0 < found["bundles"] <= 0.5 * found["hbm_cycles"], found
        assert found["moved"] < 1.05, found
