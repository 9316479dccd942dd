"""From the layouts of checkpoints to that of QuantizedWeight: outputs in rows, two numbers of 4 bits in a byte.

The int32 words of all tools hold their first number in the lowest bits, so that their bytes, in order, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchinfer.quantization.source import Shape


def words_in_columns(packed: Tensor, shape: Shape) -> Tensor:
    """int32 [I / n, O], each word n inputs of an output -> uint8 `shape` [O, bytes of I]."""
    return packed.contiguous().view(torch.uint8).view(*packed.shape, 4).transpose(0, 1).reshape(shape)


def unpack_words(packed: Tensor, bits: int) -> Tensor:
    """int32 [R, W] -> uint8 [R, W * 32 / bits]."""
    found = packed.contiguous().view(torch.uint8)
    return torch.stack((found & 15, found >> 4), -1).flatten(-2) if bits == 4 else found


def to_int8(numbers: Tensor) -> Tensor:
    """uint8 that stand for themselves less 128 -> int8."""
    return (numbers ^ 128).view(torch.int8)


def scale_rows(scale: Tensor, shape: Shape, row_block: int = 1) -> Tensor:
    """A scale of all, of each row [O] or [O, G], or of blocks of rows [B, G] -> float32 `shape` [O, G]."""
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(shape)
    return scale.float().reshape(-1, shape[1]).repeat_interleave(row_block, 0)[: shape[0]]


def group_index(index: Tensor, shape: Shape, group: int) -> Tensor:
    """int32 [I], the group of each input -> int32 [1, I]. All -1: in order, as compressed-tensors writes it."""
    in_order = torch.arange(len(index), dtype=index.dtype, device=index.device) // group
    low, high = (int(bound) for bound in torch.aminmax(index))
    last = int(in_order[-1])
    if (low, high) == (-1, -1):
        index = in_order
    elif low < 0 or high > last:
        raise ValueError(f"groups from {low} to {high}, but there are those from 0 to {last}: take another copy of it")
    return index.reshape(shape)
