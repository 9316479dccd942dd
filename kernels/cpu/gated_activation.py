"""Gated activation of a feed-forward layer in the CPU library."""

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import DTYPES, check, loaded, require
from torchinfer.kernels.reference.gated_activation import gated_activation as reference

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # ActivationKind in src/isa.h


def gated_activation(
    gate_up: Tensor,  # [N, 2 * F]
    activation: str,
) -> Tensor:
    """See the door."""
    if gate_up.dtype not in DTYPES or not gate_up.numel() or gate_up.ndim != 2:
        return reference(gate_up, activation)
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_rows, num_columns = gate_up.shape
    require(num_columns % 2 == 0 and gate_up.is_cpu, "gated_activation takes [N, 2 * F]", gate_up)
    result = torch.empty(num_rows, num_columns // 2, dtype=gate_up.dtype)
    sizes = num_rows, num_columns // 2, gate_up.stride(0)
    pointers = gate_up.data_ptr(), result.data_ptr()
    check(loaded().torchinfer_cpu_gated_activation(*pointers, *sizes, KINDS[activation], DTYPES[gate_up.dtype]))
    return result
