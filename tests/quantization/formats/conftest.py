"""Tiny checkpoints that come quantized, and the same with the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import Linear
from torchinfer.quantization import QuantizedMatrix
from torchinfer.testing import PagedDriver, save_random_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=160,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
}
# Layers that no tool quantizes unless it is told to.
KEPT = ("lm_head", "embed_tokens", "norm", "mlp.gate", "word_embeddings", "ln_f")
PROMPT = list(range(3, 40, 2))

Quantize = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


@dataclass
class Bed:
    """A random model as a folder of its own, one with quantized matrices, and one with what these stand for."""

    root: Path
    name: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Tensor] = field(default_factory=dict)  # layer -> the matrix that it stands for

    def layers(self) -> list[str]:
        """The layers that are quantized."""
        names = [name.removesuffix(".weight") for name, tensor in self.tensors.items() if tensor.ndim == 2]
        return [name for name in names if not name.endswith(KEPT)]

    def quantize(self, quantize: Quantize, settings: dict[str, Any], layers: list[str] | None = None) -> None:
        """Replace matrices by what `quantize` makes of each, and note what that stands for."""
        self.settings = settings
        for layer in layers or self.layers():
            found, numbers = quantize(self.tensors.pop(f"{layer}.weight"))
            self.tensors |= {layer + suffix: tensor.contiguous() for suffix, tensor in found.items()}
            self.numbers[layer] = numbers.float()

    def folder(self, settings: Mapping[str, Any] | None = None, key: str = "quantization_config") -> Path:
        """Write the quantized checkpoint."""
        return self._write("quantized", self.tensors, {key: self.settings if settings is None else settings})

    def load(self, device: torch.device | None = None) -> Decoder:
        """Ours, from what was written last."""
        checkpoint = Checkpoint.open(self.root / "quantized")
        device = device or torch.device("cpu")
        return load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, device)

    def logits(self) -> Tensor:
        """Ours, of the quantized checkpoint."""
        self.folder()
        return self.logits_of(self.load())

    def logits_of_whole_inputs(self) -> Tensor:
        """`logits`, with inputs as they are where the checkpoint has them rounded."""
        self.folder()
        model = self.load()
        for module in model.modules():
            if isinstance(module, QuantizedMatrix):
                module.scheme = replace(module.scheme, activations="none")
        return self.logits_of(model)

    def logits_of(self, model: Decoder) -> Tensor:
        """Of the prompt that the reference gets too."""
        return PagedDriver(model).step({"a": PROMPT})["a"]

    def expected_logits(self) -> Tensor:
        """transformers' own model, of what the quantized checkpoint stands for."""
        names = {name for name in self.tensors if name.rpartition(".")[0] in self.numbers}
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in names or name.endswith(".bias")}
        folder = self._write("float", kept | {f"{name}.weight": value for name, value in self.numbers.items()}, {})
        model: Any = transformers.AutoModelForCausalLM
        theirs = model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.inference_mode():
            result: Tensor = theirs(torch.tensor([PROMPT])).logits[0]
        return result

    def products(self, x: Callable[[int], Tensor]) -> list[tuple[str, Tensor]]:
        """What our matrices of the first layer make of x(inputs), by the layers that were merged into them."""
        self.folder()
        block: Any = self.load().layers[0]
        names = {"self_attn.q k v": block.attention.qkv, "self_attn.o": block.attention.output}
        names |= {"mlp.gate up": block.mlp.gate_up, "mlp.down": block.mlp.down}
        return [(name, linear(x(_inputs(linear)))) for name, linear in names.items()]

    def matrices(self, name: str) -> list[str]:
        """The checkpoint's layers of a name of `products`."""
        module, _, parts = name.partition(".")
        return [f"model.layers.0.{module}.{part}_proj" for part in parts.split()]

    def _write(self, name: str, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Path:
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        config = json.loads((self.root / "source" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **extra}))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder


def _inputs(linear: Linear) -> int:
    return int(linear.weight.shape[-1])


@pytest.fixture
def make_bed(tmp_path: Path) -> Callable[[str], Bed]:
    """make_bed("llama"), or another name of CONFIGS."""

    def make(name: str) -> Bed:
        root = tmp_path / name
        save_random_checkpoint(CONFIGS[name](), root / "source")
        tensors = load_file(root / "source" / "model.safetensors")
        return Bed(root, name, tensors)

    return make


@pytest.fixture
def bed(make_bed: Callable[[str], Bed]) -> Bed:
    """A Llama."""
    return make_bed("llama")
