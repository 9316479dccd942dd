"""The compressed-tensors format: what a matrix becomes in a file, and what config.json says about it.

    pack-quantized    whole numbers of 4 or 8 bits, plus half of their range, in words of 32 bits, the first one lowest
    int-quantized     int8, for layers that round their inputs to int8 too; numbers of 4 bits take a byte each
    float-quantized   float8_e4m3fn

Scales stay float32, as they are held here. Source: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchinfer.quantization import Scheme
from torchinfer.quantization.formats.unpack import unpack_words
from torchinfer.quantized_weight import NIBBLE_ZERO

WORD_BYTES = 4  # of int32, which the packed formats are made of
SIGN_BIT = 0x80  # 8 bits plus half of their range: the highest one is the other way round
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a layer or an expert in a name

assert sys.byteorder == "little", "bytes are viewed as the words of a safetensors file"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a file that is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    row_block: int = 1  # rows of the checkpoint's tensor that make one of it
    constant: Tensor | None = None  # its values, where they are known in advance


def format_of(scheme: Scheme) -> str:
    """The name of the format that holds such matrices."""
    if scheme.values == torch.float8_e4m3fn:
        return "float-quantized"
    return "pack-quantized" if scheme.activations == "none" else "int-quantized"


def stored_as(name: str, shape: Sequence[int], scheme: Scheme) -> list[Stored]:
    """The tensors that stand for a checkpoint's `<layer>.weight` [O, I]."""
    layer = name.removesuffix(".weight")
    rows, columns = shape
    specs = scheme.tensors(rows, columns)
    scale = Stored(f"{layer}.weight_scale", torch.float32, specs["scale"].shape, scheme.row_block)
    if format_of(scheme) != "pack-quantized":
        dtype = torch.int8 if scheme.values == torch.uint8 else scheme.values
        return [Stored(name, dtype, (rows, columns)), scale]
    width = -(-specs["values"].shape[1] // WORD_BYTES)
    size = torch.tensor([rows, columns], dtype=torch.int64)
    return [
        Stored(f"{layer}.weight_packed", torch.int32, (rows, width)),
        scale,
        Stored(f"{layer}.weight_shape", torch.int64, (2,), constant=size),
    ]


def encode(packed: Mapping[str, Tensor], scheme: Scheme) -> list[Tensor]:
    """What `scheme.pack` gave, as the tensors of `stored_as` hold it, without the constant ones."""
    values, scale = packed["values"], packed["scale"]
    if format_of(scheme) == "int-quantized" and values.dtype == torch.uint8:
        return [unpack_words(values, 4).view(torch.int8) - NIBBLE_ZERO, scale]
    if format_of(scheme) != "pack-quantized":
        return [values, scale]
    if values.dtype == torch.int8:
        values = values.view(torch.uint8) ^ SIGN_BIT
    padding = -values.shape[1] % WORD_BYTES
    return [functional.pad(values, (0, padding)).view(torch.int32), scale]


def quantization_config(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> dict[str, Any]:
    """The section of config.json. `schemes`: of each layer that has one; `kept`: the other linear layers."""
    by_scheme: dict[str, list[str]] = {}
    for layer, scheme in schemes.items():
        by_scheme.setdefault(scheme.name, []).append(layer)
    names = {*schemes, *kept}
    groups = {}
    for number, layers in enumerate(by_scheme.values()):
        # With one scheme the name of the class is what every program understands, for merged layers and experts too.
        targets = ["Linear"] if len(by_scheme) == 1 else _targets(layers, names)
        groups[f"group_{number}"] = {"targets": targets, **_group(schemes[layers[0]])}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: Scheme) -> dict[str, Any]:
    kind = "float" if scheme.values == torch.float8_e4m3fn else "int"
    bits = 4 if scheme.values == torch.uint8 else 8
    weights = {**_numbers(kind, bits, is_dynamic=False), "strategy": "channel", "group_size": None}
    if scheme.row_block > 1:
        weights |= {"strategy": "block", "block_structure": [scheme.row_block, scheme.column_block]}
    elif scheme.column_block is not None:
        weights |= {"strategy": "group", "group_size": scheme.column_block}
    inputs = None
    if scheme.activations != "none":
        # In e4m3 inputs are rounded in groups where weights are.
        group = scheme.column_block if scheme.activations == "fp8" else None
        strategy = "token" if group is None else "group"
        inputs = {**_numbers(kind, 8, is_dynamic=True), "strategy": strategy, "group_size": group}
    return {"format": format_of(scheme), "weights": weights, "input_activations": inputs, "output_activations": None}


def _numbers(kind: str, bits: int, is_dynamic: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": is_dynamic}


def _targets(layers: Sequence[str], names: set[str]) -> list[str]:
    """Patterns that fit these layers and none of the other names: one for all numbers where that is so."""
    own = set(layers)
    shapes = {NUMBER.sub("0", name) for name in names - own}
    patterns = []
    for layer in layers:
        is_shared = NUMBER.sub("0", layer) in shapes
        parts = [layer] if is_shared else NUMBER.split(layer)
        patterns.append(f"re:^{r'[0-9]+'.join(re.escape(part) for part in parts)}$")
    return list(dict.fromkeys(patterns))
