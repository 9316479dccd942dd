"""Checkpoints that come quantized: from quantization_config to what each layer is held as. One file for each tool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchinfer.errors import UnsupportedModelError, raise_all
from torchinfer.quantization.formats import awq, compressed_tensors, fp8, gptq
from torchinfer.quantization.formats.layout import Format, Recipe
from torchinfer.quantization.formats.settings import Settings

# quant_method -> what reads its settings.
METHODS = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fp8.read_fbgemm,
    "fp8": fp8.read,
    "gptq": gptq.read,
}

__all__ = ["METHODS", "Format", "Recipe", "read_format"]


def read_format(raw: Any, dtypes: Mapping[str, torch.dtype]) -> Format:
    """Read the content of quantization_config; `dtypes` are those of the checkpoint's tensors, by name.

    Raises:
        UnsupportedModelError: with every method, field and value that is unknown or not supported.
    """
    method = raw.get("quant_method") if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping) or not isinstance(method, str) or method not in METHODS:
        raise UnsupportedModelError(
            f"quantization_config with quant_method={method!r} is not supported; use a checkpoint that is unquantized, "
            f"or one of: {', '.join(METHODS)}"
        )
    problems: list[str] = []
    settings = Settings(raw, problems)
    found = METHODS[method](settings, dtypes)
    settings.finish()
    raise_all(problems, UnsupportedModelError, f"quantization_config with quant_method={method!r}")
    return found
