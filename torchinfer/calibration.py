"""Calibration: the factors that smooth activations for int8_w8a8, measured on a text.

For input channel j of the matrices behind a norm:  s_j = max|X_j|^a / max|W_j|^(1-a), a = 0.5

The norm's weight (and bias) is divided by s, the columns of those matrices are multiplied by it: q, k and v together,
gate and up together. Nothing changes ahead of o_proj and down_proj, where there is no norm, at the head, and in layers
of experts, whose router would see other numbers. Source: SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchinfer.batch import Batch
from torchinfer.errors import ConfigError
from torchinfer.kv_cache.tensors import allocate
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.options import LoadOptions
from torchinfer.loader.placement import expected_tensors
from torchinfer.loader.schemes import quantize_model
from torchinfer.loader.smoothing import Smoothing
from torchinfer.loader.weights import load_model
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import MLP, GatedMLP, Linear
from torchinfer.quantization import QuantizedMatrix
from torchinfer.tokenizer import Tokenizer

WEIGHT_SHARE = 0.5  # 1 - a
WINDOW_TOKENS, MOST_WINDOWS = 512, 64
MOST_CHARACTERS = 1 << 20  # of the text; more than the windows hold
PAGE_SIZE = 16
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class NormGroup:
    """A norm, and all matrices that its output goes into; names of modules."""

    norm: str
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is measured on what."""

    groups: list[NormGroup]
    windows: list[list[int]]  # of tokens


