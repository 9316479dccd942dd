"""From quantized weights back to numbers, and the truth of what a quantized matrix is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

NIBBLE_ZERO = 8


def dequantize(weight: QuantizedWeight) -> Tensor:  # float32 [O, I]
    """See the door."""
    if weight.group_index is not None and len(weight.part_rows) > 1:
        return torch.cat([dequantize(part) for part in weight.parts()])
    values = unpack_nibbles(weight.values) if weight.values.dtype == torch.uint8 else weight.values
    num_rows, num_columns = values.shape
    numbers = values.float()
    if weight.zero is not None:
        numbers = numbers - _by_column(weight.zero.float(), weight, num_columns)
    elif values.dtype == torch.uint8:
        numbers = numbers - NIBBLE_ZERO
    scale = weight.scale
    if weight.row_block > 1:
        scale = scale.repeat_interleave(weight.row_block, 0)[:num_rows]
    return numbers * _by_column(scale, weight, num_columns)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., I / 2] -> uint8 [..., I] below 16; the first of two lies in the low half."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _by_column(grouped: Tensor, weight: QuantizedWeight, num_columns: int) -> Tensor:
    """[O, G] -> [O, I], or [O, 1] where all columns are one group."""
    if weight.group_index is not None:
        return grouped[:, weight.group_index[0].long()]
    if grouped.shape[1] == 1:
        return grouped
    return grouped.repeat_interleave(weight.column_block, 1)[:, :num_columns]
