"""Matrix products of row groups in Triton. Blocks of rows find their group on the card: no size comes to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, with_dense_columns
from torchinfer.kernels.cuda.matmul import multiply
from torchinfer.kernels.cuda.matrix import Matrix, as_matrix, is_supported
from torchinfer.kernels.reference.grouped_matmul import grouped_matmul as reference

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def grouped_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor | QuantizedWeight | Matrix,  # [E, O, I]
    group_sizes: Tensor,  # [E] int32
) -> Tensor:
    """See the door. With scales of inputs that differ between merged parts, the reference computes."""
    if not isinstance(weight, Matrix) and not can_group(x, weight):
        return reference(x, weight, group_sizes)
    return multiply_groups(x, weight, group_sizes, "none")


def can_group(x: Tensor, weight: Tensor | QuantizedWeight) -> bool:
    """Whether the kernel multiplies such matrices; the rest is the reference's."""
    if isinstance(weight, Tensor):
        return x.dtype in DTYPES and weight.dtype == x.dtype and x.numel() > 0
    return is_supported(x, weight) and (weight.input_scale is None or weight.input_scale.shape[-1] == 1)


def multiply_groups(
    x: Tensor,  # [N, I]
    weight: Tensor | QuantizedWeight | Matrix,  # [E, O, I]
    group_sizes: Tensor,  # [E]
    activation: str,
) -> Tensor:  # [N, O], or with an activation [N, O / 2]
    """`multiply` of matrices that `can_group` lets through."""
    sizes = group_sizes.to(torch.int32).contiguous()
    if isinstance(weight, Tensor):
        return multiply(with_dense_columns(x), Matrix(weight.contiguous()), sizes, None, activation)
    input_scale = None
    if weight.input_scale is not None:
        row = torch.arange(len(x), device=x.device)
        group = torch.searchsorted(sizes.cumsum(0), row, right=True).clamp(max=len(sizes) - 1)
        input_scale = weight.input_scale[group, 0]
    return multiply(with_dense_columns(x), as_matrix(weight), sizes, input_scale, activation)
