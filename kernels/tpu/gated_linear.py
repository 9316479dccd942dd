"""Gate, up and activation of a feed-forward layer on XLA, in one pass where the kernel takes the matrix."""

from __future__ import annotations

from torch import Tensor

from torchinfer.kernels.reference.gated_activation import gated_activation
from torchinfer.kernels.tpu.packed_weight import PackedWeight


def gated_linear(
    x: Tensor,  # [N, I]
    weight: PackedWeight,  # [2 * F, I]
    activation: str,
) -> Tensor:  # [N, F]
    """See the door."""
    from torchinfer.kernels.tpu.matmul_op import is_fused, matmul  # needs jax, which other matrices do not

    if weight.shift is None and is_fused(weight):
        return matmul(x, weight, activation=activation)
    return gated_activation(matmul(x, weight), activation)
