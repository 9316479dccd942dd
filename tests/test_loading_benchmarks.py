"""What measures loads: the checkpoints that it makes are whole, and its numbers are of what was loaded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
spec = importlib.util.spec_from_file_location("make_checkpoint", BENCHMARKS / "make_checkpoint.py")
assert spec is not None and spec.loader is not None
maker = importlib.util.module_from_spec(spec)
sys.modules["make_checkpoint"] = maker  # dataclasses look their module up there
spec.loader.exec_module(maker)


def run(script: str, *arguments: str) -> dict[str, Any]:
    """A benchmark in a process of its own; its last line."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(
    folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, shards: int = 2, gigabytes: float = 0.001
) -> Path:
    num_bytes = maker.make_checkpoint(folder, gigabytes, kind=kind, shards=shards, dtype=dtype)
    files = list(folder.glob("*.safetensors"))
    assert len(files) == shards
    assert sum(file.stat().st_size - header_bytes(file) for file in files) == num_bytes
    return folder


def header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


CASES = [("dense", torch.bfloat16, 1), ("moe", torch.float16, 3), ("falcon", torch.float32, 2)]


@pytest.mark.parametrize(("kind", "dtype", "shards"), CASES)
def test_a_checkpoint_that_was_made_is_loaded_whole(tmp_path: Path, kind: str, dtype: torch.dtype, shards: int) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "made", kind, dtype, shards))
    model = load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, CPU)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers * dtype.itemsize == checkpoint.total_bytes
    assert {entry.dtype for entry in checkpoint.tensors.values()} == {dtype}
    for name, tensor in model.named_parameters():
        assert tensor.isfinite().all() and 0.01 < tensor.std() < 0.03, name


@pytest.mark.parametrize("kind", ["dense", "falcon"])
def test_transformers_loads_it(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path / "made", kind)
    _, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is not empty: remove it, or name another folder"):
        maker.make_checkpoint(tmp_path, 0.001)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is asked of Linux")
def test_a_watched_load_says_what_it_held(tmp_path: Path) -> None:
    folder = make(tmp_path / "made", "falcon", torch.float32, gigabytes=0.03)
    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    sizes = [Path(file).stat().st_size for file in files]
    task = {"method": "load_model", "path": str(folder), "files": files, "sizes": sizes, "is_watched": True}
    found = run("loading_methods.py", json.dumps(task))
    assert found["num_bytes"] == sum(sizes)
    assert found["held_bytes"] == Checkpoint.open(folder).total_bytes // 2 > 10_000_000
    assert found["memory"]["rss"] >= found["held_bytes"]
    if found["group_peak_by"] == "the kernel, own":
        assert found["memory"]["group"] >= found["held_bytes"]


@pytest.mark.slow
def test_a_sharded_load_reads_its_share(tmp_path: Path) -> None:
    found = run("sharded_loading.py", "--model", str(make(tmp_path / "made", "dense")), "--world", "2")
    (row,) = found["rows"]
    assert (row["rows_and_whole"], row["columns"]) == (1.0, 2.0)
    assert (row["overall_with_exchange"], row["overall_gs_with_exchange"]) == (1.0, 1.0)
    assert row["rows_and_whole_gs"] >= 1
