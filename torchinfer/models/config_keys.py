"""Reading config.json key by key: every problem is collected, every key that nobody read is reported."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torchinfer.errors import UnsupportedModelError, raise_all

logger = logging.getLogger(__name__)

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MAX_SIZE = 2**24  # of anything: more is a damaged file, and would be allocated
MAX_LAYERS = 1024

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Keys that change nothing of what we compute: names, training, tokens (the generation config is the engine's).
HARMLESS_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures auto_map model_type
    transformers_version torch_dtype dtype use_cache cache_implementation initializer_range pretraining_tp
    attention_dropout attn_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop embedding_dropout
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class
    gradient_checkpointing output_attentions output_hidden_states output_router_logits return_dict
    router_aux_loss_coef router_jitter_noise id2label label2id task_specific_params
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    chunk_size_feed_forward problem_type finetuning_task prefix torchscript num_labels
    """.split()
)
# The loader's: how tensors come quantized.
LOADER_KEYS = frozenset({"quantization_config", "compression_config"})


class ConfigKeys:
    """The keys of one config.json and what is wrong with them. A method that finds a problem returns a stand-in."""

    def __init__(self, architecture: str, raw: Mapping[str, Json]) -> None:
        self.architecture = architecture
        self.raw = raw
        self.problems: list[str] = []
        self.unread: list[str] = []
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """The key is there and not null."""
        self._read.add(name)
        return self.raw.get(name) is not None

    def get(self, name: str) -> Json:
        """The value as it stands; None when it is missing."""
        self._read.add(name)
        return self.raw.get(name)

    def integer(self, name: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """An integer from `minimum` to `maximum`; required without a default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.problems.append(f"{name}={value!r} must be an integer from {minimum} to {maximum}")
            return max(minimum, 1)
        return value

    def layers(self, name: str) -> int:
        """A number of layers."""
        return self.integer(name, maximum=MAX_LAYERS)

    def optional_integer(self, name: str) -> int | None:
        """A positive integer, or None when the key is missing or null."""
        return self.integer(name) if self.has(name) else None

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number; required without a default."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        return self.positive(name, value)

    def optional_number(self, name: str) -> float | None:
        """A positive finite number, or None when the key is missing or null."""
        return self.number(name) if self.has(name) else None

    def positive(self, label: str, value: Json) -> float:
        """`value`, if it is a positive finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problems.append(f"{label}={value!r} must be a positive number")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problems.append(f"{name}={value!r} must be true or false")
            return default
        return value

    def activation(self, name: str, default: str) -> str:
        """One of the activations, under our name of it."""
        value = self.get(name)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.problems.append(f"{name}={value!r} is not supported; known: {', '.join(sorted(ACTIVATIONS))}")
            return "silu"
        return ACTIVATIONS[value]

    def must_be(self, name: str, expected: Json) -> None:
        """Refuse any value but `expected`, which is also what a missing key means."""
        value = self.get(name)
        if value is not None and value != expected:
            self.problems.append(f"{name}={value!r} is not supported; only {expected!r} is")

    def heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Refuse head counts that do not divide."""
        if num_heads % num_kv_heads:
            self.problems.append(
                f"num_attention_heads={num_heads} must be a multiple of num_key_value_heads={num_kv_heads}"
            )

    def experts(self) -> tuple[int, int]:
        """How many there are, and how many see a token."""
        # transformers 5 writes num_local_experts for every family.
        num_experts = self.integer("num_local_experts" if self.has("num_local_experts") else "num_experts")
        top_k = self.integer("num_experts_per_tok")
        if top_k > num_experts:
            self.problems.append(f"num_experts_per_tok={top_k} must be at most the number of experts, {num_experts}")
        return num_experts, top_k

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        """head_dim, or the hidden size divided among the heads."""
        if self.has("head_dim"):
            return self.integer("head_dim")
        if hidden_size % num_heads:
            self.problems.append(f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads}")
        return max(hidden_size // num_heads, 1)

    def finish(self) -> None:
        """Raise all problems at once; log the keys that nobody read.

        Raises:
            UnsupportedModelError: with every problem found since the keys were opened.
        """
        raise_all(self.problems, UnsupportedModelError, f"config.json of {self.architecture}")
        unread = sorted({*self.raw, *self.unread} - self._read - HARMLESS_KEYS - LOADER_KEYS)
        if unread:
            logger.warning("config.json: keys without effect here: %s", ", ".join(unread))


def read_windows(
    keys: ConfigKeys, num_layers: int, window: int | None, is_sliding: Sequence[bool]
) -> tuple[int | None, ...]:
    """The window of each layer; `layer_types` decides if it is there, else `is_sliding`."""
    types = keys.get("layer_types")
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != num_layers or any(kind not in known for kind in types):
            keys.problems.append(f"layer_types={types!r} must hold {num_layers} of {' or '.join(known)}")
            return (None,) * num_layers
        is_sliding = [kind == "sliding_attention" for kind in types]
    if window is None and any(is_sliding):
        keys.problems.append("sliding_window is missing or null, but layer_types has sliding_attention: set it")
    return tuple(window if sliding else None for sliding in is_sliding)
