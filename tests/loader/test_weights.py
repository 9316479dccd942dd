"""Filling models: values, dtypes, ties, refusals before any data is read, and the memory that it takes."""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import google_crc32c
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchinfer.errors import CheckpointError, DeviceError
from torchinfer.loader import Checkpoint, LoadOptions, load_model, load_weights
from torchinfer.loader.opening import Deliver
from torchinfer.models.config import ModelConfig
from torchinfer.weight_map import Target

CPU = torch.device("cpu")
LLAMA_QKV = "layers.1.attention.qkv.weight"


class Toy(nn.Module):
    """Everything that a model can ask of the loader."""

    CHECKPOINT: ClassVar[Mapping[str, Target]] = {
        "q": Target("weight", "q"),
        "k": Target("weight", "k"),
        "turned": Target("turned", transform=lambda tensor: tensor.flip(0)),
        "embed": Target("embedding.weight"),
        "head": Target("head.weight"),
        "e.{expert}.up": Target("experts", "up"),
        "e.{expert}.gate": Target("experts", "gate"),
        "steps": Target("steps"),
    }
    IGNORED: ClassVar[tuple[str, ...]] = ("old.{layer}",)

    def __init__(self) -> None:
        super().__init__()
        self.slots = {"q": slice(0, 2), "k": slice(2, 3), "gate": slice(0, 1), "up": slice(1, 2)}
        self.weight = nn.Parameter(torch.empty(3, 4))
        self.turned = nn.Parameter(torch.empty(3))
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.experts = nn.Parameter(torch.empty(3, 2, 4))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0, device="cpu"), persistent=False)


def toy_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 4), "k": (1, 4), "turned": (3,), "embed": (5, 4), "old.7": (2,)}
    shapes |= {f"e.{expert}.{part}": (1, 4) for expert in range(3) for part in ("gate", "up")}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return found | {"steps": torch.tensor(12)}


def save(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"architectures": ["Toy"]}')
    return Checkpoint.open(folder)


def build() -> Toy:
    with torch.device("meta"):
        return Toy()


def load_toy(folder: Path, dtype: torch.dtype = torch.float32) -> Toy:
    model = build()
    load_weights(model, save(folder, toy_tensors()), dtype, CPU, progress=False)
    return model


def test_what_is_delivered_is_whole_and_has_left_the_host_before_the_next(tmp_path: Path) -> None:
    delivered: dict[str, Tensor] = {}
    handed: list[weakref.ref[Tensor]] = []

    def deliver(name: str, tensor: Tensor) -> Tensor:
        assert all(reference() is None for reference in handed)
        handed.append(weakref.ref(tensor))
        delivered[name] = tensor.clone()
        return torch.zeros(())

    load_weights(build(), save(tmp_path, toy_tensors()), torch.float32, CPU, progress=False, deliver=Deliver(deliver))
    expected = load_toy(tmp_path)
    found = {name: tensor for name, tensor in expected.state_dict().items() if name != "head.weight"}
    assert delivered.keys() == found.keys()
    assert all(torch.equal(delivered[name], tensor) for name, tensor in found.items())


def test_slots_are_filled_with_their_rows(tmp_path: Path) -> None:
    tensors = toy_tensors()
    assert torch.equal(load_toy(tmp_path).weight, torch.cat((tensors["q"], tensors["k"])))


def test_experts_are_stacked(tmp_path: Path) -> None:
    tensors = toy_tensors()
    expected = torch.stack([torch.cat((tensors[f"e.{i}.gate"], tensors[f"e.{i}.up"])) for i in range(3)])
    assert torch.equal(load_toy(tmp_path).experts, expected)


def test_transforms_are_applied(tmp_path: Path) -> None:
    assert torch.equal(load_toy(tmp_path).turned, toy_tensors()["turned"].flip(0))


def test_tied_parameters_stay_one(tmp_path: Path) -> None:
    model = load_toy(tmp_path)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, toy_tensors()["embed"])


def test_buffers_keep_their_dtype_and_those_of_no_checkpoint_their_values(tmp_path: Path) -> None:
    model = load_toy(tmp_path, torch.bfloat16)
    assert model.steps.dtype == torch.int64 and model.steps.item() == 12
    assert model.table.tolist() == [0, 1, 2, 3] and model.table.dtype == torch.float32


def test_buffers_stay_buffers_and_parameters_parameters(tmp_path: Path) -> None:
    model = load_toy(tmp_path)
    assert set(dict(model.named_parameters())) == {"weight", "turned", "embedding.weight", "experts"}
    assert set(dict(model.named_buffers())) == {"steps", "table"}


