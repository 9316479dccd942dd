"""GPT-J: parallel blocks with one norm, rotary embedding of interleaved pairs in part of each head, biased head.

Source: transformers 4.57.6, modeling_gptj.py.
"""

from __future__ import annotations

from torchinfer.models.config import ModelConfig, RopeConfig
from torchinfer.models.config_keys import ConfigKeys
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import LayerNorm
from torchinfer.models.parallel import Block
from torchinfer.weight_map import Target

CHECKPOINT = {
    "transformer.wte.weight": Target("embedding.weight"),
    "lm_head.weight": Target("head.weight"),
    "lm_head.bias": Target("head.bias"),
    **{
        f"transformer.h.{{layer}}.attn.{part}_proj.weight": Target("layers.{layer}.attention.qkv.weight", part)
        for part in "qkv"
    },
    "transformer.h.{layer}.attn.out_proj.weight": Target("layers.{layer}.attention.output.weight"),
    **{
        f"transformer.{theirs}.{kind}": Target(f"{ours}.{kind}")
        for theirs, ours in (
            ("ln_f", "norm"),
            ("h.{layer}.ln_1", "layers.{layer}.attention_norm"),
            ("h.{layer}.mlp.fc_in", "layers.{layer}.mlp.up"),
            ("h.{layer}.mlp.fc_out", "layers.{layer}.mlp.down"),
        )
        for kind in ("weight", "bias")
    },
}
# The causal mask of old checkpoints.
IGNORED = ("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias")


class Model(Decoder):
    """A stack of parallel blocks."""

    def __init__(self, config: ModelConfig) -> None:
        norm = LayerNorm(config.hidden_size, config.norm_epsilon)
        super().__init__(config, Block, norm, CHECKPOINT, IGNORED, has_head_bias=True)


def read_config(keys: ConfigKeys) -> ModelConfig:
    """GPT-J has names of its own for every size."""
    hidden_size, num_layers, num_heads = keys.integer("n_embd"), keys.layers("n_layer"), keys.integer("n_head")
    head_dim = keys.head_dim(hidden_size, num_heads)
    rotary_dim = keys.integer("rotary_dim")
    if rotary_dim % 2 or rotary_dim > head_dim:
        keys.problems.append(f"rotary_dim={rotary_dim} must be even and at most the head size {head_dim}")
    keys.must_be("tie_word_embeddings", False)
    keys.must_be("rotary", True)
    keys.must_be("scale_attn_weights", True)
    return ModelConfig(
        architecture=keys.architecture,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=keys.optional_integer("n_inner") or 4 * hidden_size,
        context_length=keys.integer("n_positions"),
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.activation("activation_function", "gelu_new"),
        rope=RopeConfig(rotary_dim=rotary_dim, is_interleaved=True),
        windows=(None,) * num_layers,
        mlp_bias=True,
        attention_scale=head_dim**-0.5,
        norms_in_parallel=1,
    )
