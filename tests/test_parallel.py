"""How a model is divided: what each chip gets, put together, is the whole; and what cannot be divided is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchinfer import EngineConfig, launch
from torchinfer.errors import ConfigError
from torchinfer.loader.schemes import quantize_model
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import (
    DividedModel,
    Division,
    Shard,
    divide,
    partition_problems,
    tensors_of,
    with_expert_parallel,
)
from torchinfer.testing import save_random_checkpoint, tiny_config

CPU = torch.device("cpu")


def tiny_model_config(name: str, **changes: Any) -> ModelConfig:
    raw = {**tiny_config(name).to_dict(), **changes}
    raw["architectures"] = [type(tiny_config(name)).__name__.replace("Config", "ForCausalLM")]
    return ModelConfig.from_dict(raw)


def divided(name: str, num_chips: int, quantization: Any = None, **changes: Any) -> DividedModel:
    with torch.device("meta"):
        whole = build_model(tiny_model_config(name, **changes))
    if quantization is not None:
        quantize_model(whole, quantization, CPU)
    return divide(whole, num_chips)


def numbered(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def shares(division: Division, tensor: Tensor, num_chips: int) -> list[Tensor]:
    return [division.of(tensor, Shard(chip, num_chips)) for chip in range(num_chips)]


@pytest.mark.parametrize("num_chips", [2, 4])
@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama-biases", None), ("llama-tied", "int8"), ("gptj", None), ("falcon-7b", "int8_w8a8"), ("qwen2-moe", "int8")],
)
def test_every_chip_gets_a_tensor_of_its_size_and_all_of_them_have_every_number(
    name: str, quantization: str | None, num_chips: int
) -> None:
    model = divided(name, num_chips, quantization)
    local = tensors_of(model.local)
    assert local.keys() == tensors_of(model.whole).keys()
    for tensor_name, tensor in tensors_of(model.whole).items():
        whole = numbered(tensor)
        found = shares(model.divisions[tensor_name], whole, num_chips)
        assert all(share.shape == local[tensor_name].shape for share in found), tensor_name
        together = torch.cat([share.flatten() for share in found]).unique()
        assert torch.equal(together, whole.flatten().unique()), tensor_name


def test_a_chip_has_its_heads_of_q_k_and_v_and_neighbours_have_the_same_keys() -> None:
    model = divided("llama", 4)  # 4 heads of 16, 2 key heads
    whole = numbered(model.whole.layers[0].attention.qkv.weight)
    found = shares(model.divisions["layers.0.attention.qkv.weight"], whole, 4)
    for chip, share in enumerate(found):
        key = 64 + chip // 2 * 16
        rows = [*range(chip * 16, chip * 16 + 16), *range(key, key + 16), *range(key + 32, key + 48)]
        assert torch.equal(share, whole[rows])


def test_gate_and_up_of_experts_are_cut_side_by_side_and_down_by_inputs() -> None:
    model = divided("mixtral", 2)  # 96 inner values
    whole = numbered(model.whole.layers[0].mlp.experts.gate_up)
    _, second = shares(model.divisions["layers.0.mlp.experts.gate_up"], whole, 2)
    assert torch.equal(second, torch.cat((whole[:, 48:96], whole[:, 144:]), 1))
    down = numbered(model.whole.layers[0].mlp.experts.down)
    _, second = shares(model.divisions["layers.0.mlp.experts.down"], down, 2)
    assert torch.equal(second, down[:, :, 48:])


def test_experts_are_divided_among_chips_if_that_is_asked_for() -> None:
    with torch.device("meta"):
        whole = build_model(with_expert_parallel(tiny_model_config("mixtral", num_local_experts=6)))
    quantize_model(whole, "int8", CPU)
    model = divide(whole, 2)
    for name, size in (("gate_up.values", 192), ("gate_up.scale", 192), ("down.values", 64)):
        tensor = numbered(tensors_of(whole)[f"layers.0.mlp.experts.{name}"])
        _, second = shares(model.divisions[f"layers.0.mlp.experts.{name}"], tensor, 2)
        assert torch.equal(second, tensor[3:]) and second.shape[1] == size
    _, second = shares(model.divisions["layers.0.mlp.first_expert"], whole.layers[0].mlp.first_expert, 2)
    assert second.tolist() == [3]
    assert partition_problems(whole.config, 4) == ["num_experts=6 is not divisible by 4 chips"]


def test_experts_of_a_model_without_them_are_refused() -> None:
    with pytest.raises(ConfigError, match="expert_parallel=True: LlamaForCausalLM has no experts"):
        with_expert_parallel(tiny_model_config("llama"))


def test_a_bias_is_added_to_a_sum_once_and_rows_that_pad_a_vocabulary_are_zeros() -> None:
    model = divided("llama-biases", 4, vocab_size=5)
    bias = torch.ones(64)
    found = shares(model.divisions["layers.0.attention.output.bias"], bias, 4)
    assert [share.sum().item() for share in found] == [64, 0, 0, 0]
    table = torch.arange(1, 6)[:, None]
    found = shares(model.divisions["embedding.weight"], table, 4)
    assert [share.flatten().tolist() for share in found] == [[1, 2], [3, 4], [5, 0], [0, 0]]
    assert model.divisions["layers.0.attention.qkv.bias"].dim == 0
    assert model.divisions["layers.0.attention_norm.weight"] == Division()


@pytest.mark.parametrize(
    ("num_chips", "groups"), [(2, [[0, 1], [2, 3]]), (8, [[0], [0], [1], [1], [2], [2], [3], [3]])]
)
def test_groups_of_inputs_go_with_them_or_are_shared_by_neighbours(num_chips: int, groups: list[list[int]]) -> None:
    model = divided("llama", num_chips, "int4_g64", intermediate_size=256, num_attention_heads=8, head_dim=64)
    scale = numbered(torch.empty(1, 4))
    found = shares(model.divisions["layers.0.mlp.down.weight.scale"], scale, num_chips)
    assert [share.flatten().tolist() for share in found] == groups
    assert model.divisions["layers.0.mlp.down.weight.values"].dim == 1


@pytest.mark.parametrize(
    ("quantization", "changes", "message"),
    [
        (
            "int4_g32",
            {},
            "layers.0.mlp.down.weight and 2 more: as int4_g32, 32 inputs share a scale, and a chip has 48",
        ),
        (
            "fp8_block",
            {"intermediate_size": 384, "head_dim": 128},
            "as fp8_block, 128 outputs share a scale, and a chip has 192: use fp8, or fewer chips",
        ),
        (
            "fp8_block_w8a8",
            {"intermediate_size": 384, "head_dim": 128},
            "as fp8_block_w8a8, 128 inputs share a scale, and a chip has 192: use a smaller group",
        ),
    ],
)
def test_scales_that_would_belong_to_two_chips_are_refused(
    quantization: str, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        divided("llama", 2, {"*.mlp.*": quantization}, **changes)
    assert message in str(error.value) and "cannot be divided among 2 chips" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, "num_heads=4 is not divisible by 3 chips"),
        ({"tensor_parallel_size": 8}, "num_heads=4 is not divisible by 8 chips"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_loaded(
    options: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    monkeypatch.setattr(launch, "start_ranks", lambda config: pytest.fail("processes would have been started"))
    with pytest.raises(ConfigError) as error:
        launch.start_engine(EngineConfig(model=tmp_path, device="cpu", **options))
    assert message in str(error.value)


def test_heads_that_neither_divide_nor_are_divided_are_named() -> None:
    config = divided("llama-odd", 3).whole.config  # 6 heads, 3 key heads
    assert partition_problems(config, 3) == []
    assert partition_problems(config, 2) == ["num_kv_heads=3 neither divides 2 chips nor is divisible by them"]
