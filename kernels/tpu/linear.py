"""Linear layers on XLA."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.tpu.packed_weight import PackedWeight


def linear(
    x: Tensor,  # [N, I]
    weight: Tensor | PackedWeight,  # [O, I]
    bias: Tensor | None,  # [O]
) -> Tensor:  # [N, O]
    """See the door."""
    if not isinstance(weight, PackedWeight):
        return functional.linear(x, weight, bias)
    from torchinfer.kernels.tpu.matmul_op import matmul  # needs jax, which other matrices do not

    product = matmul(x, weight)
    return product if bias is None else product + bias
