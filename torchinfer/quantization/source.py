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

    Without `convert` it must have the shape of the part of the tensor that it fills. `convert` gets the whole tensor
    and that shape; it is called on the host or the device, and never sees parts.
    """

    suffix: str  # in place of ".weight": ".qweight", ".weight_scale"
    tensor: str  # of QuantizedMatrix: values, scale, zero, group_index or input_scale
    dtypes: tuple[torch.dtype, ...]
    shape: Callable[[int, int], Shape] | None = None  # (outputs, inputs) of the layer -> the shape in the checkpoint
    convert: Callable[[Tensor, Shape], Tensor] | None = None
