"""Matrices in the layout that the CPU library streams (src/packed.h), made once after they were loaded.

Letters: E experts, O outputs, I inputs, G groups of inputs with a scale of their own.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.cpu.library import check, loaded, require

if TYPE_CHECKING:
    from torchinfer.quantized_weight import QuantizedWeight

BLOCK = 64  # outputs of a block, kBlock
ALIGNMENT = 64  # bytes, of a block
MOST_INPUTS = 65536  # kMostInputs
GROUP_MULTIPLE = 16
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3, torch.float8_e4m3fn: 4}
PLAIN = (torch.float32, torch.bfloat16)
ACTIVATIONS = {"none": 0, "int8": 1, "fp8": 2}


class PackedStruct(ctypes.Structure):
    """PackedWeight of src/packed.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("activations", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix, or those of experts, ready for the library; `struct` points into the tensors."""

    shape: tuple[int, ...]  # [O, I] or [E, O, I]
    dtype: torch.dtype | None  # of the inputs, where the matrix was not quantized; None: any
    values: Tensor  # uint8
    scale: Tensor | None  # float32 [E, blocks, G, 64]
    zero: Tensor | None  # uint8 [E, blocks, G, 64]
    input_scale: Tensor | None  # float32 [1]
    struct: PackedStruct = field(repr=False)

    def numel(self) -> int:
        """Numbers that the matrix stands for."""
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take."""
        tensors = (self.values, self.scale, self.zero)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def can_prepare(weight: Tensor | QuantizedWeight) -> bool:
    """Whether the library has a kernel for the matrix; float16 has none, nor do groups in another order."""
    if isinstance(weight, Tensor):
        values, columns, group = weight, weight.shape[-1], weight.shape[-1]
        is_known = weight.dtype in PLAIN
    else:
        values, columns = weight.values, _num_columns(weight)
        group = min(weight.column_block, columns)
        is_known = values.dtype in FORMATS and values.dtype not in PLAIN
        is_known &= weight.group_index is None and weight.activations in ACTIVATIONS
        is_known &= weight.zero is None or values.dtype == torch.uint8
        is_known &= weight.input_scale is None or (weight.input_scale.shape[-1] == 1 and values.ndim == 2)
        # With a scale that was given beforehand, an input may become -128, which the library does not have.
        is_known &= weight.input_scale is None or weight.activations != "int8"
        is_known &= weight.activations == "none" or _is_rounded_alike(weight)
    is_known &= values.ndim in (2, 3) and values.numel() > 0
    return is_known and columns <= MOST_INPUTS and (group >= columns or group % GROUP_MULTIPLE == 0)


def _num_columns(weight: QuantizedWeight) -> int:
    return weight.values.shape[-1] * (2 if weight.values.dtype == torch.uint8 else 1)


def _is_rounded_alike(weight: QuantizedWeight) -> bool:
    """Integers times integers, or e4m3fn times e4m3fn."""
    return weight.activations == ("fp8" if weight.values.dtype == torch.float8_e4m3fn else "int8")


def prepare(weight: Tensor | QuantizedWeight, may_overwrite: bool = False) -> PackedWeight | None:
    """See the door.

    Raises:
        ValueError: the matrix, its scales or zeros are not of the shapes and dtypes of `QuantizedWeight`, or not on the
            CPU.
    """
    if not can_prepare(weight):
        return None
    if isinstance(weight, Tensor):
        require(weight.is_cpu, "a matrix is in the CPU's memory", weight)
        struct = _struct(weight, weight.shape[-1], weight.shape[-1])
        values = _pack(struct, weight, may_overwrite)
        return _packed(weight.shape, weight.dtype, values, None, None, None, struct)
    _require_tables(weight)
    columns = _num_columns(weight)
    struct = _struct(weight.values, columns, min(weight.column_block, columns), ACTIVATIONS[weight.activations])
    values = _pack(struct, weight.values, may_overwrite)
    num_rows = weight.values.shape[-2]
    scale = _by_block(weight.scale.repeat_interleave(weight.row_block, -2)[..., :num_rows, :])
    zero = None if weight.zero is None else _by_block(weight.zero)
    shape = (*weight.values.shape[:-1], columns)
    return _packed(shape, None, values, scale, zero, weight.input_scale, struct)


def _require_tables(weight: QuantizedWeight) -> None:
    """Refuse tables of which the library would read another part than it should."""
    values, scale, zero, input_scale = weight.values, weight.scale, weight.zero, weight.input_scale
    require(weight.row_block > 0 and weight.column_block > 0, "a block has rows and columns", values)
    num_groups = -(-_num_columns(weight) // weight.column_block)
    *experts, num_rows, _ = values.shape
    shape = (*experts, -(-num_rows // weight.row_block), num_groups)
    is_fit = values.is_cpu and scale.is_cpu and scale.dtype == torch.float32 and scale.shape == shape
    require(is_fit, f"scales are float32 {list(shape)}", scale, values)
    if zero is not None:
        shape = (*experts, num_rows, num_groups)
        is_fit = zero.is_cpu and zero.dtype == torch.uint8 and zero.shape == shape
        require(is_fit, f"zeros are uint8 {list(shape)}", zero, values)
    if input_scale is not None:
        is_fit = input_scale.is_cpu and input_scale.dtype == torch.float32 and input_scale.shape == (1,)
        require(is_fit, "the scale of inputs is float32 [1]", input_scale, values)


def _struct(values: Tensor, columns: int, group: int, activations: int = 0) -> PackedStruct:
    num_experts = values.shape[0] if values.ndim == 3 else 1
    sizes = {"num_experts": num_experts, "outputs": values.shape[-2], "inputs": columns, "group": group}
    return PackedStruct(**sizes, format=FORMATS[values.dtype], activations=activations)


def _packed(
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    input_scale: Tensor | None,
    struct: PackedStruct,
) -> PackedWeight:
    struct.values = values.data_ptr()
    for name, tensor in (("scale", scale), ("zero", zero), ("input_scale", input_scale)):
        setattr(struct, name, None if tensor is None else tensor.data_ptr())
    return PackedWeight(tuple(shape), dtype, values, scale, zero, input_scale, struct)


def _pack(struct: PackedStruct, rows: Tensor, may_overwrite: bool) -> Tensor:
    """Packed values, uint8; in the memory of `rows` where they fit and it may be overwritten."""
    library, pointer = loaded(), ctypes.addressof(struct)
    expert_bytes = library.torchinfer_cpu_packed_bytes(pointer)
    assert expert_bytes > 0, "can_prepare() lets nothing else through"
    rows = rows.contiguous().view(struct.num_experts, *rows.shape[-2:])
    own = rows.reshape(-1).view(torch.uint8)
    num_bytes = expert_bytes * struct.num_experts
    fits = rows.shape[1] % BLOCK == 0 and own.numel() == num_bytes and own.data_ptr() % ALIGNMENT == 0
    target = own if fits and may_overwrite else _aligned(num_bytes)
    for expert in range(struct.num_experts):
        place = target[expert * expert_bytes : (expert + 1) * expert_bytes]
        check(library.torchinfer_cpu_pack(pointer, rows[expert].data_ptr(), place.data_ptr()))
    return target


def _aligned(num_bytes: int) -> Tensor:
    memory = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + num_bytes]


def _by_block(table: Tensor) -> Tensor:
    """[O, G] or [E, O, G] -> [E, blocks, G, 64], zeros in the padding."""
    table = table.view(-1, *table.shape[-2:])
    num_experts, num_rows, num_groups = table.shape
    padded = functional.pad(table, (0, 0, 0, -num_rows % BLOCK))
    return padded.view(num_experts, -1, BLOCK, num_groups).transpose(2, 3).contiguous()
