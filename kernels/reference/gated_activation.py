"""Gated activation of a feed-forward layer (arXiv 2002.05202)."""

from torch import Tensor
from torch.nn import functional


def gated_activation(
    gate_up: Tensor,  # [N, 2 * F]
    activation: str,
) -> Tensor:
    """See the door."""
    gate, up = gate_up.chunk(2, -1)
    return activate(gate, activation) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """One of the three activations; KeyError would be our bug, configs are checked when they are read."""
    if activation == "silu":
        return functional.silu(x)
    approximation = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
    return functional.gelu(x, approximate=approximation)
