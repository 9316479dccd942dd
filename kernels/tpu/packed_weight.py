"""Matrices in the words that the TPU's matmul kernel streams, made once after they were loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.reference.dequantize import NIBBLE_ZERO, unpack_nibbles
from torchinfer.kernels.tpu.page_layout import LANES, round_up
from torchinfer.kernels.tpu.word_layout import INPUT_MULTIPLE, pack_words

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

SMALL_GROUPS = (32, 64)  # of inputs with a scale of their own; others are multiples of 128, or all inputs
NAMES = {
    torch.int8: "int8",
    torch.uint8: "int4",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class PackedWeight:
    """A matrix, or those of experts, ready for the kernel; see `word_layout`."""

    shape: tuple[int, ...]  # [O, I] or [E, O, I]
    name: str  # of the numbers
    words: Tensor  # int32 [E, W, O padded], one expert if there are none
    scale: Tensor  # float32 [E, G, O padded]
    shift: Tensor | None  # float32 [G, O]: what stands for zero, times the scale
    activations: str  # none, int8, fp8
    input_scale: Tensor | None  # float32 [1], of all inputs in place of one a token
    num_cores: int  # of the chip that runs the kernel; 0: XLA's own operations
    input_group: int = 0  # inputs of a token that are rounded to e4m3 by a scale of their own; 0: all of them

    def numel(self) -> int:
        """Numbers that the matrix stands for."""
        return int(torch.Size(self.shape).numel())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By field."""
        named = {"words": self.words, "scale": self.scale, "shift": self.shift, "input_scale": self.input_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def can_prepare(weight: Tensor | QuantizedWeight) -> bool:
    """Whether the kernel is for the matrix. Not for one of bfloat16 that is not of experts: XLA's own product is bound
    by the memory there, and by the matrix unit where there are many rows."""
    if isinstance(weight, Tensor):
        return weight.dtype == torch.bfloat16 and weight.ndim == 3
    values, group = weight.values, weight.column_block
    is_known = values.dtype in NAMES and weight.group_index is None
    is_known &= weight.zero is None or values.ndim == 2
    is_known &= weight.input_scale is None or (values.ndim == 2 and weight.input_scale.shape == (1,))
    is_known &= weight.activations in ("none", "fp8" if values.dtype == torch.float8_e4m3fn else "int8")
    return is_known and (weight.scale.shape[-1] == 1 or group % LANES == 0 or group in SMALL_GROUPS)


def prepare(weight: Tensor | QuantizedWeight, num_cores: int) -> PackedWeight | None:
    """See the door."""
    if not can_prepare(weight):
        return None
    if isinstance(weight, Tensor):
        scale = torch.ones((weight.shape[0], 1, round_up(weight.shape[1], LANES)), device=weight.device)
        words = pack_words(weight, "bfloat16", round_up(weight.shape[2], INPUT_MULTIPLE))
        return PackedWeight(tuple(weight.shape), "bfloat16", words, scale, None, "none", None, num_cores)
    signed, num_groups, shift = weight.values, weight.scale.shape[-1], None
    if signed.dtype == torch.uint8:
        signed = unpack_nibbles(signed).to(torch.int8) - NIBBLE_ZERO
    shape = signed.shape
    multiple = INPUT_MULTIPLE if num_groups == 1 else math.lcm(INPUT_MULTIPLE, weight.column_block)
    num_inputs = round_up(shape[-1], multiple)
    scale = weight.scale
    if weight.row_block > 1:
        scale = scale.repeat_interleave(weight.row_block, -2)[..., : shape[-2], :]
    missing = 0 if num_groups == 1 else num_inputs // weight.column_block - num_groups  # groups that only pad
    scale = functional.pad(scale.transpose(-1, -2), (0, 0, 0, missing)).contiguous()
    if weight.zero is not None:
        zero = weight.zero.float() - (NIBBLE_ZERO if weight.values.dtype == torch.uint8 else 0)
        shift = functional.pad(zero.T, (0, 0, 0, missing)) * scale
    name = NAMES[weight.values.dtype]
    words = pack_words(signed, name, num_inputs)
    scale = functional.pad(scale, (0, words.shape[-1] - shape[-2]))
    if len(shape) == 2:
        words, scale = words[None], scale[None]
    inputs = weight.activations, weight.input_scale, num_cores, weight.input_group
    return PackedWeight(tuple(shape), name, words, scale, shift, *inputs)