def plan_calibration(
    model_config: ModelConfig, request: str | Mapping[str, str], text: str | Path, tokenizer: Tokenizer | None
) -> Calibration:
    """Find the norms, and read the text file; no weight is loaded.

    Raises:
        ConfigError: no norm is followed by int8_w8a8 only, the text cannot be read or is empty, or there is no
            tokenizer that fits.
    """
    groups = smoothed_groups(model_config, request)
    if not groups:
        raise ConfigError(
            f"calibration={str(text)!r} has nothing to smooth with quantization={request!r}: it is for norms whose "
            "matrices (q, k and v; gate and up) are all int8_w8a8; quantize them so, or leave calibration out"
        )
    windows = read_windows(text, tokenizer, model_config.context_length)
    largest = max(map(max, windows))
    if largest >= model_config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives the id {largest}, beyond the model's vocabulary of {model_config.vocab_size}; take "
            "the tokenizer that belongs to the model"
        )
    return Calibration(groups, windows)


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Nothing can be measured in, or made of, weights that have lost digits already.

    Raises:
        ConfigError: with what the checkpoint says of itself.
    """
    settings = checkpoint.quantization
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
        raise ConfigError(
            f"{checkpoint.address} is quantized already, quant_method={method!r}; take the checkpoint that it was made "
            "of"
        )


def calibrate(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    plan: Calibration,
    device: torch.device,
    options: LoadOptions,
    progress: bool = False,
) -> Smoothing:
    """Run the unquantized model over the windows, in the checkpoint's dtype, and compute what smooths it.

    The model is gone afterwards. XLA devices compile every shape: there it runs on the CPU. Raises like `load_model`,
    and ConfigError for a checkpoint that comes quantized.
    """
    refuse_quantized(checkpoint)
    device = CPU if device.type == "xla" else device
    model = load_model(checkpoint, model_config, _dtype(checkpoint), device, options=options, progress=progress)
    largest = measure(model, plan.groups, plan.windows, progress)
    names = expected_tensors(model)
    norms: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for group in plan.groups:
        factors = _factors(largest[group.norm].cpu(), _largest_weights(model, group))
        offset = float(getattr(model.get_submodule(group.norm), "offset", 0.0))
        changed, exact = _change(checkpoint, names, group, factors, offset)
        norms |= changed
        columns |= {tensor: exact for consumer in group.consumers for tensor in names[f"{consumer}.weight"]}
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Smoothing(norms, columns)


def smoothed_groups(model_config: ModelConfig, request: str | Mapping[str, str]) -> list[NormGroup]:
    """The norms that only matrices in int8_w8a8 follow."""
    with torch.device("meta"):
        model = build_model(model_config)
    quantize_model(model, request, CPU)

    def is_smoothed(name: str) -> bool:
        matrix = model.get_submodule(name).weight
        return isinstance(matrix, QuantizedMatrix) and matrix.scheme.activations == "int8"

    return [group for group in norm_groups(model) if all(map(is_smoothed, group.consumers))]


def norm_groups(model: Decoder) -> Iterator[NormGroup]:
    """The norms of all blocks, but for those ahead of experts."""
    for index, block in enumerate(model.layers):
        mlp = block.mlp
        first = "gate_up" if isinstance(mlp, GatedMLP) else "up" if isinstance(mlp, MLP) else None
        attention, norm = f"layers.{index}.attention.qkv", f"layers.{index}.attention_norm"
        behind = (f"layers.{index}.mlp.{first}",)
        if block.mlp_norm is None:
            yield NormGroup(norm, (attention, *behind))
            continue
        yield NormGroup(norm, (attention,))
        if first is not None:
            yield NormGroup(f"layers.{index}.mlp_norm", behind)


def read_windows(text: str | Path, tokenizer: Tokenizer | None, context_length: int) -> list[list[int]]:
    """The tokens of a text's beginning, in windows that each begin as a prompt does."""
    if tokenizer is None:
        raise ConfigError(f"calibration={str(text)!r} needs a checkpoint with a tokenizer, this one has none")
    try:
        with open(text, encoding="utf-8") as file:
            content = file.read(MOST_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read calibration={str(text)!r}: {error}; it must be a text file in UTF-8") from error
    start, tokens = tokenizer.encode(""), tokenizer.encode(content, add_special_tokens=False)
    if not content.strip() or not tokens:
        raise ConfigError(
            f"calibration={str(text)!r} is empty; some pages of text that is typical of your use are best"
        )
    size = max(1, min(WINDOW_TOKENS, context_length) - len(start))
    windows = [[*start, *tokens[first : first + size]] for first in range(0, len(tokens), size)]
    return windows[:MOST_WINDOWS]


@torch.inference_mode()
def measure(
    model: Decoder, groups: Sequence[NormGroup], windows: Sequence[Sequence[int]], progress: bool = False
) -> dict[str, Tensor]:
    """The largest magnitude of each channel behind each norm, float32 [hidden], by the norm's name."""
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found = output.abs().amax(0).float()
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for group in groups:
        watch(group.norm)
    parameter = next(model.parameters())
    num_pages = 1 + -(-max(map(len, windows)) // PAGE_SIZE)
    caches = allocate(model.config, num_pages, PAGE_SIZE, parameter.dtype, parameter.device)
    for window in tqdm(windows, desc="calibration", unit="window", disable=None if progress else True):
        model(_batch(window, parameter.device), caches)
    for handle in handles:
        handle.remove()
    return largest


def _batch(tokens: Sequence[int], device: torch.device) -> Batch:
    """One request whose prompt comes at once, in pages from 1 on."""
    size = len(tokens)

    def numbers(values: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=device)

    return Batch(
        tokens=numbers(tokens),
        positions=numbers(torch.arange(size)),
        slot=numbers(torch.arange(PAGE_SIZE, PAGE_SIZE + size)),
        row=numbers([0] * size),
        rope_length=numbers([size] * size),
        query_start=numbers([0, size]),
        kv_length=numbers([size]),
        page_table=numbers(torch.arange(1, 1 + -(-size // PAGE_SIZE))[None]),
        page_size=PAGE_SIZE,
        num_decodes=0,
        max_decode_kv_length=0,
        prefills=((0, 0, size, size),),
    )


def _largest_weights(model: Decoder, group: NormGroup) -> Tensor:
    """max|W_j| over all matrices behind the norm, float32 [hidden]."""
    found = []
    for name in group.consumers:
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear) and isinstance(layer.weight, nn.Parameter), "the model is not quantized"
        found.append(layer.weight.abs().amax(0).float().cpu())
    return torch.stack(found).amax(0)


def _factors(inputs: Tensor, weights: Tensor) -> Tensor:
    """s [hidden], float64; 1 where a channel is all zeros.

    Its geometric mean is 1: a factor that all channels share changes no rounding, but could leave float16's range.
    """
    is_used = (inputs > 0) & (weights > 0) & inputs.isfinite() & weights.isfinite()
    logs = (1 - WEIGHT_SHARE) * inputs.double().log() - WEIGHT_SHARE * weights.double().log()
    logs = torch.where(is_used, logs, torch.zeros_like(logs))
    mean = logs.sum() / is_used.sum().clamp(min=1)
    return torch.where(is_used, (logs - mean).exp(), torch.ones_like(logs))


def _change(
    checkpoint: Checkpoint, names: Mapping[str, Iterable[str]], group: NormGroup, factors: Tensor, offset: float
) -> tuple[dict[str, Tensor], Tensor]:
    """The norm's new tensors, and the factors of the columns behind it, float32 [hidden].

    The columns take what the rounding of the norm's new weight left, so that nothing is lost by it: near a weight of
    -1 in Gemma, where the norm is weight + 1, that is much.
    """
    (weight_name,) = names[f"{group.norm}.weight"]
    weight = checkpoint.read(weight_name)
    changed = ((weight.double() + offset) / factors - offset).to(weight.dtype)
    exact = (weight.double() + offset) / (changed.double() + offset)
    is_fit = exact.isfinite() & (exact > 0)
    exact = torch.where(is_fit, exact, torch.ones_like(exact))
    norms = {weight_name: torch.where(is_fit, changed, weight)}
    for bias_name in names.get(f"{group.norm}.bias", ()):
        bias = checkpoint.read(bias_name)
        norms[bias_name] = (bias.double() / exact).to(bias.dtype)
    return norms, exact.float()


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The one that most bytes of the checkpoint have."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.num_bytes
    (dtype, _), *_ = sizes.most_common(1)
    return torch.float32 if dtype == torch.float64 else dtype
