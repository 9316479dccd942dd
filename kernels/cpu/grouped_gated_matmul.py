"""The first half of experts on the CPU: two calls of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from torchinfer.kernels.cpu.gated_activation import gated_activation
from torchinfer.kernels.cpu.grouped_matmul import grouped_matmul

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_gated_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight,  # [E, 2 * F, I]
    group_sizes: Tensor,  # [E] int32
    activation: str,
) -> Tensor:  # [N, F]
    """See the door."""
    return gated_activation(grouped_matmul(x, weight, group_sizes), activation)
