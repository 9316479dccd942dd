"""Rows of numbers in 8 bits, each by its own largest number (arXiv 2208.07339, 2209.05433), or in groups, each group of
a row by its own (arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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


def quantize_groups(
    rows: Tensor,  # [N, D]
    dtype: torch.dtype,  # int8 or float8_e4m3fn
    group: int,  # numbers of a row that share a scale
) -> tuple[Tensor, Tensor]:  # [N, D] of dtype, [N, ceil(D / group)] float32
    """As `quantize_rows`, each group of a row by its own largest number; the last one may have fewer."""
    size = rows.shape[1]
    padded = functional.pad(rows, (0, -size % group))
    numbers, scale = quantize_rows(padded.view(len(rows), -1, group), dtype)
    return numbers.view(padded.shape)[:, :size], scale


def round_groups(
    rows: Tensor,  # [N, D]
    dtype: torch.dtype,  # int8 or float8_e4m3fn
    group: int,
) -> Tensor:  # [N, D] float32
    """What the numbers of `quantize_groups` stand for."""
    numbers, scale = quantize_groups(rows, dtype, group)
    return numbers.float() * scale.repeat_interleave(group, 1)[:, : rows.shape[1]]
