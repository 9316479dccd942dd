"""The CUDA kernels by Triton's own compiler, for cards that are not there: that they fit, and what a round of a loop
takes. A multiprocessor issues four instructions a cycle: a round of a block of four warps, or two of two warps, takes
at least as many cycles as it has instructions, and must not take more than its bytes need to come from memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cuda_kernels.py"
H200_BYTES_PER_CYCLE = 4.8e12 / 132 / 1.755e9  # of a multiprocessor, from memory
H200_E4M3_PER_CYCLE = 1979e12 / 132 / 1.755e9  # operations of a multiprocessor


def compiled(capability: str, cases: str, folder: Path) -> list[dict[str, Any]]:
    """In a process of its own: in this one Triton interprets."""
    command = [sys.executable, str(BENCHMARK), "--compile", capability, "--cases", cases]
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert len(results) >= len(cases.split(","))
    return results


@pytest.fixture(scope="module")
def on_hopper(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    attention = "decode bf16 head 128,decode int8 head 128,decode fp8 head 128,prefill int8"
    linear = (
        "linear int8 8b-gate_up 1 row,linear fp8 8b-gate_up 1 row,linear int4 8b-gate_up 1 row,"
        "linear int4 8b-gate_up 64,fp8_w8a8 8b-gate_up,fp8_block_w8a8,int4_zero,int4_w4a8"
    )
    cases = f"{attention},71/1 heads,{linear},walking,grouped bf16,glue,float32"
    return compiled("9.0", cases, tmp_path_factory.mktemp("triton"))


def test_every_kernel_fits_a_hopper_and_hardly_anything_spills(on_hopper: list[dict[str, Any]]) -> None:
    names = {"decode_kernel", "merge_kernel", "chunk_kernel", "matmul_kernel", "quantize_rows_kernel", "write_kernel"}
    names |= {"rms_norm_kernel", "rotary_kernel", "gated_activation_kernel", "sample_kernel"}
    names |= {"norm_and_round_kernel", "gate_and_round_kernel", "sum_splits_kernel", "persistent_matmul_kernel"}
    names |= {"rotate_and_write_kernel"}
    assert {found["name"] for found in on_hopper} == names
    for found in on_hopper:
        assert found["registers"] <= 255 and found["shared_bytes"] <= 227 << 10, found
        if "float32" in found["case"]:  # which is to be right, not fast
            continue
        assert found["stack_bytes"] <= 8, found  # two registers, so that more blocks fit
        # Two blocks fit into a multiprocessor, but for those that are to be the only one.
        assert found["shared_bytes"] <= 113 << 10 or found["name"] == "persistent_matmul_kernel", found


def test_what_has_the_bits_of_the_reference_keeps_subnormal_numbers(on_hopper: list[dict[str, Any]]) -> None:
    """Others compute roots and powers of two on the way, which are near, and may flush."""
    for found in on_hopper:
        assert not any(instruction.startswith("div.rn") for instruction in found["flushing"]), found
        is_exact = found["name"] in ("quantize_rows_kernel", "write_kernel", "rotate_and_write_kernel")
        assert not found["flushing"] or not is_exact, found


def test_products_of_tiles_are_in_the_loops(on_hopper: list[dict[str, Any]]) -> None:
    for found in on_hopper:
        has_loop = found["name"] in ("decode_kernel", "chunk_kernel", "matmul_kernel", "persistent_matmul_kernel")
        assert (found["tensor_instructions"] > 0) == has_loop, found


@pytest.mark.parametrize(
    ("case", "num_bytes"),
    [
        ("attention decode bf16 head 128", 2 * 64 * (2 * 128 * 2)),  # a round of two warps: two issue at a time
        ("attention decode int8 head 128", 2 * 64 * (2 * 128 + 8)),
        ("attention decode fp8 head 128", 2 * 64 * (2 * 128 + 8)),
        ("linear int8 8b-gate_up 1 rows", 2 * 64 * 128),
        ("linear fp8 8b-gate_up 1 rows", 2 * 64 * 128),
        ("linear fp8_block_w8a8 8b-gate_up 1 rows", 2 * 64 * 128),
        ("linear int4 8b-gate_up 1 rows", 2 * 64 * (64 + 4)),
        ("linear int4 8b-gate_up 64 rows", 128 * (64 + 4)),
        ("grouped bf16 8x28672x4096 16 rows", 2 * 2 * 64 * 128),
    ],
)
def test_a_round_takes_fewer_cycles_to_issue_than_its_bytes_take_from_memory(
    on_hopper: list[dict[str, Any]], case: str, num_bytes: int
) -> None:
    (found,) = (f for f in on_hopper if f["case"].startswith(case) and f["tensor_instructions"])
    assert 0 < found["loop_instructions"] <= 1.01 * num_bytes / H200_BYTES_PER_CYCLE


def test_scales_of_groups_take_fewer_cycles_to_issue_than_their_products_take(on_hopper: list[dict[str, Any]]) -> None:
    """A round of eight warps: products of e4m3 are 128 x 128 x 128, and each of their sums is scaled and added."""
    case = "linear fp8_block_w8a8 8b-gate_up 4096 rows"
    (found,) = (f for f in on_hopper if f["case"] == case and f["tensor_instructions"])
    assert 8 / 4 * found["loop_instructions"] <= 0.8 * 2 * 128**3 / H200_E4M3_PER_CYCLE


def test_kernels_fit_an_ada_and_an_ampere(tmp_path: Path) -> None:
    ada = compiled("8.9", "decode fp8 head 128,linear fp8_w8a8 8b-gate_up 4096,fp8_block,float32 int8", tmp_path)
    ampere = compiled("8.0", "linear int4 8b-gate_up 1 rows,linear int8 8b-output", tmp_path)
    for found in ada + ampere:
        assert found["stack_bytes"] <= 8 or "float32" in found["case"], found
        assert found["tensor_instructions"] >= (found["name"] == "matmul_kernel"), found
