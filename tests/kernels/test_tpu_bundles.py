"""Static figures of the TPU kernels, by the TPU's own compiler: the same on every machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.libtpu
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tpu_kernels.py"


def figures(*arguments: str) -> list[dict[str, float]]:
    command = [sys.executable, str(BENCHMARK), *arguments]
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
