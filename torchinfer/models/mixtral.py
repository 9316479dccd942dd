"""Mixtral: the Llama block with experts in every layer."""

from __future__ import annotations

from torchinfer.models import llama
from torchinfer.models.config import ModelConfig, MoEConfig
from torchinfer.models.config_keys import ConfigKeys
from torchinfer.weight_map import Target

EXPERTS = {
    "model.layers.{layer}.block_sparse_moe.gate.weight": Target("layers.{layer}.mlp.router.weight"),
    "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight": Target(
        "layers.{layer}.mlp.experts.gate_up", "gate"
    ),
    "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight": Target(
        "layers.{layer}.mlp.experts.gate_up", "up"
    ),
    "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": Target("layers.{layer}.mlp.experts.down"),
}


class Model(llama.Model):
    """A stack of Llama blocks with experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, EXPERTS)


def read_config(keys: ConfigKeys) -> ModelConfig:
    """The weights of the chosen experts always sum to one."""
    num_experts, top_k = keys.experts()
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=keys.integer("intermediate_size"),
        is_normalized=True,
        layers=tuple(range(keys.layers("num_hidden_layers"))),
    )
    return llama.read_decoder(keys, moe)
