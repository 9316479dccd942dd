"""Linear layers in the CPU library."""

from __future__ import annotations

import ctypes

from torch import Tensor

from torchinfer.kernels.cpu.library import DTYPES, check, loaded, require
from torchinfer.kernels.cpu.packed_weight import PackedWeight
from torchinfer.kernels.reference.linear import linear as reference


def linear(
    x: Tensor,  # [N, I]
    weight: Tensor | PackedWeight,  # [O, I]
    bias: Tensor | None,  # [O]
) -> Tensor:  # [N, O]
    """See the door. Matrices that were not prepared are multiplied by the reference."""
    if isinstance(weight, Tensor):
        return reference(x, weight, bias)
    require(len(weight.shape) == 2 and x.ndim == 2, "linear takes x [N, I] and one matrix", x)
    result = x.new_empty(x.shape[0], weight.shape[0])
    multiply(x, weight, result, bias, None)
    return result


def multiply(x: Tensor, weight: PackedWeight, result: Tensor, bias: Tensor | None, sizes: Tensor | None) -> None:
    """Write x's rows times their matrices to `result`, [N, O] contiguous; sizes: int32 [E], whose sum is N."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    dtype = DTYPES.get(x.dtype)
    is_fit = dtype is not None and weight.dtype in (None, x.dtype) and x.shape[-1] == weight.shape[-1] and x.is_cpu
    require(is_fit, f"the matrix {list(weight.shape)} takes inputs of {weight.shape[-1]} numbers", x)
    if bias is not None:
        bias = bias.contiguous()
        is_fit = bias.shape == weight.shape[-2:-1] and bias.dtype == x.dtype and bias.is_cpu
        require(is_fit, "bias is [O] and of x's dtype", bias, x)
    pointers = x.data_ptr(), result.data_ptr(), bias.data_ptr() if bias is not None else None
    group_sizes = None if sizes is None else sizes.data_ptr()
    struct = ctypes.addressof(weight.struct)
    check(loaded().torchinfer_cpu_linear(struct, *pointers, group_sizes, x.shape[0], x.stride(0), dtype))
