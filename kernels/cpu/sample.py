"""Tokens drawn from logits in the CPU library: src/sample.h."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import check, loaded, require

if TYPE_CHECKING:
    from torchinfer.batch import SamplingTensors


class SampleStruct(ctypes.Structure):
    """Sample of src/isa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "ids", "temperature", "top_p", "min_p", "uniform", "top_k")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride")),
    )


def sample(logits: Tensor, params: SamplingTensors, any_filter: bool) -> Tensor:
    """See the door. Filters cost little, so nobody has to know beforehand whether there are any."""
    return draw(logits, params)


def draw(logits: Tensor, params: SamplingTensors | None) -> Tensor:
    """Ids [R] of logits [R, V]; greedy ones without parameters.

    Raises:
        ValueError: for tensors that are not float32 (top_k: int32), not contiguous, or of other shapes.
    """
    is_fit = logits.dtype == torch.float32 and logits.ndim == 2 and logits.is_cpu and logits.shape[1] > 0
    require(is_fit, "logits are float32 [R, V]", logits)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    ids = torch.empty(len(logits), dtype=torch.int32)
    task = SampleStruct(logits.data_ptr(), ids.data_ptr())
    task.rows, task.columns, task.stride = *logits.shape, logits.stride(0)
    if params is not None:
        for name in ("temperature", "top_p", "min_p", "uniform", "top_k"):
            values = getattr(params, name)
            dtype = torch.int32 if name == "top_k" else torch.float32
            is_fit = values.dtype == dtype and values.shape == (len(logits),) and values.is_contiguous()
            require(is_fit and values.is_cpu, f"{name} is contiguous {dtype} [R]", values, logits)
            setattr(task, name, values.data_ptr())
    check(loaded().torchinfer_cpu_sample(ctypes.byref(task)))
    return ids
