"""Products of gated activations with quantized matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.kernels.reference.quantized_matmul import quantized_matmul

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def linear_of_gated(
    gate_up: Tensor,  # [N, 2 * F]
    activation: str,
    weight: QuantizedWeight,  # [O, F]
) -> Tensor:  # [N, O]
    """See the door."""
    return quantized_matmul(gated_activation(gate_up, activation), weight)
