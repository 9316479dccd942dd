"""Matrices into fewer bits, in the CPU library: of every row block and group a scale, then its values, in one pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import DTYPES, check, loaded, require
from torchinfer.kernels.cpu.packed_weight import FORMATS


class QuantizeStruct(ctypes.Structure):
    """Quantize of src/isa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "values", "scale")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride", "row_block", "column_block")),
        *((name, ctypes.c_int32) for name in ("dtype", "format")),
    )


def quantize_matrix(
    weight: Tensor,  # float [R, I]
    values: Tensor,  # int8 or float8_e4m3fn [R, I], or uint8 [R, I / 2]; written in place
    scale: Tensor,  # float32 [ceil(R / row_block), G]; written in place
    row_block: int,
    column_block: int,
) -> None:
    """See the door.

    Raises:
        ValueError: tensors or blocks do not fit together; nothing was written then.
    """
    if weight.dtype == torch.float64:
        weight = weight.float()
    is_fit = weight.ndim == 2 and weight.dtype in DTYPES and values.dtype in FORMATS
    is_fit = is_fit and row_block > 0 and column_block > 0
    require(is_fit, f"quantize_matrix takes float [R, I] and blocks of {row_block} x {column_block}", weight, values)
    num_rows, num_columns = weight.shape
    if weight.stride(1) != 1 or weight.stride(0) < num_columns:
        weight = weight.contiguous()
    width = num_columns // 2 if values.dtype == torch.uint8 else num_columns
    scale_shape = (-(-num_rows // row_block), -(-num_columns // column_block))
    is_fit = values.shape == (num_rows, width) and scale.shape == scale_shape and scale.dtype == torch.float32
    is_fit = is_fit and values.is_contiguous() and scale.is_contiguous()
    is_fit = is_fit and weight.is_cpu and values.is_cpu and scale.is_cpu
    require(is_fit, f"values are [{num_rows}, {width}], scales float32 {list(scale_shape)}, contiguous", values, scale)
    task = QuantizeStruct(
        weight.data_ptr(),
        values.data_ptr(),
        scale.data_ptr(),
        num_rows,
        num_columns,
        weight.stride(0) if num_rows > 1 else num_columns,  # torch leaves that of a single row open
        row_block,
        column_block,
        DTYPES[weight.dtype],
        FORMATS[values.dtype],
    )
    check(loaded().torchinfer_cpu_quantize(ctypes.byref(task)))
