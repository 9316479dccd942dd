"""Normalization by mean and variance (arXiv 1607.06450)."""

from torch import Tensor
from torch.nn import functional


def layer_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    epsilon: float,
) -> Tensor:
    """See the door."""
    return functional.layer_norm(x, weight.shape, weight, bias, epsilon)
