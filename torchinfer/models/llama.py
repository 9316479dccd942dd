"""Llama 2 and 3, Mistral, Qwen2 and Qwen3: pre-norm blocks of attention and a gated feed-forward layer.

The mixture-of-experts families are the same block with experts in place of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torchinfer.models.block import Block
from torchinfer.models.config import ModelConfig, MoEConfig
from torchinfer.models.config_keys import ConfigKeys, read_windows
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import RMSNorm
from torchinfer.models.rope import extended_context, read_rope
from torchinfer.weight_map import Target

SKELETON = {
    "model.embed_tokens.weight": Target("embedding.weight"),
    "model.norm.weight": Target("norm.weight"),
    "lm_head.weight": Target("head.weight"),
    "model.layers.{layer}.input_layernorm.weight": Target("layers.{layer}.attention_norm.weight"),
    "model.layers.{layer}.post_attention_layernorm.weight": Target("layers.{layer}.mlp_norm.weight"),
    **{
        f"model.layers.{{layer}}.self_attn.{part}_proj.{kind}": Target(f"layers.{{layer}}.attention.qkv.{kind}", part)
        for part in "qkv"
        for kind in ("weight", "bias")
    },
    "model.layers.{layer}.self_attn.o_proj.weight": Target("layers.{layer}.attention.output.weight"),
    "model.layers.{layer}.self_attn.o_proj.bias": Target("layers.{layer}.attention.output.bias"),
    "model.layers.{layer}.self_attn.q_norm.weight": Target("layers.{layer}.attention.q_norm.weight"),
    "model.layers.{layer}.self_attn.k_norm.weight": Target("layers.{layer}.attention.k_norm.weight"),
}
MLP = {
    **{
        f"model.layers.{{layer}}.mlp.{part}_proj.{kind}": Target(f"layers.{{layer}}.mlp.gate_up.{kind}", part)
        for part in ("gate", "up")
        for kind in ("weight", "bias")
    },
    "model.layers.{layer}.mlp.down_proj.weight": Target("layers.{layer}.mlp.down.weight"),
    "model.layers.{layer}.mlp.down_proj.bias": Target("layers.{layer}.mlp.down.bias"),
}
IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)


class Model(Decoder):
    """A stack of `Block`s."""

    def __init__(self, config: ModelConfig, feed_forward: Mapping[str, Target] = MLP) -> None:
        norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        super().__init__(config, Block, norm, {**SKELETON, **feed_forward}, IGNORED)


def read_config(keys: ConfigKeys) -> ModelConfig:
    """The dense families."""
    return read_decoder(keys, moe=None)


def read_decoder(keys: ConfigKeys, moe: MoEConfig | None) -> ModelConfig:
    """Everything but the experts."""
    family = keys.architecture.removesuffix("ForCausalLM").removesuffix("Moe")
    hidden_size = keys.integer("hidden_size")
    num_layers, num_heads = keys.layers("num_hidden_layers"), keys.integer("num_attention_heads")
    # Llama 1 has no such key; elsewhere its absence would mean a number that we refuse to guess.
    num_kv_heads = keys.integer("num_key_value_heads", num_heads if family == "Llama" else None)
    keys.heads(num_heads, num_kv_heads)
    head_dim = (
        keys.integer("head_dim") if keys.architecture == "Qwen3ForCausalLM" else keys.head_dim(hidden_size, num_heads)
    )
    rope = read_rope(keys, head_dim, 1e6 if family == "Mixtral" else 10000.0)
    has_bias = keys.flag("attention_bias", False) if family in ("Llama", "Qwen3") else False
    return ModelConfig(
        architecture=keys.architecture,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("intermediate_size"),
        context_length=extended_context(rope, keys.integer("max_position_embeddings")),
        norm_epsilon=keys.number("rms_norm_eps", 1e-5 if family == "Mixtral" else 1e-6),
        activation=keys.activation("hidden_act", "silu"),
        rope=rope,
        windows=_windows(keys, family, num_layers),
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        attention_bias=keys.flag("qkv_bias", True) if family == "Qwen2" else has_bias,
        output_bias=has_bias,
        mlp_bias=keys.flag("mlp_bias", False) if family == "Llama" else False,
        has_qk_norm=family == "Qwen3",
        attention_scale=head_dim**-0.5,
        moe=moe,
    )


def _windows(keys: ConfigKeys, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral and Mixtral: all layers or none. Qwen: only if switched on, in dense models from a layer upwards."""
    if family == "Llama":
        return (None,) * num_layers
    first = 0
    if family.startswith("Qwen"):
        is_dense = not keys.architecture.endswith("MoeForCausalLM")
        keys.get("max_window_layers")
        if not keys.flag("use_sliding_window", False):
            keys.get("sliding_window")
            keys.get("layer_types")
            return (None,) * num_layers
        first = keys.integer("max_window_layers", 28, minimum=0) if is_dense else 0
    # transformers' default where the key is missing; null means no window.
    is_written = "sliding_window" in keys.raw or family == "Mixtral"
    window = keys.optional_integer("sliding_window") if is_written else 4096
    is_sliding = [window is not None and layer >= first for layer in range(num_layers)]
    return read_windows(keys, num_layers, window, is_sliding)