def test_no_parameter_requires_a_gradient(tmp_path: Path) -> None:
    assert not any(parameter.requires_grad for parameter in load_toy(tmp_path).parameters())


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_are_cast_as_torch_casts(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    tensors = {name: x.to(stored) if x.is_floating_point() else x for name, x in toy_tensors().items()}
    model = build()
    load_weights(model, save(tmp_path, tensors), wanted, CPU, progress=False)
    assert torch.equal(model.embedding.weight, tensors["embed"].to(wanted))
    assert model.weight.dtype == model.experts.dtype == wanted


def test_report_and_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torchinfer"):
        report = load_weights(build(), save(tmp_path, toy_tensors()), torch.float32, CPU, progress=False)
    read = [tensor for name, tensor in toy_tensors().items() if name != "old.7"]
    assert (report.num_bytes, report.num_tensors) == (sum(tensor.nbytes for tensor in read), len(read))
    assert (report.num_readers, report.is_direct, report.num_retries) == (1, False, 0)
    (record,) = caplog.records
    assert f"loaded {len(read)} tensors" in record.message and "GB/s" in record.message


def write_sums(folder: Path, flipped: int = 0) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[flipped] ^= flipped > 0
    crc = google_crc32c.value(bytes(content))
    (folder / "CRC32C").write_text(f"{crc:08x}  model.safetensors\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direct", [False, True])
def test_a_whole_file_is_verified_though_not_all_of_it_is_needed(
    tmp_path: Path, dtype: torch.dtype, direct: bool
) -> None:
    checkpoint, options = save(tmp_path, toy_tensors()), LoadOptions(verify=True, direct=direct)
    write_sums(tmp_path)
    model = build()
    load_weights(model, checkpoint, dtype, CPU, False, options)
    assert torch.equal(model.embedding.weight, toy_tensors()["embed"].to(dtype))
    for entry in (checkpoint.tensors["old.7"], checkpoint.tensors["q"]):
        write_sums(tmp_path, flipped=entry.offset)
        with pytest.raises(CheckpointError, match=r"do not have their CRC32C: model.safetensors has \w{8}, \w{8} is"):
            load_weights(build(), checkpoint, dtype, CPU, False, options)


def test_no_progress_bar_where_stderr_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_weights(build(), save(tmp_path, toy_tensors()), torch.float32, CPU, progress=True)
    assert capfd.readouterr().err == ""


def test_everything_that_does_not_fit_is_refused_before_data_is_read(tmp_path: Path) -> None:
    tensors = toy_tensors() | {"extra": torch.ones(1), "turned": torch.ones(4), "k": torch.ones(1, 4).to(torch.int8)}
    del tensors["q"]
    model = build()
    checkpoint = save(tmp_path, tensors)
    (tmp_path / "model.safetensors").unlink()  # whoever reads now, fails otherwise
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, checkpoint, torch.float32, CPU, progress=False)
    for part in (
        "does not fit Toy",
        "1 tensor missing: 'q'",
        "1 tensor unexpected: 'extra'",
        "'turned' has [4], the model needs [3]",
        "'k' has int8",
    ):
        assert part in str(caught.value)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("value", [70000.0, -1e30, float("inf"), float("nan")])
def test_values_beyond_float16_are_refused(tmp_path: Path, value: float) -> None:
    tensors = toy_tensors() | {"turned": torch.tensor([0.0, value, 1.0]).to(torch.bfloat16)}
    with pytest.raises(CheckpointError, match=r"'turned' has values from .* float16 holds .* use dtype bfloat16"):
        load_weights(build(), save(tmp_path, tensors), torch.float16, CPU, progress=False)


def test_a_shard_that_shrinks_during_the_load_is_an_error(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, toy_tensors())
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced or changed"):
        load_weights(build(), checkpoint, torch.float32, CPU, progress=False)


def test_a_device_without_memory_is_a_device_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path, toy_tensors())

    def full(num_bytes: int) -> Tensor:
        raise DeviceError("out of memory")

    monkeypatch.setattr("torchinfer.loader.memory.allocate", full)
    with pytest.raises(DeviceError, match=r"cpu has no memory for .*, \d+ bytes: out of memory; use a device"):
        load_weights(build(), checkpoint, torch.float32, CPU, progress=False)


