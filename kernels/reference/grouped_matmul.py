"""Matrix products of row groups, each with its own matrix (arXiv 2211.15841)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.reference.quantized_matmul import quantized_matmul

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight,  # [E, O, I]
    group_sizes: Tensor,  # [E] int32
) -> Tensor:
    """See the door. Reads the sizes on the host: on an accelerator that is a synchronization."""
    num_outputs = (weight if isinstance(weight, Tensor) else weight.values).shape[1]
    result = x.new_zeros(x.shape[0], num_outputs)
    start = 0
    for group, size in enumerate(group_sizes.tolist()):
        if size:
            result[start : start + size] = expert_matmul(x[start : start + size], weight, group)
        start += size
    return result


def expert_matmul(x: Tensor, weight: Tensor | QuantizedWeight, index: int) -> Tensor:
    """x [N, I] times the transposed matrix of one expert -> [N, O]."""
    if isinstance(weight, Tensor):
        return functional.linear(x, weight[index])
    return quantized_matmul(x, weight.expert(index))
