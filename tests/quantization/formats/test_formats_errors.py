"""What damaged and contradictory checkpoints get, whatever tool wrote them; what inspect says of good ones."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from torchinfer.config import EngineConfig
from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.launch import start_engine
from torchinfer.loader import Checkpoint, load_model
from torchinfer.loader.inspect import inspect
from torchinfer.loader.placement import place
from torchinfer.loader.published import hold_published
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import Shard
from torchinfer.testing import assert_close

INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
STATIC = {**INPUTS, "strategy": "tensor", "dynamic": False}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": INPUTS, "output_activations": None}
SETTINGS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"],
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "version": "0.15.0",
}
SCALE = "model.layers.1.self_attn.k_proj.weight_scale"


def by_output(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {".weight": values, ".weight_scale": scale}, values * scale


@pytest.fixture
def int8(bed):
    bed.quantize(by_output, SETTINGS)
    return bed


def refusal(bed, settings: dict[str, Any] | None = None) -> str:
    bed.folder({**bed.settings, **(settings or {})})
    with pytest.raises(CheckpointError) as caught:
        bed.load()
    return str(caught.value)


def with_group(**changes: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {**GROUP, **changes}}}


def test_a_missing_scale_is_named(int8):
    del int8.tensors[SCALE]
    message = refusal(int8)
    assert f"missing: '{SCALE}'" in message
    assert "download" in message


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_scale_that_is_none_is_named_with_its_value(int8, value):
    int8.tensors[SCALE][3] = value
    message = refusal(int8)
    assert SCALE in message
    assert str(value) in message
    assert "positive" in message


def test_an_input_scale_that_is_none_is_named(int8):
    for layer in int8.numbers:
        int8.tensors[f"{layer}.input_scale"] = torch.tensor([0.1])
    int8.tensors["model.layers.0.mlp.down_proj.input_scale"] = torch.tensor([0.0])
    assert "model.layers.0.mlp.down_proj.input_scale" in refusal(int8, with_group(input_activations=STATIC))


def test_quantizing_what_comes_quantized_is_refused(int8):
    checkpoint = Checkpoint.open(int8.folder())
    config = ModelConfig.from_dict(checkpoint.config)
    with pytest.raises(ConfigError, match=r"quantization='int4'.*leave the option out"):
        load_model(checkpoint, config, torch.float32, torch.device("cpu"), quantization="int4")


def test_the_older_key_is_read(int8):
    int8.folder(key="compression_config")
    assert int8.load().layers[0].mlp.down.weight.scheme.name == "int8_w8a8"


def test_layers_that_are_merged_here_must_be_quantized_alike(int8):
    message = refusal(int8, {"ignore": ["lm_head", "model.layers.1.self_attn.k_proj"]})
    assert "model.layers.1.self_attn.q_proj" in message
    assert "model.layers.1.self_attn.k_proj" in message
    assert "not quantized" in message


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_up_proj", "re:.*layers\\.0\\.mlp\\.(gate|up)_proj"])
def test_a_layer_may_be_left_out_by_pattern_or_by_the_name_of_what_it_is_merged_into(bed, name):
    ignored = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    layers = [layer for layer in bed.layers() if layer not in ignored]
    bed.quantize(by_output, {**SETTINGS, "ignore": ["lm_head", name]}, layers)
    bed.folder()
    assert isinstance(bed.load().layers[0].mlp.gate_up.weight, torch.nn.Parameter)


def test_a_group_that_names_a_layer_counts_before_the_class(bed):
    def in_groups(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = weight.view(len(weight), -1, 32)
        scale = groups.abs().amax(2) / 127
        values = (groups / scale[..., None]).round()
        return {
            ".weight": values.view(weight.shape).to(torch.int8),
            ".weight_scale": scale,
        }, (values * scale[..., None]).view(weight.shape)

    down = {**WEIGHTS, "strategy": "group", "group_size": 32}
    plain = {**GROUP, "input_activations": None}
    groups = {"group_0": plain, "group_1": {**plain, "targets": ["re:.*down_proj$"], "weights": down}}
    layers = bed.layers()
    bed.quantize(in_groups, {}, [layer for layer in layers if layer.endswith("down_proj")])
    others = [layer for layer in layers if not layer.endswith("down_proj")]
    bed.quantize(by_output, {**SETTINGS, "config_groups": groups}, others)
    assert_close(bed.logits(), bed.expected_logits())


def test_scales_of_a_quantized_cache_are_left_out_and_logged(int8, caplog):
    int8.tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5])
    assert "k_scale" in refusal(int8)
    int8.folder({**SETTINGS, "kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    with caplog.at_level(logging.INFO, "torchinfer"):
        int8.load()
    assert any("kv_cache_scheme" in record.getMessage() for record in caplog.records)


def test_zero_points_of_symmetric_weights_must_be_zeros(int8):
    name = "model.layers.0.mlp.down_proj.weight_zero_point"
    int8.tensors[name] = torch.zeros(64, 1, dtype=torch.int8)
    int8.folder()
    int8.load()
    int8.tensors[name][7] = 3
    message = refusal(int8)
    assert name in message
    assert "3.0" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "marlin-24"}, "format='marlin-24'"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"quantization_status": "calibration"}, "quantization_status='calibration'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16=['Linear']"),
        ({"ignore": "lm_head"}, "ignore='lm_head'"),
        ({"magic": 3}, "magic=3"),
        (with_group(weights={**WEIGHTS, "num_bits": 2}), "config_groups.group_0.weights.num_bits=2"),
        (with_group(weights={**WEIGHTS, "type": "float"}), "weights.type='float'"),
        (with_group(weights={**WEIGHTS, "strategy": "tensor_group"}), "tensor_group"),
        (with_group(weights={**WEIGHTS, "symmetric": False}), "asymmetric"),
        (with_group(weights={**WEIGHTS, "strategy": "group", "group_size": 32}, input_activations=STATIC), "grouped"),
        (with_group(weights={**WEIGHTS, "magic": 1}), "weights.magic=1"),
        (with_group(weights=None), "weights is missing"),
        (with_group(input_activations={**INPUTS, "symmetric": False}), "input_activations.symmetric=False"),
        (with_group(input_activations={**INPUTS, "num_bits": 4}), "input_activations.num_bits=4"),
        (with_group(input_activations={**INPUTS, "type": "float"}), "input_activations.type='float'"),
        (with_group(input_activations={**INPUTS, "dynamic": "local"}), "dynamic='local'"),
        (with_group(output_activations=INPUTS), "output_activations"),
        (with_group(targets=["Linear", "re:("]), "config_groups.group_0.targets has 're:('"),
        ({"ignore": ["re:*"]}, "ignore has 're:*'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(int8, settings, expected):
    assert expected in refusal(int8, settings)


def test_numbers_that_4_bits_do_not_hold_are_named(int8):
    message = refusal(int8, with_group(weights={**WEIGHTS, "num_bits": 4}))
    assert "mlp.down_proj.weight" in message and "to 127, but 4 bits hold those from -8 to 7" in message


def test_the_wrong_dtype_of_a_weight_is_named(int8):
    name = "model.layers.0.mlp.up_proj.weight"
    int8.tensors[name] = int8.tensors[name].float()
    message = refusal(int8)
    assert name in message
    assert "int8 is needed" in message


def test_settings_that_are_no_object_are_refused(int8):
    int8.folder()
    file = int8.root / "quantized" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": "int8"}))
    with pytest.raises(CheckpointError, match="'int8'"):
        int8.load()


def test_the_engine_takes_the_dtype_of_the_config(int8):
    folder = int8.folder()
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    engine = start_engine(EngineConfig(model=str(folder), device="cpu", kv_cache_memory=1 << 20))
    assert engine.info.dtype == "bfloat16"
    assert engine.info.num_parameters == inspect(folder).num_parameters


def test_inspect_tells_how_a_checkpoint_comes_quantized(int8):
    found = inspect(int8.folder())
    assert found.is_usable
    assert found.quantization == "compressed-tensors: int8_w8a8 in 8 matrices; as they are: lm_head"
    assert found.num_parameters == sum(tensor.numel() for name, tensor in int8.tensors.items() if "_scale" not in name)
    assert "quantization:   compressed-tensors" in found.to_text()


def test_inspect_names_what_is_wrong(int8):
    del int8.tensors[SCALE]
    found = inspect(int8.folder())
    assert any(SCALE in problem for problem in found.problems)
    unsupported = inspect(int8.folder({"quant_method": "hqq"}))
    assert "'hqq'" in str(unsupported.unsupported)
    assert unsupported.quantization == "hqq"


def test_a_part_of_a_quantized_checkpoint_is_refused(int8):
    checkpoint = Checkpoint.open(int8.folder())
    with torch.device("meta"):
        model = build_model(ModelConfig.from_dict(checkpoint.config))
    checkpoint = hold_published(model, checkpoint, torch.device("cpu"))
    _, problems = place(model, checkpoint.tensors, Shard(0, 2))
    assert any("read by one process" in problem and "2" in problem for problem in problems)
