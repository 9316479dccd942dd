"""The first half of experts in Triton: products with gate and up and the activation, in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from torchinfer.kernels.cuda.grouped_matmul import can_group, multiply_groups
from torchinfer.kernels.cuda.matrix import Matrix
from torchinfer.kernels.reference.grouped_gated_matmul import grouped_gated_matmul as reference

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_gated_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight | Matrix,  # [E, 2 * F, I]
    group_sizes: Tensor,  # [E] int32
    activation: str,
) -> Tensor:  # [N, F]
    """See the door."""
    if not isinstance(weight, Matrix) and not can_group(x, weight):
        return reference(x, weight, group_sizes, activation)
    return multiply_groups(x, weight, group_sizes, activation)
