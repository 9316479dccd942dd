"""Products with quantized matrices in Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cuda.launch import with_dense_columns
from torchinfer.kernels.cuda.matmul import multiply
from torchinfer.kernels.cuda.matrix import Matrix, as_matrix, is_supported
from torchinfer.kernels.reference.quantized_matmul import quantized_matmul as reference

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight


def quantized_matmul(
    x: Tensor,  # [N, I]
    weight: QuantizedWeight | Matrix,  # [O, I]
) -> Tensor:  # [N, O]
    """See the door."""
    if not isinstance(weight, Matrix):
        if not is_supported(x, weight):
            return reference(x, weight)
        if weight.input_scale is not None and len(weight.part_rows) > 1:
            return torch.cat([quantized_matmul(x, part) for part in weight.parts()], 1)
    return multiply(with_dense_columns(x), as_matrix(weight), None, weight.input_scale)
