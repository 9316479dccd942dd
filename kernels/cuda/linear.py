"""Linear layers on CUDA: cuBLAS for plain matrices, the kernel of quantized ones for those that were prepared."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.cuda.matrix import Matrix
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul


def linear(
    x: Tensor,  # [N, I]
    weight: Tensor | Matrix,  # [O, I]
    bias: Tensor | None,  # [O]
) -> Tensor:  # [N, O]
    """See the door."""
    if isinstance(weight, Tensor):
        return functional.linear(x, weight, bias)
    product = quantized_matmul(x, weight)
    return product if bias is None else product + bias
