"""Products of e4m3 by torch's own kernels (cuBLAS, CUTLASS), from as many rows on as the table of launches says."""

from __future__ import annotations

import torch
from torch import Tensor

from torchinfer.kernels.cuda.matrix import Matrix

MULTIPLE = 16  # of inputs and outputs, which torch asks for


def has_library(matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether torch multiplies rows in e4m3 with such a matrix to results of `dtype`, with scales of both."""
    is_e4m3 = matrix.values.dtype == torch.float8_e4m3fn and matrix.activations == "fp8"
    is_whole = matrix.values.ndim == 2 and not matrix.group and matrix.row_block == 1
    return is_e4m3 and is_whole and dtype == torch.bfloat16 and not any(size % MULTIPLE for size in matrix.shape)


def library_matmul(
    x: Tensor,  # e4m3 [N, I]
    row_scale: Tensor,  # float32 [N]
    matrix: Matrix,  # [O, I], as `has_library` has it
) -> Tensor:  # bfloat16 [N, O]
    """Sums in float32. Which kernel torch takes, and so a row's last bit, may depend on the number of rows."""
    assert matrix.scale is not None
    columns, scale = matrix.values.T, matrix.scale.T
    return torch._scaled_mm(x, columns, scale_a=row_scale[:, None], scale_b=scale, out_dtype=torch.bfloat16)
