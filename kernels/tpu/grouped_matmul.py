"""Matrix products of row groups as dense ones under masks: shapes do not depend on the routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.reference.grouped_matmul import expert_matmul

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight,  # [E, O, I]
    group_sizes: Tensor,  # [E] int32
) -> Tensor:
    """See the door. Each group's matrix meets all rows: E times the work of the sparse product."""
    row = torch.arange(x.shape[0], device=x.device)
    ends = group_sizes.cumsum(0)
    result = x.new_zeros(x.shape[0], (weight if isinstance(weight, Tensor) else weight.values).shape[1])
    for group in range(group_sizes.shape[0]):
        end = ends[group]
        is_member = (row >= end - group_sizes[group]) & (row < end)
        result = torch.where(is_member[:, None], expert_matmul(x, weight, group), result)
    return result
