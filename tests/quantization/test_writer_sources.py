"""Sources that `torchinfer quantize` must not make an unusable checkpoint of, and folders that are no run's."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchinfer.cli import main
from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.loader import Checkpoint
from torchinfer.loader.inspect import inspect
from torchinfer.writer import folder as folders
from torchinfer.writer.folder import PartialFolder
from torchinfer.writer.quantize import quantize_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(llama, tmp_path / "in")
    return tmp_path / "in"


def test_an_index_of_one_shard_gives_an_index(source: Path, tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    names = Checkpoint.open(source).tensors
    (source / "model.safetensors").rename(source / shard)
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    quantize_checkpoint(source, tmp_path / "out", "int8")
    assert inspect(tmp_path / "out").problems == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["int8", "fp8_block", "int4"])
def test_weights_that_are_not_finite_are_refused(value: float, scheme: str, source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}' has scales from .* they must be positive and finite"):
        quantize_checkpoint(source, tmp_path / "out", scheme)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.safetensors*"))


def test_what_older_tools_say_of_a_quantized_checkpoint_counts(source: Path, tmp_path: Path) -> None:
    (source / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(ConfigError, match="is quantized already, quant_method='gptq'"):
        quantize_checkpoint(source, tmp_path / "out", "int8")
    (source / "quantize_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    config["compression_config"] = {"quant_method": "compressed-tensors"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is quantized already, quant_method='compressed-tensors'"):
        quantize_checkpoint(source, tmp_path / "out", "int8")
    assert not (tmp_path / "out.partial").exists()


def test_a_file_too_large_to_copy_is_found_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with open(source / "data.json", "wb") as file:
        file.truncate(200_000_001)
    with pytest.raises(ConfigError, match=r"data\.json has 200000001 bytes.* at most 200000000 .* move it out of"):
        quantize_checkpoint(source, tmp_path / "out", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_a_damaged_state_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / folders.STATE).write_text(content)
    with pytest.raises(ConfigError, match=f"{folders.STATE} is damaged: .*; remove .*out.partial"):
        PartialFolder(tmp_path / "out", {})


def test_a_state_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / folders.STATE).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=rf"cannot read .*{folders.STATE}: Is a directory"):
        PartialFolder(tmp_path / "out", {})


def test_a_filesystem_without_locks_is_not_taken_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match=r"cannot lock .*: No locks available.*name a folder on another"):
        PartialFolder(tmp_path / "out", {}).__enter__()


def test_a_limit_on_the_size_of_files_is_explained(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pwrite(descriptor: int, content: Any, offset: int) -> int:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(folders.os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match=r"File too large \(errno 27\); raise the limit on the size of files"):
        quantize_checkpoint(llama, tmp_path / "out", "int8")


def test_a_tensor_of_zeros_is_no_reason_to_refuse(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out", "int8")
    scale = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.up_proj.weight_scale"]
    assert torch.equal(scale, torch.ones_like(scale))


def interrupt(*_arguments: object) -> Any:
    raise KeyboardInterrupt


def test_ctrl_c_tells_where_what_is_complete_lies(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders.os, "pwrite", interrupt)
    assert main(["quantize", str(llama), f"{tmp_path}/out/", "--scheme", "int8"]) == 130
    assert f"what is complete is in {tmp_path}/out.partial; give the same command" in capsys.readouterr().err


def test_ctrl_c_promises_nothing_before_the_folder_is_there(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", interrupt)
    assert main(["quantize", str(llama), f"{tmp_path}/out", "--scheme", "int8"]) == 130
    assert capsys.readouterr().err == "\ntorchinfer: interrupted\n"
