"""Quantized checkpoints as they are written: values, files, what is refused, and runs that were stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.fake_gcs import FakeGcs
from torchinfer.loader import Checkpoint, LoadOptions, load_model
from torchinfer.loader.placement import place
from torchinfer.models.config import ModelConfig
from torchinfer.quantization import SCHEMES, QuantizedMatrix
from torchinfer.quantization.formats.unpack import to_nibbles
from torchinfer.testing import save_random_checkpoint, tiny_config
from torchinfer.writer.compressed_tensors import Stored, quantization_config
from torchinfer.writer.folder import PartialFolder
from torchinfer.writer.layout import plan_file, plan_files
from torchinfer.writer.quantize import quantize_checkpoint

CPU = torch.device("cpu")
MIB = 1 << 20
EVERYTHING = {
    "lm_head": "int8",
    "*.self_attn.*": "int4_g32",
    "*.layers.0.mlp.*": "fp8_block",
    "*.mlp.gate_proj": "int8_w8a8",
    "*.mlp.up_proj": "int8_w8a8",
    "*": "fp8_w8a8",
}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def decoded(layer: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Values and scale as they are held here, of a layer in a file."""
    scale = tensors[f"{layer}.weight_scale"]
    if f"{layer}.weight" in tensors:
        return tensors[f"{layer}.weight"], scale
    rows, columns = tensors[f"{layer}.weight_shape"].tolist()
    values = tensors[f"{layer}.weight_packed"].view(torch.uint8)
    if values.shape[1] * 2 == columns:
        return values, scale
    return (values[:rows, :columns].to(torch.int16) - 128).to(torch.int8), scale


def loaded(folder: Path, request: Any) -> Any:
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    return load_model(checkpoint, config, torch.float32, CPU, quantization=request)


def as_bytes(tensor: Tensor) -> list[int]:
    found: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("request_", [*SCHEMES, EVERYTHING], ids=lambda request: str(request)[:9])
def test_values_and_scales_are_those_that_a_load_holds(request_: Any, llama: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama, tmp_path / "out", request_)
    written, model = tensors_of(tmp_path / "out"), loaded(llama, request_)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}
    placements, _ = place(model, Checkpoint.open(llama).tensors)
    placements = {name: placement for name, placement in placements.items() if placement.matrix is not None}
    assert len(placements) >= 14
    for name, placement in placements.items():
        values, scale = decoded(name.removesuffix(".weight"), written)
        matrix = packed[placement.parameter]
        if values.dtype == torch.int8 and matrix.values.dtype == torch.uint8:
            values = to_nibbles(values, placement.part(matrix.values).shape)
        assert as_bytes(values) == as_bytes(placement.part(matrix.values))
        assert torch.equal(scale, placement.part(matrix.scale, matrix.scheme.row_block))


