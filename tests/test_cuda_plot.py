"""benchmarks/cuda_plot.py: what a day on a GPU leaves behind becomes bars, and what it does not is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cuda_plot.py"
RESULTS = [
    {"case": "ceilings", "bandwidth": 4e12},
    {"case": "attention decode bf16 head 128 batch 16 context 4096", "of_bandwidth": 0.9, "of_products": 0.01},
    {"case": "attention decode peer sdpa bf16 head 128 batch 16 context 4096", "of_bandwidth": 0.5, "of_products": 0.0},
    {"case": "linear int8 8b-gate_up 64 rows", "of_bandwidth": 0.8, "of_products": 0.1},
    {"case": "linear fp8_w8a8 8b-gate_up 8192 rows", "of_bandwidth": 0.1, "of_products": 0.71},
]
PARTS = [
    {"part": "decode-bf16", "of_limit": 0.5, "limit_ms": 3.4, "ms": 6.8},
    {"part": "decode-bf16", "of_limit": 0.85, "limit_ms": 3.4, "ms": 4.0},
    {"part": "peer", "ms": 17.0},
    {"part": "throughput", "error": "ran past its limit of 300 s"},
]


def plot(results: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--results", str(results), "--plot", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_each_result_is_a_bar_of_its_plot(tmp_path: Path) -> None:
    of_kind = {"attention": RESULTS[:3], "linear": [RESULTS[0], *RESULTS[3:]]}
    for name, results in of_kind.items():
        (tmp_path / f"{name}.log").write_text(f"warm\n{json.dumps({'device': 'H200', 'results': results})}\n")
    (tmp_path / "experts.log").write_text("it was killed here\n")
    (tmp_path / "engine.jsonl").write_text("".join(json.dumps(part) + "\n" for part in PARTS))
    done = plot(tmp_path, tmp_path / "plots")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["missing"] == []
    labels = {path.stem: path.read_text() for path in (tmp_path / "plots").iterdir()}
    assert "0.9 <" in labels["cuda_attention"] and "peer sdpa bf16" in labels["cuda_attention"]
    assert "int8 8b-gate_up 64 rows" in labels["cuda_few_rows"] and "8192" not in labels["cuda_few_rows"]
    assert "0.71 <" in labels["cuda_many_rows"] and " 64 rows" not in labels["cuda_many_rows"]
    assert "0.85 <" in labels["cuda_engine"] and "0.5 <" not in labels["cuda_engine"]  # the last line of a part counts
    assert "0.2 <" in labels["cuda_engine"] and "throughput" not in labels["cuda_engine"]


def test_nothing_measured_is_no_plot(tmp_path: Path) -> None:
    done = plot(tmp_path, tmp_path / "plots")
    assert json.loads(done.stdout)["written"] == {} and not (tmp_path / "plots").exists()
    missing = plot(tmp_path / "none", tmp_path)
    assert missing.returncode == 2 and "is no folder" in missing.stderr
