"""Gate, up and activation of a feed-forward layer on XLA, in one pass where the kernel takes the matrix."""

from __future__ import annotations

from torch import Tensor

from torchinfer.kernels.tpu.packed_weight import PackedWeight


def gated_linear(
    x: Tensor,  # [N, I]
    weight: PackedWeight,  # [2 * F, I]
    activation: str,
) -> Tensor:  # [N, F]
    """See the door."""
    from torchinfer.kernels.tpu.matmul_op import gated_matmul  # needs jax, which other matrices do not

    return gated_matmul(x, weight, activation)
