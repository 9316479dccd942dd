"""Gated activation of a feed-forward layer in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, require, with_dense_columns
from torchinfer.kernels.reference.gated_activation import gated_activation as reference

BLOCK = 1024


def gated_activation(
    gate_up: Tensor,  # [N, 2 * F]
    activation: str,
) -> Tensor:
    """See the door."""
    if gate_up.dtype not in DTYPES or not gate_up.numel() or gate_up.ndim != 2:
        return reference(gate_up, activation)
    gate_up = with_dense_columns(gate_up)
    num_rows, num_columns = gate_up.shape
    require(num_columns % 2 == 0, "gated_activation takes [N, 2 * F]", gate_up)
    size = num_columns // 2
    result = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(BLOCK, triton.next_power_of_2(size))
    gated_activation_kernel[(num_rows, triton.cdiv(size, block))](
        gate_up, result, size, gate_up.stride(0), ACTIVATION=activation, BLOCK=block
    )
    return result


@triton.jit
def gated_activation_kernel(
    gate_up: tl.tensor,  # [N, 2 * F]
    result: tl.tensor,  # [N, F]
    size: tl.tensor,
    stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program computes BLOCK numbers of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = column < size
    gate = tl.load(gate_up + row * stride + column, mask=is_there, other=0.0)
    up = tl.load(gate_up + row * stride + size + column, mask=is_there, other=0.0)
    product = gated(gate, up, ACTIVATION, result.dtype.element_ty)
    tl.store(result + row * size + column, product.to(result.dtype.element_ty), mask=is_there)


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 of activated gates times up, with each of the three rounded to DTYPE on the way, as torch does."""
    active = activate(gate.to(DTYPE).to(tl.float32), ACTIVATION).to(DTYPE)
    return active.to(tl.float32) * up.to(DTYPE).to(tl.float32)


@triton.jit
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """One of the three activations of float32."""
    if ACTIVATION == "silu":
        active = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        active = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        active = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return active


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent, to an absolute error of 1e-7; exp may overflow, and the result is then 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
