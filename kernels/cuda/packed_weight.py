"""Matrices of 4 bits in the order in which `matmul_kernel` multiplies them, made once after they were loaded.

A step is 2 or 4 products (`Matrix.parts`), each of the numbers at one place of bytes or of words. As a checkpoint has
them, the inputs of a product are every second or fourth; packed, they are 16 neighbours of a unit of 32 or 64:

    a unit of 64:   inputs 0 ... 15 | 16 ... 31 | 32 ... 47 | 48 ... 63
    product             0               1           2           3
    word w of 8:    number p of its low half is input 16 p + 2 w, that of its high half the one behind it
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cuda.matrix import RUN, Matrix, as_matrix, has_tiles

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

BLOCK_BYTES = 1 << 25  # of values that are turned together: what is copied on the way is a few times that


def prepare(weight: Tensor | QuantizedWeight, may_overwrite: bool = False) -> Matrix | None:
    """See the door: None for all but 4 bits, for inputs that are not whole units, and for what has no tiles."""
    if isinstance(weight, Tensor) or weight.values.dtype != torch.uint8 or not has_tiles(weight):
        return None
    matrix = as_matrix(weight)
    # A merged matrix with a scale of inputs for each part is several products.
    is_one = weight.input_scale is None or weight.input_scale.shape[-1] == 1
    if not is_one or matrix.num_inputs % (RUN * matrix.parts):
        return None
    values = weight.values.contiguous() if may_overwrite else weight.values.clone(memory_format=torch.contiguous_format)
    rows = values.view(-1, values.shape[-1])
    for block in torch.split(rows, max(1, BLOCK_BYTES // rows.shape[1])):
        block.copy_(packed(block, matrix.parts))
    return replace(matrix, values=values, is_packed=True)


def packed(
    values: Tensor,  # uint8 [R, I / 2], the first of two inputs in the low half
    parts: int,  # 2 or 4
) -> Tensor:  # uint8 [R, I / 2]
    """The same numbers in packed order."""
    numbers = torch.stack((values & 15, values >> 4), -1).view(len(values), -1, parts, RUN)
    if parts == 2:
        low, high = numbers.unbind(2)
    else:  # [R, units, places in a half by twos, 2, words, halves] -> [R, units, words, halves, places by twos]
        pairs = numbers.view(len(values), -1, 2, 2, RUN // 2, 2)
        low, high = (pairs[:, :, :, place].permute(0, 1, 3, 4, 2) for place in (0, 1))
    return (low | (high << 4)).reshape(values.shape)
