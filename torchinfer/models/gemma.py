"""Gemma, Gemma 2 and Gemma 3 (text): norms with weight + 1, scaled embeddings, and from Gemma 2 on a norm after
each sublayer too and windows in most layers.

Source: transformers 4.57.6, modeling_gemma.py, modeling_gemma2.py, modeling_gemma3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torchinfer.models import llama
from torchinfer.models.block import Block
from torchinfer.models.config import ModelConfig, RopeConfig
from torchinfer.models.config_keys import ConfigKeys, read_windows
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import RMSNorm
from torchinfer.models.rope import read_rope, rope_config, rope_settings
from torchinfer.weight_map import Target

NORM_OFFSET = 1.0
SANDWICH = {
    "model.layers.{layer}.post_attention_layernorm.weight": Target("layers.{layer}.attention_output_norm.weight"),
    "model.layers.{layer}.pre_feedforward_layernorm.weight": Target("layers.{layer}.mlp_norm.weight"),
    "model.layers.{layer}.post_feedforward_layernorm.weight": Target("layers.{layer}.mlp_output_norm.weight"),
}


class Model(Decoder):
    """A stack of `Block`s."""

    def __init__(self, config: ModelConfig) -> None:
        names: Mapping[str, Target] = llama.SKELETON | llama.MLP
        is_sandwich = config.architecture != "GemmaForCausalLM"
        if is_sandwich:
            names = {**names, **SANDWICH}
        norm = RMSNorm(config.hidden_size, config.norm_epsilon, NORM_OFFSET)
        block = partial(Block, norm_offset=NORM_OFFSET, is_sandwich=is_sandwich)
        scale = config.hidden_size**0.5
        super().__init__(config, block, norm, names, llama.IGNORED, embedding_scale=scale)


def read_config(keys: ConfigKeys) -> ModelConfig:
    """All three generations."""
    is_first = keys.architecture == "GemmaForCausalLM"
    is_third = keys.architecture == "Gemma3ForCausalLM"
    num_layers, num_heads = keys.layers("num_hidden_layers"), keys.integer("num_attention_heads")
    num_kv_heads, head_dim = keys.integer("num_key_value_heads"), keys.integer("head_dim")
    keys.heads(num_heads, num_kv_heads)
    rope, local_rope = _read_gemma3_ropes(keys, head_dim) if is_third else (read_rope(keys, head_dim), None)
    has_bias = keys.flag("attention_bias", False)
    keys.must_be("use_bidirectional_attention", False)
    if is_third:
        keys.must_be("attn_logit_softcapping", None)
    return ModelConfig(
        architecture=keys.architecture,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=keys.integer("hidden_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.integer("intermediate_size"),
        context_length=keys.integer("max_position_embeddings"),
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        activation=_read_activation(keys, is_first),
        rope=rope,
        local_rope=local_rope,
        windows=(None,) * num_layers if is_first else _read_windows(keys, num_layers, is_third),
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        attention_bias=has_bias,
        output_bias=has_bias,
        has_qk_norm=is_third,
        attention_scale=(head_dim if is_first else keys.number("query_pre_attn_scalar")) ** -0.5,
        attention_soft_cap=None if is_first or is_third else keys.optional_number("attn_logit_softcapping"),
        logit_soft_cap=None if is_first else keys.optional_number("final_logit_softcapping"),
    )


def _read_activation(keys: ConfigKeys, is_first: bool) -> str:
    """The first Gemma came with hidden_act; hidden_activation, where it is set, corrects it."""
    older = keys.activation("hidden_act", "gelu_pytorch_tanh") if is_first else "gelu_tanh"
    return keys.activation("hidden_activation", "gelu_pytorch_tanh") if keys.has("hidden_activation") else older


def _read_windows(keys: ConfigKeys, num_layers: int, is_third: bool) -> tuple[int | None, ...]:
    """Every second layer of Gemma 2 and every sixth of Gemma 3 sees everything."""
    pattern = 2
    if is_third:
        pattern = keys.integer("_sliding_window_pattern", 6)
        pattern = keys.integer("sliding_window_pattern", pattern)
    window = keys.integer("sliding_window", 4096)
    return read_windows(keys, num_layers, window, [(layer + 1) % pattern != 0 for layer in range(num_layers)])


def _read_gemma3_ropes(keys: ConfigKeys, head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Of the layers that see everything, and of those with a window."""
    settings = rope_settings(keys)
    theta, local_theta = keys.number("rope_theta", 1e6), keys.number("rope_local_base_freq", 1e4)
    if "full_attention" not in settings and "sliding_attention" not in settings:
        return rope_config(keys, settings, head_dim, theta), RopeConfig(rotary_dim=head_dim, theta=local_theta)
    ropes = []
    for kind, default in (("full_attention", theta), ("sliding_attention", local_theta)):
        part = settings.get(kind) or {}
        if not isinstance(part, Mapping):
            keys.problems.append(f"rope_parameters.{kind}={part!r} must be an object")
            part = {}
        ropes.append(rope_config(keys, part, head_dim, keys.positive("rope_theta", part.get("rope_theta", default))))
    return ropes[0], ropes[1]
