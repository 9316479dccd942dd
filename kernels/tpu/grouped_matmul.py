"""Matrix products of row groups: the TPU's kernel where it takes the matrices, else dense ones under masks. Shapes do
not depend on the routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.reference.grouped_matmul import expert_matmul
from torchinfer.kernels.tpu.packed_weight import PackedWeight

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight | PackedWeight,  # [E, O, I]
    group_sizes: Tensor,  # [E] int32
) -> Tensor:
    """See the door. Without the kernel each group's matrix meets all rows: E times the work of the sparse product."""
    if isinstance(weight, PackedWeight):
        from torchinfer.kernels.tpu.matmul_op import matmul  # needs jax, which other matrices do not

        return matmul(x, weight, group_sizes)
    row = torch.arange(x.shape[0], device=x.device)
    ends = group_sizes.cumsum(0)
    result = x.new_zeros(x.shape[0], (weight if isinstance(weight, Tensor) else weight.values).shape[1])
    for group in range(group_sizes.shape[0]):
        end = ends[group]
        is_member = (row >= end - group_sizes[group]) & (row < end)
        result = torch.where(is_member[:, None], expert_matmul(x, weight, group), result)
    return result
