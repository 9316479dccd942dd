"""What Triton's interpreter lacks: for tests of the kernels where there is no GPU, with TRITON_INTERPRET=1.

In Triton 3.5 and 3.6 it cuts off where a card rounds to bfloat16, computes with the bits of bfloat16 in place of its
numbers, makes loops' bounds of arrays, which numpy does not take from 2.4 on, and has no PTX: of that it gets what the
kernels use, one instruction at a time on blocks of 32 bits. It multiplies tiles of any size and dtypes: as the compiler
for a card does, it now refuses those that are too narrow for the matrix unit, and grids that a card does not have.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter

MOST_PROGRAMS = 65535  # in the second and third dimension of a grid
TORCH_DTYPES = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}  # which numpy does not have


def repair() -> None:
    """Make the interpreter compute what a card does; once in a process, any number of times is no harm."""
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_fp_to_fp = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.binary_op = _binary
    interpreter.InterpreterBuilder.create_inline_asm = _inline_asm
    interpreter.InterpreterBuilder.set_grid_dim = _set_grid
    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = _least_dot
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._get_np_dtype = _np_dtype
    if not hasattr(interpreter, "_LangPatchScope"):  # which undoes it after each call, from Triton 3.6 on
        interpreter._patch_lang = _patch_once


def _cast(self: Any, source: Any, dtype: Any, rounding: Any = None) -> Any:
    """A block of numbers in another dtype, rounded to nearest; integers are cut off, as on a card."""
    kind, numbers = dtype.scalar, _numbers(source)
    if kind in TORCH_DTYPES:
        encoded = torch.from_numpy(numbers.astype(numpy.float32)).to(TORCH_DTYPES[kind])
        bits = encoded.view(torch.uint8 if kind == tl.float8e4nv else torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(kind)), kind)
    return interpreter.TensorHandle(numbers.astype(interpreter._get_np_dtype(kind)), kind)


def _set_grid(self: Any, *sizes: int) -> None:
    """Of a launch, within a card's limits."""
    assert sizes[0] < 2**31 and max(sizes[1:]) <= MOST_PROGRAMS, f"a card has no grid {sizes}"
    self.grid_dim = sizes


def _least_dot(left: Any, right: Any) -> tuple[int, int, int]:
    """Rows, columns and inputs that a product of tiles has at least, as Triton's compiler for NVIDIA has it."""
    bits = left.scalar.primitive_bitwidth
    assert bits == right.scalar.primitive_bitwidth, f"a product of {left} and {right}: both must have as many bits"
    return (1, 1, 32 if bits == 8 else 16)


def _dot(self: Any, a: Any, b: Any, sum: Any, precision: Any, most_imprecise: Any) -> Any:
    product = numpy.matmul(_numbers(a), _numbers(b), dtype=sum.data.dtype)
    return interpreter.TensorHandle(product + sum.data, sum.dtype.scalar)


def _binary(self: Any, left: Any, right: Any, operation: Any) -> Any:
    kind = left.dtype.scalar
    if kind not in TORCH_DTYPES:
        return interpreter.TensorHandle(_as(kind, operation(left.data, right.data)), kind)
    result = operation(_numbers(left), _numbers(right))
    return _cast(self, interpreter.TensorHandle(result, tl.float32), kind)


def _inline_asm(self: Any, ptx: str, _constraints: str, blocks: Any, _types: Any, _is_pure: bool, _pack: int) -> Any:
    opcode, _, rest = ptx.rstrip(";").partition(" ")
    operands = [one.strip() for one in rest.split(",")][1:]
    words = [blocks[int(one[1:]) - 1].data if one[0] == "$" else numpy.uint32(int(one, 16)) for one in operands]
    with numpy.errstate(all="ignore"):  # a card warns of nothing
        result = PTX[opcode](*words)
    return _Results([interpreter.TensorHandle(result, tl.float32 if result.dtype == numpy.float32 else tl.uint32)])


class _Results(list[Any]):
    """What an operation with several results gives."""

    def get_result(self, index: int) -> Any:
        """One of them."""
        return self[index]


def _lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    """Bit `4 a + 2 b + c` of the table, for each bit of three words."""
    result = numpy.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _fma(dtype: torch.dtype) -> Any:
    def of_words(*words: Any) -> Any:
        a, b, c = (torch.from_numpy(numpy.array(one)).view(torch.int32).view(dtype).float() for one in words)
        return (a * b + c).to(dtype).view(torch.int32).view(torch.uint32).numpy()

    return of_words


PTX = {
    "lop3.b32": _lop3,
    "div.rn.f32": numpy.divide,
    "fma.rn.bf16x2": _fma(torch.bfloat16),
    "fma.rn.f16x2": _fma(torch.float16),
}


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


_dtype_upstream = functools.cache(interpreter._get_np_dtype)
_patch_lang_upstream = interpreter._patch_lang
_patch_upstream = interpreter._patch_lang_tensor
_patched: set[int] = set()  # ids of the globals of modules whose functions were called


def _np_dtype(kind: Any) -> Any:
    """Upstream makes its table anew in each operation."""
    kind = kind.scalar
    return numpy.dtype(numpy.uint64) if kind.is_ptr() else _dtype_upstream(kind)


def _patch_once(function: Any) -> None:
    """Upstream looks for what to patch in each call of each function, a kernel's own ones too."""
    if id(function.__globals__) not in _patched:
        _patch_lang_upstream(function)
        _patched.add(id(function.__globals__))


def _patch_tensor(tensor: Any, *scope: Any) -> None:  # which Triton 3.6 adds
    _patch_upstream(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()
