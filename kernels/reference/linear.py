"""Linear layers."""

from torch import Tensor
from torch.nn import functional


def linear(
    x: Tensor,  # [N, I]
    weight: Tensor,  # [O, I]
    bias: Tensor | None,  # [O]
) -> Tensor:  # [N, O]
    """See the door."""
    return functional.linear(x, weight, bias)
