"""Source: how a checkpoint that comes quantized holds one tensor of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint, beside or in place of `<layer>.weight`, and what it becomes.

    Without `convert` it must have the shape of the part of the tensor that it fills, and may be read in pieces.
    `convert` gets the whole tensor and that shape, on the host or the device, and makes at most three copies of the
    larger of both; ValueError says what is wrong with it.
    """

    suffix: str  # in place of ".weight": ".qweight", ".weight_scale"
    tensor: str  # of QuantizedMatrix: values, scale, zero, group_index or input_scale
    dtypes: tuple[torch.dtype, ...]
    shapes: Callable[[int], tuple[Shape, ...]] | None = None  # outputs of the layer -> what the checkpoint may have
    convert: Callable[[Tensor, Shape], Tensor] | None = None
    view: torch.dtype | None = None  # its bytes are numbers of this dtype
