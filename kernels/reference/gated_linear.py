"""Gate, up and activation of a feed-forward layer: two ops of the door, one after the other."""

from __future__ import annotations

from torch import Tensor

from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.kernels.reference.linear import linear


def gated_linear(
    x: Tensor,  # [N, I]
    weight: Tensor,  # [2 * F, I]
    activation: str,
) -> Tensor:  # [N, F]
    """See the door."""
    return gated_activation(linear(x, weight, None), activation)
