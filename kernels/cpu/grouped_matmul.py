"""Matrix products of row groups in the CPU library: each group's matrix is read once, whatever its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import require
from torchinfer.kernels.cpu.linear import multiply
from torchinfer.kernels.cpu.packed_weight import PackedWeight
from torchinfer.kernels.reference.grouped_matmul import grouped_matmul as reference

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight | PackedWeight,  # [E, O, I]
    group_sizes: Tensor,  # [E] int32
) -> Tensor:
    """See the door. Matrices that were not prepared are multiplied by the reference."""
    if not isinstance(weight, PackedWeight):
        return reference(x, weight, group_sizes)
    sizes = group_sizes.to(torch.int32).contiguous()
    rule = f"grouped_matmul takes x [N, I] and {weight.shape[0]} sizes with a sum of at most N"
    is_fit = len(weight.shape) == 3 and x.ndim == 2 and sizes.shape == weight.shape[:1] and sizes.is_cpu
    require(is_fit, rule, x, sizes)
    num_rows = int(sizes.sum())
    require(0 <= num_rows <= len(x), rule, x, sizes)
    result = x.new_empty(x.shape[0], weight.shape[1])
    multiply(x[:num_rows], weight, result[:num_rows], None, sizes)
    result[num_rows:] = 0
    return result
