"""Products of normalized rows with quantized matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from torchinfer.kernels.reference.quantized_matmul import quantized_matmul
from torchinfer.kernels.reference.rms_norm import rms_norm

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def linear_of_norm(
    x: Tensor,  # [N, I]
    norm_weight: Tensor,  # [I]
    epsilon: float,
    offset: float,
    weight: QuantizedWeight,  # [O, I]
) -> Tensor:  # [N, O]
    """See the door."""
    return quantized_matmul(rms_norm(x, norm_weight, epsilon, offset), weight)
