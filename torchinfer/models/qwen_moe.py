"""Qwen2-MoE and Qwen3-MoE: the Llama block with experts in some or all layers, and in Qwen2 a shared expert."""

from __future__ import annotations

from torchinfer.models import llama
from torchinfer.models.config import ModelConfig, MoEConfig
from torchinfer.models.config_keys import ConfigKeys
from torchinfer.weight_map import Target

EXPERTS = {
    "model.layers.{layer}.mlp.gate.weight": Target("layers.{layer}.mlp.router.weight"),
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": Target("layers.{layer}.mlp.experts.gate_up", "gate"),
    "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": Target("layers.{layer}.mlp.experts.gate_up", "up"),
    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": Target("layers.{layer}.mlp.experts.down"),
    "model.layers.{layer}.mlp.shared_expert.gate_proj.weight": Target(
        "layers.{layer}.mlp.shared_expert.gate_up.weight", "gate"
    ),
    "model.layers.{layer}.mlp.shared_expert.up_proj.weight": Target(
        "layers.{layer}.mlp.shared_expert.gate_up.weight", "up"
    ),
    "model.layers.{layer}.mlp.shared_expert.down_proj.weight": Target("layers.{layer}.mlp.shared_expert.down.weight"),
    "model.layers.{layer}.mlp.shared_expert_gate.weight": Target("layers.{layer}.mlp.shared_gate.weight"),
}


class Model(llama.Model):
    """A stack of Llama blocks, dense or with experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, llama.MLP | EXPERTS)


def read_config(keys: ConfigKeys) -> ModelConfig:
    """Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    is_qwen2 = keys.architecture == "Qwen2MoeForCausalLM"
    num_experts, top_k = keys.experts()
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=keys.integer("moe_intermediate_size"),
        is_normalized=keys.flag("norm_topk_prob", False),
        shared_intermediate_size=keys.integer("shared_expert_intermediate_size") if is_qwen2 else None,
        layers=_sparse_layers(keys),
    )
    return llama.read_decoder(keys, moe)


def _sparse_layers(keys: ConfigKeys) -> tuple[int, ...]:
    num_layers, step = keys.layers("num_hidden_layers"), keys.integer("decoder_sparse_step", 1)
    dense = keys.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        keys.problems.append(f"mlp_only_layers={dense!r} must be a list of layer numbers")
        dense = []
    return tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)
