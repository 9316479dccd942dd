"""Falcon with rotary embedding: 7B (one key head, one norm) and the newer architecture (groups, one norm or two).

Source: transformers 4.57.6, modeling_falcon.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchinfer.models.config import ModelConfig
from torchinfer.models.config_keys import ConfigKeys
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import LayerNorm
from torchinfer.models.parallel import Block
from torchinfer.models.rope import extended_context, read_rope
from torchinfer.weight_map import Target

# Rotary tables of old checkpoints.
IGNORED = tuple(
    f"transformer.h.{{layer}}.self_attention.{name}.inv_freq" for name in ("maybe_rotary", "rotary", "rotary_emb")
)


class Model(Decoder):
    """A stack of parallel blocks, or of sequential ones where the config says so."""

    def __init__(self, config: ModelConfig) -> None:
        norm = LayerNorm(config.hidden_size, config.norm_epsilon)
        super().__init__(config, Block, norm, _checkpoint(config), IGNORED)


def _checkpoint(config: ModelConfig) -> dict[str, Target]:
    """Names of the norms depend on how many there are; q, k and v come merged, in an order of their own."""

    def split_groups(merged: Tensor) -> Tensor:
        return ungroup(merged, config.num_kv_heads, config.num_heads // config.num_kv_heads)

    names = {
        "ln_f": "norm",
        "h.{layer}.self_attention.dense": "layers.{layer}.attention.output",
        "h.{layer}.mlp.dense_h_to_4h": "layers.{layer}.mlp.up",
        "h.{layer}.mlp.dense_4h_to_h": "layers.{layer}.mlp.down",
    }
    if config.norms_in_parallel == 2:
        names |= {"h.{layer}.ln_attn": "layers.{layer}.attention_norm", "h.{layer}.ln_mlp": "layers.{layer}.mlp_norm"}
    else:
        names |= {"h.{layer}.input_layernorm": "layers.{layer}.attention_norm"}
        names |= {"h.{layer}.post_attention_layernorm": "layers.{layer}.mlp_norm"}
    table = {"transformer.word_embeddings.weight": Target("embedding.weight"), "lm_head.weight": Target("head.weight")}
    for kind in ("weight", "bias"):
        table |= {f"transformer.{theirs}.{kind}": Target(f"{ours}.{kind}") for theirs, ours in names.items()}
        merged = Target(f"layers.{{layer}}.attention.qkv.{kind}", transform=split_groups)
        table[f"transformer.h.{{layer}}.self_attention.query_key_value.{kind}"] = merged
    return table


def ungroup(merged: Tensor, num_kv_heads: int, group: int) -> Tensor:
    """Rows [group query heads, key, value] of each key head -> all queries, all keys, all values."""
    heads = merged.view(num_kv_heads, group + 2, -1, *merged.shape[1:])  # [K, G + 2, D, ...]
    found = torch.empty_like(merged)
    sizes = [num_kv_heads * count * heads.shape[2] for count in (group, 1, 1)]
    parts = zip(found.split_with_sizes(sizes), heads.split_with_sizes((group, 1, 1), 1), strict=True)
    for rows, part in parts:
        rows.view(part.shape).copy_(part)
    return found


def read_config(keys: ConfigKeys) -> ModelConfig:
    """Both architectures; alibi in place of rotary embedding is refused."""
    hidden_size, num_layers = keys.integer("hidden_size"), keys.layers("num_hidden_layers")
    num_heads = keys.integer("num_attention_heads")
    head_dim = keys.head_dim(hidden_size, num_heads)
    num_kv_heads = _read_kv_heads(keys, num_heads)
    keys.must_be("alibi", False)
    keys.must_be("apply_residual_connection_post_layernorm", False)
    rope = read_rope(keys, head_dim)
    has_bias = keys.flag("bias", False)
    return ModelConfig(
        architecture=keys.architecture,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=keys.optional_integer("ffn_hidden_size") or 4 * hidden_size,
        context_length=extended_context(rope, keys.integer("max_position_embeddings", 2048)),
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.activation("activation", "gelu"),
        rope=rope,
        windows=(None,) * num_layers,
        tie_embeddings=keys.flag("tie_word_embeddings", True),
        attention_bias=has_bias,
        output_bias=has_bias,
        mlp_bias=has_bias,
        attention_scale=head_dim**-0.5,
        norms_in_parallel=_read_norms(keys),
    )


def _read_kv_heads(keys: ConfigKeys, num_heads: int) -> int:
    """num_kv_heads counts in the newer architecture only; Falcon 7B writes its query heads there."""
    written = keys.integer("num_kv_heads", num_heads)
    if keys.flag("new_decoder_architecture", False):
        keys.get("multi_query")
        keys.heads(num_heads, written)
        return written
    return 1 if keys.flag("multi_query", True) else num_heads


def _read_norms(keys: ConfigKeys) -> int:
    """Norms ahead of the parallel sublayers; 0 when they are not parallel."""
    is_new = keys.flag("new_decoder_architecture", False)
    is_parallel = keys.flag("parallel_attn", True)
    number = keys.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
    if number not in (1, 2) or (number == 2 and not is_new) or (is_new and not is_parallel):
        keys.problems.append(
            f"num_ln_in_parallel_attn={number} with parallel_attn={is_parallel} and new_decoder_architecture={is_new} "
            "is not supported; use 1, or 2 with the new architecture, and parallel attention with it"
        )
    return number if is_parallel else 0
