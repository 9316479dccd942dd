"""Benchmarks for a GPU, tiny and on the CPU: every part runs, and one that takes too long is ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parents[1] / "benchmarks" / "cuda_kernels.py"
BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "cuda_engine.py"


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(BENCHMARK), "--work", str(folder), "--tiny", "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


def test_every_part_measures_something(folder: Path) -> None:
    *results, summary = run(folder, "--together", "--out", str(folder / "lines"))
    assert summary["ended"] == [result["part"] for result in results] and summary["failed"] == []
    assert {"ceilings", "decode-bf16", "decode-int4", "peer", "host", "throughput", "load-fp8"} <= {*summary["ended"]}
    assert summary["times_transformers"] > 0
    assert {"host-mixed", "mixtral"} <= {*summary["ended"]}
    for result in results:
        measured = [value for name, value in result.items() if isinstance(value, float) and name != "part_seconds"]
        assert measured and all(value > 0 for value in measured)
    assert [json.loads(line) for line in (folder / "lines").read_text().splitlines()] == results


def test_kernels_and_their_peers_are_called_rightly() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(KERNELS), "--tiny", "--cases", "peer,decode int8,int4_zero,grouped"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [result["case"] for result in json.loads(done.stdout.splitlines()[-1])["results"]]
    assert len(cases) == 5 and sum("peer" in case for case in cases) == 2


def test_a_part_that_takes_too_long_is_ended_and_the_next_one_runs(folder: Path) -> None:
    late, good, summary = run(folder, "--parts", "host,ceilings", "--limits", "host=0.5")
    assert late == {"part": "host", "error": "ran past its limit of 0.5 s"}
    assert good["part"] == "ceilings" and good["copy_bytes_s"] > 0
    assert (summary["ended"], summary["failed"]) == (["ceilings"], ["host"])