def test_experts_are_written_one_by_one(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("mixtral"), tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8")
    model = loaded(tmp_path / "in", "int8")
    layer = "model.layers.1.block_sparse_moe.experts.3.w3"
    values, scale = decoded(layer, tensors_of(tmp_path / "out"))
    experts = model.layers[1].mlp.experts
    assert torch.equal(values, experts.gate_up.values[3, experts.slots["up"]])
    assert torch.equal(scale, experts.gate_up.scale[3, experts.slots["up"]])


def test_merged_layers_of_the_checkpoint_stay_in_its_order(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("falcon-new"), tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8")
    name = "transformer.h.0.self_attention.query_key_value"
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    values, scale = decoded(name, after)
    expected = SCHEMES["int8"].pack(before[f"{name}.weight"])
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    assert torch.equal(values, expected["values"]) and torch.equal(scale, expected["scale"])


def test_an_odd_number_of_inputs_is_padded_to_whole_words(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama-odd"), tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8")
    written = tensors_of(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    assert written[f"{name}.weight_packed"].shape == (96, 17)
    assert written[f"{name}.weight_shape"].tolist() == [96, 66]
    expected = SCHEMES["int8"].pack(tensors_of(tmp_path / "in")[f"{name}.weight"])["values"]
    assert torch.equal(decoded(name, written)[0], expected)


def test_what_is_not_quantized_is_copied_bit_by_bit(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama-tied"), tmp_path / "in", dtype=torch.bfloat16)
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8")
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    kept = [name for name in before if "norm" in name or "embed" in name]
    assert len(kept) == 8
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in kept)


def test_shards_keep_their_names_and_their_tensors(sharded: Path, tmp_path: Path) -> None:
    quantize_checkpoint(sharded, tmp_path / "out", "int8")
    for file in sharded.glob("*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(tmp_path / "out" / file.name, "pt") as after:
            layers = {name.rpartition(".")[0] for name in after.keys()}
            assert layers == {name.rpartition(".")[0] for name in before.keys()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "out"))


def test_one_file_is_divided_where_it_becomes_too_large(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    placements, _ = place(loaded(llama, "int8"), checkpoint.tensors)
    files = plan_files(checkpoint, placements, largest_bytes=MIB)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert all(file.num_bytes < 1.1 * MIB for file in files)


def test_tensors_are_aligned_for_their_dtype() -> None:
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.ones(5), "c": torch.ones(1, dtype=torch.bfloat16)}
    tensors["d"] = torch.arange(2)
    plan = plan_file("file", {name: [Stored(name, t.dtype, tuple(t.shape))] for name, t in tensors.items()})
    offsets = {name: plan.slots[name][0].offset for name in tensors}
    assert sorted(tensors, key=lambda name: offsets[name]) == ["d", "b", "c", "a"]
    assert all(offsets[name] % tensor.dtype.itemsize == 0 for name, tensor in tensors.items())


def test_small_files_are_copied_but_no_pickle_and_no_program(sharded: Path, tmp_path: Path) -> None:
    quantize_checkpoint(sharded, tmp_path / "out", "int8")
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert names == {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"some": "vocabulary"}'


def test_the_config_says_what_is_quantized_and_how(llama: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama, tmp_path / "out", "int4")
    before = json.loads((llama / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    section = after.pop("quantization_config")
    assert after == before
    assert (section["quant_method"], section["format"], section["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    weights = section["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 128)


def test_a_pattern_of_the_config_fits_all_layers_where_no_other_has_that_name() -> None:
    schemes = {f"model.layers.{layer}.up": SCHEMES["int8"] for layer in range(12)}
    schemes |= {f"model.layers.{layer}.down": SCHEMES["fp8" if layer else "int8"] for layer in range(2)}
    groups = quantization_config(schemes, ["lm_head"])["config_groups"]
    assert groups["group_0"]["targets"] == [
        r"re:^model\.layers\.[0-9]+\.up$",
        r"re:^model\.layers\.0\.down$",
    ]
    assert groups["group_1"]["targets"] == [r"re:^model\.layers\.1\.down$"]


def test_a_bucket_is_read_like_a_folder(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").symlink_to(sharded)
    quantize_checkpoint(sharded, tmp_path / "local", "int8")
    with FakeGcs(tmp_path) as gcs:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.endpoint)
        quantize_checkpoint("gs://bucket", tmp_path / "remote", "int8")
    assert files_of(tmp_path / "remote") == files_of(tmp_path / "local")


def test_staging_memory_stays_within_its_limit(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 160_000  # two matrices of 39 MiB
    save_random_checkpoint(config, tmp_path / "in")
    report = quantize_checkpoint(
        tmp_path / "in", tmp_path / "out", {"lm_head": "int8"}, options=LoadOptions(memory=32 * MIB)
    )
    assert 8 * MIB < report.peak_host_bytes <= 32 * MIB
    expected = SCHEMES["int8"].pack(tensors_of(tmp_path / "in")["lm_head.weight"])["values"]
    assert torch.equal(decoded("lm_head", tensors_of(tmp_path / "out"))[0], expected)


def test_a_flipped_bit_is_found_when_files_are_verified(sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "in")
    names = [path.name for path in (tmp_path / "in").glob("*.safetensors")]
    (tmp_path / "in" / "CRC32C").write_text("".join(f"00000000  {name}\n" for name in names))
    with pytest.raises(CheckpointError, match="do not have their CRC32C"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8", options=LoadOptions(verify=True))
    assert not (tmp_path / "out").exists()


# What is refused, before anything is written


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        ("int5", "scheme 'int5' of '\\*' is unknown"),
        ({"*.nothing": "int8"}, "no layer's name fits pattern"),
        ({"*.q_proj": "int8"}, "are one matrix here and must have one scheme"),
        ({"*": "none"}, "there is nothing to write"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused(scheme: Any, text: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        quantize_checkpoint(llama, tmp_path / "out", scheme)
    assert list(tmp_path.iterdir()) == []


def test_all_layers_that_a_scheme_does_not_fit_are_counted(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path / "in")
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int4")
    assert "'model.layers.0.self_attn.q_proj' and 8 more as int4: 64 inputs are not" in str(caught.value)
    assert "'model.layers.0.mlp.down_proj' and 2 more as int4: 96 inputs are not" in str(caught.value)


def test_a_quantized_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama, tmp_path / "out", "int8")
    with pytest.raises(ConfigError, match="is quantized already, quant_method='compressed-tensors'"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", "int8")


def test_a_folder_that_exists_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out exists; name a folder that does not"):
        quantize_checkpoint(llama, tmp_path / "out", "int8")


def test_a_bucket_cannot_be_written_to(llama: Path) -> None:
    with pytest.raises(ConfigError, match="gs://bucket/new cannot be written to; name a folder"):
        quantize_checkpoint(llama, "gs://bucket/new", "int8")


def test_too_little_space_is_found_before_anything_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=f"and {MIB} are free there"):
        quantize_checkpoint(llama, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


# Runs that were stopped


def stop_after(monkeypatch: pytest.MonkeyPatch, num_files: int, error: BaseException) -> None:
    """The first `num_files` files are completed, then writing fails."""
    whole, renamed = os.pwrite, os.rename
    done: list[str] = []

    def rename(before: Any, after: Any) -> None:
        renamed(before, after)
        done.extend([str(after)] if str(after).endswith(".safetensors") else [])

    def pwrite(descriptor: int, content: Any, offset: int) -> int:
        if len(done) >= num_files:
            raise error
        return whole(descriptor, content, offset)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "pwrite", pwrite)


def stop(
    monkeypatch: pytest.MonkeyPatch, source: Path, output: Path, error: BaseException, scheme: str = "int8"
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1, error)
        with pytest.raises((type(error), CheckpointError)):
            quantize_checkpoint(source, output, scheme)


def test_a_full_disk_gives_a_message_and_leaves_nothing_that_looks_whole(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"No space left on device \(errno 28\); the disk is full: free some"):
        quantize_checkpoint(sharded, tmp_path / "out", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    left = sorted(path.name for path in (tmp_path / "out.partial").iterdir())
    assert left[1:] == ["quantize.state.json"]
    assert left[0] in {path.name for path in sharded.iterdir()}  # the one that was completed


def test_complete_shards_are_not_read_again(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint(sharded, tmp_path / "whole", "int8")
    stop(monkeypatch, sharded, tmp_path / "out", KeyboardInterrupt())
    report = quantize_checkpoint(sharded, tmp_path / "out", "int8")
    assert report.num_resumed_files == 1
    assert 0 < report.read_bytes < report.input_bytes
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_killed_run_goes_on(sharded: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "calls, whole = [], os.fsync\n"
        "def fsync(descriptor):\n"
        "    calls.append(os.readlink(f'/proc/self/fd/{descriptor}'))\n"
        "    if sum('.safetensors' in call for call in calls) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    whole(descriptor)\n"
        "os.fsync = fsync\n"
        "from torchinfer.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = ["quantize", str(sharded), str(tmp_path / "out"), "--scheme", "int8"]
    killed = subprocess.run([sys.executable, "-c", program, *argv], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert any(path.name.endswith(".partial") for path in (tmp_path / "out.partial").iterdir())
    report = quantize_checkpoint(sharded, tmp_path / "out", "int8")
    quantize_checkpoint(sharded, tmp_path / "whole", "int8")
    assert report.num_resumed_files == 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_run_with_other_options_does_not_go_on(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop(monkeypatch, sharded, tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(ConfigError, match='was begun otherwise: scheme was "int8", now it is "fp8"'):
        quantize_checkpoint(sharded, tmp_path / "out", "fp8")


def test_a_source_that_changed_does_not_go_on(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(sharded, tmp_path / "in")
    stop(monkeypatch, tmp_path / "in", tmp_path / "out", KeyboardInterrupt())
    file = next((tmp_path / "in").glob("*.safetensors"))
    save_file(load_file(file), file, {"format": "pt"})
    with pytest.raises(ConfigError, match="was begun otherwise: source was"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8")


def test_a_folder_that_no_run_has_left_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "diary.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no folder of a run that was stopped"):
        quantize_checkpoint(llama, tmp_path / "out", "int8")


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first, second = PartialFolder(tmp_path / "out", {}), PartialFolder(tmp_path / "out", {})
    with first, pytest.raises(ConfigError, match="another process writes to"), second:
        pass
