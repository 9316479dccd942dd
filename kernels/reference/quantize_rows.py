"""Rows of numbers in 8 bits, each by its own largest number (arXiv 2208.07339, 2209.05433)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest number of a row becomes
LEAST = {torch.int8: -128.0, torch.float8_e4m3fn: -448.0}


def quantize_rows(
    rows: Tensor,  # [..., D]
    dtype: torch.dtype,  # int8 or float8_e4m3fn
    scale: Tensor | None = None,  # float32, broadcast to [...]: in place of the rows' own
) -> tuple[Tensor, Tensor]:  # [..., D] of dtype, [...] float32
    """Round to nearest; beyond a given scale, numbers are cut off. A row of zeros stays zeros; what is not finite makes
    its row's scale so."""
    rows, largest = rows.float(), LARGEST[dtype]
    if scale is None:
        scale = (rows.abs().amax(-1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (rows / scale[..., None]).clamp(LEAST[dtype], largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale
