"""From numbers to values and scales: symmetric, round to nearest, even where two are as near.

int8    a scale for each output: its largest number becomes 127                        (arXiv 2208.07339)
fp8     e4m3fn: a scale for each output, or for blocks: its largest number becomes 448  (arXiv 2209.05433)
int4    a scale for each group of inputs, of some that cut off the largest numbers the one with the least error
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.reference.dequantize import NIBBLE_ZERO

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NIBBLE_LIMIT = 7.5  # half of a step beyond 7; -8 is the other end
# Of the scale that cuts nothing off. Twice as many bring 0.5 % less error, on trained and on random matrices.
CLIP_RATIOS = tuple(1 - 0.06 * step for step in range(6))
CPU_BLOCK_BYTES = 1 << 20  # of float32: what is computed with at once stays in the processor's cache
DEVICE_BLOCK_BYTES = 1 << 26  # elsewhere: the launches of a block must take longer than the host needs for them
LANES = 16


def quantize_matrix(
    weight: Tensor,  # float [R, I]
    values: Tensor,  # int8 or float8_e4m3fn [R, I], or uint8 [R, I / 2]; written in place
    scale: Tensor,  # float32 [ceil(R / row_block), G]; written in place
    row_block: int,
    column_block: int,
) -> None:
    """See the door."""
    block_bytes = CPU_BLOCK_BYTES if weight.device.type == "cpu" else DEVICE_BLOCK_BYTES
    blocks = max(1, block_bytes // (4 * weight.shape[1]) // row_block)
    parts = torch.split(weight, blocks * row_block), torch.split(values, blocks * row_block), torch.split(scale, blocks)
    for part, part_values, part_scale in zip(*parts, strict=True):
        done = _quantize(part.float(), values.dtype, row_block, column_block)
        part_values.copy_(done[0])
        part_scale.copy_(done[1])


def _quantize(weight: Tensor, dtype: torch.dtype, row_block: int, column_block: int) -> tuple[Tensor, Tensor]:
    if dtype == torch.uint8:
        return _quantize_to_nibbles(weight, column_block)
    num_rows, num_columns = weight.shape
    padding = (0, -num_columns % column_block, 0, -num_rows % row_block)
    padded = functional.pad(weight, padding) if any(padding) else weight
    blocks = padded.view(padded.shape[0] // row_block, row_block, -1, column_block)  # [B, row_block, G, column_block]
    scale = _scale(blocks.abs().amax((1, 3)) / LIMITS[dtype])
    numbers = (blocks / scale[:, None, :, None]).view(padded.shape)[:num_rows, :num_columns]
    numbers = numbers.clamp_(-LIMITS[dtype], LIMITS[dtype])
    return (numbers.round_() if dtype == torch.int8 else numbers).to(dtype), scale


def _quantize_to_nibbles(weight: Tensor, column_block: int) -> tuple[Tensor, Tensor]:
    groups = weight.view(weight.shape[0], -1, column_block)
    largest = groups.abs().amax(2) / NIBBLE_LIMIT
    scale, error = _scale(largest), torch.full_like(largest, torch.inf)
    for ratio in CLIP_RATIOS:
        candidate = _scale(largest * ratio)
        # What is tried is multiplied, which is faster; what is stored is divided.
        difference = _nibbles(groups * (1 / candidate)[..., None]).mul_(candidate[..., None]).sub_(groups)
        candidate_error = _sum(difference.square_())
        is_better = candidate_error < error
        scale, error = torch.where(is_better, candidate, scale), torch.where(is_better, candidate_error, error)
    values = _nibbles(groups / scale[..., None]).add_(NIBBLE_ZERO).view(weight.shape).to(torch.uint8)
    return values[:, 0::2] | (values[:, 1::2] << 4), scale


def _nibbles(quotients: Tensor) -> Tensor:
    """To whole numbers from -8 to 7, in place."""
    return quotients.round_().clamp_(-NIBBLE_ZERO, NIBBLE_ZERO - 1)


def _sum(numbers: Tensor) -> Tensor:
    """[R, G, column_block] -> [R, G], in an order of its own: which scale is best must not depend on the machine."""
    padded = functional.pad(numbers, (0, -numbers.shape[2] % LANES))
    lanes = padded.reshape(*numbers.shape[:2], -1, LANES)
    total: Tensor = lanes[:, :, 0]
    for index in range(1, lanes.shape[2]):
        total = total + lanes[:, :, index]
    while total.shape[2] > 1:
        half = total.shape[2] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def _scale(scale: Tensor) -> Tensor:
    """One where all is zero, or so small that its scale is: dividing by it must not give what is not finite."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
