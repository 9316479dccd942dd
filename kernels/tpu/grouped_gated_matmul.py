"""The first half of experts: gate, up and activation, in one pass where the kernel takes the matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.kernels.tpu.grouped_matmul import grouped_matmul
from torchinfer.kernels.tpu.packed_weight import PackedWeight

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_gated_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight | PackedWeight,  # [E, 2 * F, I]
    group_sizes: Tensor,  # [E] int32
    activation: str,
) -> Tensor:  # [N, F]
    """See the door."""
    if isinstance(weight, PackedWeight):
        from torchinfer.kernels.tpu.matmul_op import gated_matmul  # needs jax, which other matrices do not

        return gated_matmul(x, weight, activation, group_sizes)
    return gated_activation(grouped_matmul(x, weight, group_sizes), activation)