@pytest.mark.xla
def test_an_xla_device_gets_whole_parameters(tmp_path: Path) -> None:
    torch_xla = pytest.importorskip("torch_xla")
    model, expected = build(), load_toy(tmp_path)
    load_weights(model, Checkpoint.open(tmp_path), torch.float32, torch_xla.device(), progress=False)
    assert all(tensor.device.type == "xla" for tensor in (*model.parameters(), *model.buffers()))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor), name
    assert model.head.weight is model.embedding.weight


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_cuda_device_gets_the_values(tmp_path: Path) -> None:
    model, expected = build(), load_toy(tmp_path, torch.bfloat16)
    load_weights(model, Checkpoint.open(tmp_path), torch.bfloat16, torch.device("cuda"), progress=False)
    for name, tensor in expected.state_dict().items():
        assert model.state_dict()[name].device.type == "cuda"
        assert torch.equal(model.state_dict()[name].cpu(), tensor), name


def test_parameters_that_are_not_on_meta_are_replaced(tmp_path: Path) -> None:
    model = Toy()
    load_weights(model, save(tmp_path, toy_tensors()), torch.float32, CPU, progress=False)
    assert torch.equal(model.embedding.weight, toy_tensors()["embed"])
    assert model.head.weight is model.embedding.weight


class Wide(nn.Module):
    """Four large parameters."""

    CHECKPOINT: ClassVar[Mapping[str, Target]] = {f"w{i}": Target(f"w{i}") for i in range(4)}
    IGNORED: ClassVar[tuple[str, ...]] = ()

    def __init__(self, size: int) -> None:
        super().__init__()
        for i in range(4):
            self.register_parameter(f"w{i}", nn.Parameter(torch.empty(size)))


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not let us reset the peak")
def test_the_host_holds_the_model_and_the_staging_memory(tmp_path: Path) -> None:
    tensor_bytes, limit = 100_000_000, 64 << 20
    checkpoint = save(tmp_path, {f"w{i}": torch.ones(tensor_bytes // 4) for i in range(4)})
    with torch.device("meta"):
        model = Wide(tensor_bytes // 4)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_bytes("VmRSS")
    report = load_weights(model, checkpoint, torch.bfloat16, CPU, False, LoadOptions(memory=limit))
    assert 0 < report.peak_host_bytes <= limit
    model_bytes = 4 * tensor_bytes // 2
    assert resident_bytes("VmHWM") - before < model_bytes + limit + 10_000_000


def test_a_llama_of_two_shards_is_loaded(
    write_shards: Callable[..., Path], config: dict[str, object], llama_tensors: dict[str, Tensor]
) -> None:
    names = sorted(llama_tensors)
    shards = {
        "model-1.safetensors": {name: llama_tensors[name] for name in names[::2]},
        "model-2.safetensors": {name: llama_tensors[name] for name in names[1::2]},
    }
    folder = write_shards(shards)
    model = load_model(Checkpoint.open(folder), ModelConfig.from_dict(config), torch.float32, CPU)
    expected = load_file(folder / "model-1.safetensors") | load_file(folder / "model-2.safetensors")
    merged = [expected[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(model.get_parameter(LLAMA_QKV), torch.cat(merged))
    assert torch.equal(model.get_parameter("head.weight"), expected["lm_head.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(x.numel() for x in expected.values())
    assert not model.training


def test_a_tied_llama_is_loaded_with_or_without_its_head(
    write_shards: Callable[..., Path], config: dict[str, object], llama_tensors: dict[str, Tensor]
) -> None:
    config["tie_word_embeddings"] = True
    for has_head in (True, False):
        tensors = {name: x for name, x in llama_tensors.items() if has_head or name != "lm_head.weight"}
        folder = write_shards({"model.safetensors": tensors}, config)
        model = load_model(Checkpoint.open(folder), ModelConfig.from_dict(config), torch.float32, CPU)
        assert torch.equal(model.get_parameter("embedding.weight"), llama_tensors["model.embed_tokens.weight"])


def test_a_checkpoint_of_another_shape_than_its_config_is_refused(
    write_shards: Callable[..., Path], config: dict[str, object], llama_tensors: dict[str, Tensor]
) -> None:
    config |= {"num_hidden_layers": 3, "vocab_size": 33}
    folder = write_shards({"model.safetensors": llama_tensors}, config)
    with pytest.raises(CheckpointError) as caught:
        load_model(Checkpoint.open(folder), ModelConfig.from_dict(json.loads(json.dumps(config))), torch.float32, CPU)
    assert "9 tensors missing: 'model.layers.2.attention" not in str(caught.value)
    assert "9 tensors missing" in str(caught.value)
    assert "'model.embed_tokens.weight' has [32, 16], the model needs [33, 16]" in str(caught.value)
