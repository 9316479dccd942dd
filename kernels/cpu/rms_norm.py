"""Root mean square normalization in the CPU library."""

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import DTYPES, check, loaded, require, with_dense_rows
from torchinfer.kernels.reference.rms_norm import rms_norm as reference


def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    epsilon: float,
    offset: float,
) -> Tensor:
    """See the door."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype or not x.numel():
        return reference(x, weight, epsilon, offset)
    rows = with_dense_rows(x.reshape(-1, x.shape[-1]))
    weight = weight.contiguous()
    is_fit = weight.shape == x.shape[-1:] and weight.is_cpu and x.is_cpu
    require(is_fit, "rms_norm takes x [..., D] and weight [D]", x, weight)
    result = torch.empty(x.shape, dtype=x.dtype)
    pointers = rows.data_ptr(), weight.data_ptr(), result.data_ptr()
    sizes = *rows.shape, rows.stride(0)
    check(loaded().torchinfer_cpu_rms_norm(*pointers, *sizes, epsilon, offset, DTYPES[x.dtype]))
    return result
