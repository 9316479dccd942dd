"""Rotary position embedding in the CPU library."""

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import DTYPES, check, loaded, require, with_dense_rows
from torchinfer.kernels.reference.rotary_embedding import rotary_embedding as reference


def rotary_embedding(
    x: Tensor,  # [T, heads, D]
    cos: Tensor,  # [T, F] float32
    sin: Tensor,  # [T, F] float32
    is_interleaved: bool,
) -> Tensor:
    """See the door."""
    if x.dtype not in DTYPES or not x.numel():
        return reference(x, cos, sin, is_interleaved)
    x, cos, sin = with_dense_rows(x), cos.contiguous(), sin.contiguous()
    is_fit = x.ndim == 3 and cos.ndim == 2 and cos.shape == sin.shape and len(cos) == len(x)
    is_fit = is_fit and 2 * cos.shape[1] <= x.shape[2] and cos.dtype == sin.dtype == torch.float32
    is_fit = is_fit and x.is_cpu and cos.is_cpu and sin.is_cpu
    require(is_fit, "rotary_embedding takes x [T, heads, D], cos and sin float32 [T, F]", x, cos, sin)
    result = torch.empty(x.shape, dtype=x.dtype)
    pointers = x.data_ptr(), result.data_ptr(), cos.data_ptr(), sin.data_ptr()
    sizes = *x.shape, cos.shape[1], x.stride(0)
    check(loaded().torchinfer_cpu_rotary(*pointers, *sizes, is_interleaved, DTYPES[x.dtype]))
    return result
