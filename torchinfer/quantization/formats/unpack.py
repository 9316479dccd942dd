"""From the layouts of checkpoints to that of QuantizedWeight: outputs in rows, two numbers of 4 bits in a byte.

The int32 words of all tools hold their first number in the lowest bits, so that their bytes, in order, are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchinfer.quantization.source import Shape
from torchinfer.quantized_weight import NIBBLE_ZERO


def words_in_columns(packed: Tensor, shape: Shape) -> Tensor:
    """int32 [I / n, O], each word n inputs of an output -> uint8 `shape` [O, bytes of I]."""
    return packed.contiguous().view(torch.uint8).view(*packed.shape, 4).transpose(0, 1).reshape(shape)


def unpack_words(packed: Tensor, bits: int) -> Tensor:
    """int32 [R, W], or their bytes -> uint8 [R, W * 32 / bits]."""
    found = packed.contiguous().view(torch.uint8)
    return torch.stack((found & 15, found >> 4), -1).flatten(-2) if bits == 4 else found


def to_int8(numbers: Tensor) -> Tensor:
    """uint8 that stand for themselves less 128 -> int8."""
    return (numbers ^ 128).view(torch.int8)


def to_nibbles(numbers: Tensor, shape: Shape) -> Tensor:
    """int8 [O, I] from -8 to 7 -> uint8 `shape` [O, I / 2]: plus 8, the first of two in the low half."""
    low, high = (int(bound) for bound in torch.aminmax(numbers))
    if low < -NIBBLE_ZERO or high >= NIBBLE_ZERO:
        raise ValueError(f"numbers from {low} to {high}, but 4 bits hold those from -8 to 7: take another copy of it")
    pairs = (numbers + NIBBLE_ZERO).view(torch.uint8).view(*shape, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def scale_rows(scale: Tensor, shape: Shape, row_block: int = 1) -> Tensor:
    """A scale of all, of each row [O] or [O, G], or of blocks of rows [B, G] -> float32 `shape` [O, G]."""
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(shape)
    repeats = min(row_block, shape[0])  # a block that is taller than the matrix is cut off
    return scale.float().reshape(-1, shape[1]).repeat_interleave(repeats, 0)[: shape[0]]


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
