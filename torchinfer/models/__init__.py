"""Model families: one file each. A new model is one file and one line of ARCHITECTURES."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from torchinfer.errors import ConfigError

if TYPE_CHECKING:
    from torchinfer.models.config import ModelConfig
    from torchinfer.models.decoder import Decoder

# Hugging Face architecture -> module here; its class is always `Model`.
ARCHITECTURES = {
    "FalconForCausalLM": "falcon",
    "GPTJForCausalLM": "gptj",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "GemmaForCausalLM": "gemma",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "llama",
    "Qwen2MoeForCausalLM": "qwen_moe",
    "Qwen3ForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen_moe",
}


def build_model(config: ModelConfig, moe_mode: str = "dropless", moe_capacity_factor: float = 1.25) -> Decoder:
    """Build the model of a config; its parameters are empty, on the current default device (often meta).

    Raises:
        ConfigError: a capacity was asked of a model without experts.
    """
    if config.moe is not None:
        moe = replace(config.moe, mode=moe_mode, capacity_factor=moe_capacity_factor)
        config = replace(config, moe=moe)
    elif moe_mode != "dropless":
        raise ConfigError(f"moe_mode={moe_mode!r}: {config.architecture} has no experts; leave it at 'dropless'")
    module = importlib.import_module(f"torchinfer.models.{ARCHITECTURES[config.architecture]}")
    model: Decoder = module.Model(config)
    return model
