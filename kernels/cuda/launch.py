"""What the ports of this folder share: what they can compute with, and what they refuse.

Where there is no GPU, kernels are proven in Triton's interpreter, on tensors in the CPU's memory: TRITON_INTERPRET=1
must be in the environment before triton is imported.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3_CAPABILITY = (8, 9)  # the first cards that convert e4m3fn
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def has_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels can read and write numbers of `dtype` there."""
    if dtype == torch.float8_e4m3fn and device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= E4M3_CAPABILITY
    return dtype in TRITON_DTYPES


def with_dense_columns(x: Tensor) -> Tensor:
    """x, or a copy, so that the numbers of a row lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require(is_fit: bool, rule: str, *tensors: Tensor) -> None:
    """Refuse tensors before their memory is handed out.

    Raises:
        ValueError: with the rule, the shapes and dtypes.
    """
    if not is_fit:
        found = ", ".join(f"{tensor.dtype} {list(tensor.shape)} strides {list(tensor.stride())}" for tensor in tensors)
        raise ValueError(f"{rule}; got {found}")
