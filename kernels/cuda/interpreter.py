"""What Triton's interpreter lacks: for tests of the kernels where there is no GPU, with TRITON_INTERPRET=1.

In Triton 3.5 and 3.6 it cuts off where a card rounds to bfloat16, computes with the bits of bfloat16 in place of its
numbers, and makes loops' bounds of arrays, which numpy does not take from 2.4 on.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}  # which numpy does not have


def repair() -> None:
    """Make the interpreter compute what a card does; once in a process, any number of times is no harm."""
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_fp_to_fp = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.binary_op = _binary
    interpreter._patch_lang_tensor = _patch_tensor


def _cast(self: Any, source: Any, dtype: Any, rounding: Any = None) -> Any:
    """A block of numbers in another dtype, rounded to nearest; integers are cut off, as on a card."""
    kind, numbers = dtype.scalar, _numbers(source)
    if kind in TORCH_DTYPES:
        encoded = torch.from_numpy(numbers.astype(numpy.float32)).to(TORCH_DTYPES[kind])
        bits = encoded.view(torch.uint8 if kind == tl.float8e4nv else torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(kind)), kind)
    return interpreter.TensorHandle(numbers.astype(interpreter._get_np_dtype(kind)), kind)


def _dot(self: Any, a: Any, b: Any, sum: Any, precision: Any, most_imprecise: Any) -> Any:
    product = numpy.matmul(_numbers(a), _numbers(b), dtype=sum.data.dtype)
    return interpreter.TensorHandle(product + sum.data, sum.dtype.scalar)


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    kind = left.dtype.scalar
    if kind not in TORCH_DTYPES:
        return interpreter.TensorHandle(_as(kind, operation(left.data, right.data)), kind)
    result = operation(_numbers(left), _numbers(right))
    return _cast(self, interpreter.TensorHandle(result, tl.float32), kind)


def _as(kind: Any, result: Any) -> Any:
    """numpy makes 64 bits of 32 and 64; a comparison gives bits, and Triton 3.6 wants no more bits than `kind` has."""
    dtype = interpreter._get_np_dtype(kind)
    return result.astype(dtype) if result.dtype != bool and result.dtype.itemsize > dtype.itemsize else result


def _numbers(handle: Any) -> numpy.ndarray[Any, Any]:
    """The numbers of a block, in a dtype that numpy has."""
    kind, data = handle.dtype.scalar, numpy.asarray(handle.data)
    if kind not in TORCH_DTYPES:
        return data
    bits = torch.from_numpy(numpy.array(data).view(numpy.int16 if kind == tl.bfloat16 else numpy.uint8))
    return bits.view(TORCH_DTYPES[kind]).float().numpy()


_patch_upstream = interpreter._patch_lang_tensor


def _patch_tensor(tensor: Any, *scope: Any) -> None:  # which Triton 3.6 adds
    _patch_upstream(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()
