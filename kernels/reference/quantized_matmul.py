"""Products with quantized matrices in plain PyTorch, on any device, with shapes that depend on no value.

Weight-only: int8 and float8 numbers are exact in bfloat16 and float32, so a scale of a whole output is applied to the
product. With quantized activations the integers are multiplied exactly and summed in int32 (arXiv 2208.07339); where
groups of inputs have scales of their own, they are sums of float32. Inputs that are rounded in groups, as in arXiv
2412.19437, section 3.3, are multiplied as the numbers that they stand for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.reference.dequantize import dequantize
from torchinfer.kernels.reference.quantize_rows import quantize_rows, round_groups

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# 128 * 128 * 1024 = 2**24: float32 holds every partial sum exactly, also where bfloat16 numbers are multiplied (TPU).
EXACT_COLUMNS = 1024


def quantized_matmul(
    x: Tensor,  # [N, I]
    weight: QuantizedWeight,  # [O, I]
) -> Tensor:  # [N, O]
    """See the door."""
    if weight.activations == "none":
        return _weight_only(x, weight)
    if weight.input_scale is not None and len(weight.part_rows) > 1:
        return torch.cat([quantized_matmul(x, part) for part in weight.parts()], 1)
    if weight.input_group:
        rounded = round_groups(x, DTYPES[weight.activations], weight.input_group)
        return functional.linear(rounded, dequantize(weight)).to(x.dtype)
    numbers, input_scale = quantize_rows(x, DTYPES[weight.activations], weight.input_scale)
    if weight.scale.shape != (weight.values.shape[0], 1) or weight.values.dtype == torch.uint8:
        return (functional.linear(numbers.float(), dequantize(weight)) * input_scale[:, None]).to(x.dtype)
    if weight.activations == "int8":
        product = _integer_product(numbers, weight.values).float()
    else:
        product = functional.linear(numbers.float(), weight.values.float())
    return (product * input_scale[:, None] * weight.scale.T).to(x.dtype)


def _weight_only(x: Tensor, weight: QuantizedWeight) -> Tensor:
    # In float16 a product without its scale may be beyond the range.
    is_scaled_after = weight.scale.shape == (weight.values.shape[0], 1) and x.dtype != torch.float16
    if is_scaled_after and weight.zero is None and weight.values.dtype != torch.uint8:
        return (functional.linear(x, weight.values.to(x.dtype)).float() * weight.scale.T).to(x.dtype)
    return functional.linear(x, dequantize(weight).to(x.dtype))


def _integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [N, I] times int8 [O, I], transposed -> int32 [N, O]."""
    pieces = zip(torch.split(x, EXACT_COLUMNS, 1), torch.split(weight, EXACT_COLUMNS, 1), strict=True)
    products = [functional.linear(a.float(), b.float()).to(torch.int32) for a, b in pieces]
    total = products[0]
    for product in products[1:]:
        total = total + product
    return total
