"""ModelConfig: what the library needs to know of a checkpoint's config.json, checked once, never changed afterwards.

Each family's file reads its own keys (`read_config`); here is what they have in common.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchinfer import models
from torchinfer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torchinfer.models.config_keys import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of the first `rotary_dim` values of each head."""

    rotary_dim: int
    theta: float = 10000.0
    kind: str = "default"  # or linear, dynamic, llama3, yarn
    is_interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of (0, F), (1, F + 1), ...
    factor: float = 1.0
    original_context: int = 0  # tokens; dynamic, llama3, yarn
    low_frequency_factor: float = 1.0  # llama3
    high_frequency_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    is_truncated: bool = True  # yarn: round the range of dimensions to integers


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward layer."""

    num_experts: int
    top_k: int  # experts per token
    intermediate_size: int  # of each expert
    is_normalized: bool  # the weights of the chosen experts sum to one
    shared_intermediate_size: int | None = None  # of the expert that sees every token, behind its own gate
    layers: tuple[int, ...] = ()  # indices of the layers that have experts; the others are dense
    mode: str = "dropless"  # or capacity
    capacity_factor: float = 1.25
    expert_parallel: bool = False  # chips that divide the model have some of the experts each, not a part of each
    num_chips: int = 1  # that the experts are among; the sizes are those of one of them then

    @property
    def num_experts_here(self) -> int:
        """Of the model's `num_experts`, those of this chip."""
        return self.num_experts // self.num_chips


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and options of a decoder. Sizes are numbers of values; a window counts the token itself."""

    architecture: str  # the checkpoint's own name of it
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int  # tokens of prompt and output together
    norm_epsilon: float
    activation: str  # silu, gelu, gelu_tanh
    rope: RopeConfig
    local_rope: RopeConfig | None = None  # of layers with a window, if other than `rope`
    windows: tuple[int | None, ...]  # per layer
    tie_embeddings: bool = False
    attention_bias: bool = False  # q, k and v
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    has_qk_norm: bool = False
    attention_scale: float  # multiplies the scores
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    moe: MoEConfig | None = None
    norms_in_parallel: int = 0  # Falcon: norms ahead of parallel attention and MLP; 0: one after the other

    @classmethod
    def from_dict(cls, raw: Mapping[str, Json]) -> ModelConfig:
        """Read the content of config.json, as transformers 4.57 or 5 writes it.

        Raises:
            UnsupportedModelError: with everything in it that this library cannot compute.
        """
        from torchinfer.models.config_keys import ConfigKeys

        architecture = _architecture(raw)
        module = importlib.import_module(f"torchinfer.models.{models.ARCHITECTURES[architecture]}")
        keys = ConfigKeys(architecture, raw)
        config = module.read_config(keys)
        keys.finish()
        assert isinstance(config, cls)
        return config

    @property
    def rope_depends_on_length(self) -> bool:
        """Frequencies follow the length of the prompt: tokens of different prompts never share a cached key."""
        return any(rope is not None and rope.kind == "dynamic" for rope in (self.rope, self.local_rope))


def _architecture(raw: Mapping[str, Json]) -> str:
    names = raw.get("architectures")
    known = ", ".join(sorted(models.ARCHITECTURES))
    if not isinstance(names, list) or not names:
        raise UnsupportedModelError(f"config.json: architectures={names!r} must name one of: {known}")
    for name in names:
        if isinstance(name, str) and name in models.ARCHITECTURES:
            return name
    raise UnsupportedModelError(f"config.json: architectures={names!r} is not supported; use one of: {known}")
