"""Normalization by mean and variance in the CPU library."""

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import DTYPES, check, loaded, require, with_dense_rows
from torchinfer.kernels.reference.layer_norm import layer_norm as reference


def layer_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    epsilon: float,
) -> Tensor:
    """See the door."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype or bias.dtype != x.dtype or not x.numel():
        return reference(x, weight, bias, epsilon)
    is_fit = weight.shape == bias.shape == x.shape[-1:] and weight.is_cpu and bias.is_cpu and x.is_cpu
    require(is_fit, "layer_norm takes x [..., D], weight and bias [D]", x, weight, bias)
    rows = with_dense_rows(x.reshape(-1, x.shape[-1]))
    weight, bias = weight.contiguous(), bias.contiguous()
    result = torch.empty(x.shape, dtype=x.dtype)
    pointers = rows.data_ptr(), weight.data_ptr(), bias.data_ptr(), result.data_ptr()
    sizes = *rows.shape, rows.stride(0)
    check(loaded().torchinfer_cpu_layer_norm(*pointers, *sizes, epsilon, DTYPES[x.dtype]))
    return result
