"""What outliers in activations cost in int8, and what calibration brings back.

python benchmarks/outliers.py --model recipes/tiny-llama --calibrate torchinfer/scheduler.py --text torchinfer/engine.py

Outliers are planted: some channels of each norm become FACTOR times as large, their columns in the matrices behind it
as much smaller, so that the model computes the same. Then the text is scored: the error of the logits against those of
the model as stored (root mean square, relative), and the perplexity. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchinfer.calibration import calibrate, plan_calibration, read_windows
from torchinfer.loader import Checkpoint, LoadOptions, load_model
from torchinfer.loader.smoothing import Smoothing
from torchinfer.models.config import ModelConfig
from torchinfer.testing import PagedDriver
from torchinfer.tokenizer import Tokenizer

BEHIND = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
SCHEMES = ("none", "int8", "int8_w8a8", "int8_w8a8+calibration")
CPU = torch.device("cpu")


def plant(model: Path, folder: Path, num_channels: int, factor: float) -> None:
    """A copy of a Llama, in float32, with outliers in random channels."""
    shutil.copytree(model, folder)
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
        for name, tensor in tensors.items():
            width = tensor.shape[-1]
            channels = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:num_channels]
            if "layernorm" in name:
                tensor[channels] *= factor
            elif any(part in name for part in BEHIND):
                tensor[:, channels] /= factor
        save_file(tensors, file, {"format": "pt", "shard": str(number)})


def logits_of(folder: Path, scheme: str, text: Path, windows: list[list[int]]) -> Iterator[Tensor]:
    """[tokens, vocabulary] of each window."""
    checkpoint, options = Checkpoint.open(folder), LoadOptions()
    config = ModelConfig.from_dict(checkpoint.config)
    request, _, calibration = scheme.partition("+")
    smoothing: Smoothing | None = None
    if calibration:
        plan = plan_calibration(config, request, text, Tokenizer.from_folder(folder))
        smoothing = calibrate(checkpoint, config, plan, CPU, options)
    model = load_model(
        checkpoint,
        config,
        torch.float32,
        CPU,
        options=options,
        quantization=None if request == "none" else request,
        smoothing=smoothing,
    )
    for window in windows:
        yield PagedDriver(model).step({"window": window})["window"]


def compare(logits: list[Tensor], exact: list[Tensor], windows: list[list[int]]) -> dict[str, float]:
    """Relative error and perplexity."""
    error = sum(float((a - b).square().sum()) for a, b in zip(logits, exact, strict=True))
    size = sum(float(b.square().sum()) for b in exact)
    loss = sum(
        float(torch.nn.functional.cross_entropy(a[:-1], torch.tensor(window[1:]), reduction="sum"))
        for a, window in zip(logits, windows, strict=True)
    )
    num_tokens = sum(len(window) - 1 for window in windows)
    return {"error": math.sqrt(error / size), "perplexity": math.exp(loss / num_tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("recipes/tiny-llama"))
    parser.add_argument("--calibrate", type=Path, required=True, help="text to measure activations on")
    parser.add_argument("--text", type=Path, required=True, help="another one, to score")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--factor", type=float, default=60.0)
    parser.add_argument("--windows", type=int, default=8, help="of the text, of up to 512 tokens")
    args = parser.parse_args()
    config = ModelConfig.from_dict(Checkpoint.open(args.model).config)
    windows = read_windows(args.text, Tokenizer.from_folder(args.model), config.context_length)[: args.windows]
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as root, torch.inference_mode():
        for kind, factor in (("as stored", 1.0), ("planted outliers", args.factor)):
            folder = Path(root) / kind
            plant(args.model, folder, args.channels, factor)
            exact: list[Tensor] = []
            results[kind] = {}
            for scheme in SCHEMES:
                logits = list(logits_of(folder, scheme, args.calibrate, windows))
                exact = exact or logits
                results[kind][scheme] = found = compare(logits, exact, windows)
                print(f"{kind:18}{scheme:24}error {found['error']:.5f}   perplexity {found['perplexity']:.4f}")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print(json.dumps({"settings": settings, "num_tokens": sum(map(len, windows)), "results": results}))


if __name__ == "__main__":
    main()
