"""The launches of `matmul_kernel` and `persistent_matmul_kernel`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.launch import DTYPES, require
from torchinfer.kernels.cuda.library_matmul import has_library, library_matmul
from torchinfer.kernels.cuda.matmul_kernel import matmul_kernel, sum_splits_kernel
from torchinfer.kernels.cuda.matrix import RUN, Matrix
from torchinfer.kernels.cuda.persistent_kernel import persistent_matmul_kernel
from torchinfer.kernels.cuda.quantize_rows import quantize_rows
from torchinfer.kernels.cuda.tiles import Product, Tiles, choose_tiles, num_processors
from torchinfer.kernels.cuda.tuned_table import Key, Tuned, load_table

SUM_BLOCK = 512  # results of a program that adds splits


def multiply(
    x: Tensor,  # [N, I]
    matrix: Matrix,  # [O, I], or [E, O, I] with group_sizes
    group_sizes: Tensor | None,  # int32 [E]
    input_scale: Tensor | None = None,  # float32, [1] or [N]: given beforehand, where inputs are rounded
    activation: str = "none",  # silu, gelu, gelu_tanh: of the first half of the outputs, times the second
) -> Tensor:
    """x's rows times the transposed matrix, or each times its group's: [N, O], or [N, O / 2], in x's dtype.

    Raises:
        ValueError: tensors do not fit together.
    """
    if matrix.activations == "none":
        return multiply_rows(x, None, matrix, group_sizes, x.dtype, activation)
    _require_fit(x, matrix, group_sizes)  # before rows are rounded
    rounded, row_scale = quantize_rows(x, matrix.rounded, input_scale, matrix.input_group)
    return multiply_rows(rounded, row_scale, matrix, group_sizes, x.dtype, activation)


def multiply_rows(
    x: Tensor,  # [N, I], as it is multiplied
    row_scale: Tensor | None,  # float32, of rows in 8 bits: `Matrix.row_scale_shape`
    matrix: Matrix,  # [O, I], or [E, O, I] with group_sizes
    group_sizes: Tensor | None,  # int32 [E]
    dtype: torch.dtype,  # of the result
    activation: str = "none",
    tiles: Tiles | None = None,  # in place of the table's or the rule's
) -> Tensor:
    """`multiply` of rows that were rounded before, where the matrix asks for that."""
    _require_fit(x, matrix, group_sizes)
    if row_scale is not None:
        shape = matrix.row_scale_shape(len(x))
        require(row_scale.shape == shape and row_scale.is_contiguous(), f"rows have scales {list(shape)}", row_scale, x)
    num_rows, num_outputs = len(x), matrix.values.shape[-2]
    num_results = num_outputs if activation == "none" else num_outputs // 2
    result = torch.empty(num_rows, num_results, dtype=dtype, device=x.device)
    if not num_rows:
        return result
    if tiles is None:
        product = product_of(x, matrix)
        tuned = tuned_for(product, x.device, load_table())
        if row_scale is not None and activation == "none" and is_library_s(tuned, num_rows, matrix, dtype):
            return library_matmul(x, row_scale, matrix)
        tiles = _choose(product, x, tuned)
    if tiles.splits == 1:
        _launch(x, row_scale, matrix, group_sizes, tiles, result, activation)
        return result
    partial = torch.empty(tiles.splits, num_rows, num_outputs, device=x.device)
    _launch(x, row_scale, matrix, group_sizes, tiles, partial, "none")
    sum_splits_kernel[(num_rows, triton.cdiv(num_results, SUM_BLOCK))](
        partial, result, num_rows, num_results, SPLITS=tiles.splits, ACTIVATION=activation, BLOCK=SUM_BLOCK
    )
    return result


def tiles_for(x: Tensor, matrix: Matrix, table: dict[Key, Tuned]) -> Tiles:
    """What `multiply_rows` launches, where the product is not the library's."""
    product = product_of(x, matrix)
    return _choose(product, x, tuned_for(product, x.device, table))


def _choose(product: Product, x: Tensor, tuned: Tuned | None) -> Tiles:
    return choose_tiles(product, triton.cdiv(len(x), product.num_matrices), num_processors(x.device), tuned)


def is_library_s(tuned: Tuned | None, num_rows: int, matrix: Matrix, dtype: torch.dtype) -> bool:
    """Whether torch's own product was measured to be the faster one for so many rows."""
    return tuned is not None and 0 < tuned.library_rows <= num_rows and has_library(matrix, dtype)


def tuned_for(product: Product, device: torch.device, table: dict[Key, Tuned]) -> Tuned | None:
    """What was measured on this card for this matrix, and rows of 8 or 16 bits."""
    key = device_name(device), product.format, product.num_outputs, product.num_inputs, product.num_matrices
    return table.get(key) if product.element_bytes <= 2 else None


def product_of(x: Tensor, matrix: Matrix) -> Product:
    """What tiles depend on. x: [N, I], as it is multiplied."""
    num_matrices = len(matrix.values) if matrix.values.ndim == 3 else 1
    shape = matrix.values.shape[-2], matrix.num_inputs, num_matrices
    return Product(matrix.format, *shape, x.element_size(), matrix.group, matrix.is_nibbles)


@functools.cache
def device_name(device: torch.device) -> str:
    """The card's, as the table has it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _launch(
    x: Tensor,  # [N, I]
    row_scale: Tensor | None,  # [N] or [G, N]
    matrix: Matrix,
    group_sizes: Tensor | None,
    tiles: Tiles,
    result: Tensor,  # [N, O], [N, O / 2] or [splits, N, O], written
    activation: str,
) -> None:
    num_rows, num_outputs, num_results = len(x), matrix.values.shape[-2], result.shape[-1]
    num_row_blocks = triton.cdiv(num_rows, tiles.rows)
    if group_sizes is not None:  # a block of each may be cut, and so may that of the rows in none
        num_row_blocks = num_rows // tiles.rows + min(len(group_sizes) + 1, num_rows)
    num_tiles = num_row_blocks * triton.cdiv(num_results, tiles.outputs * num_results // num_outputs)
    arguments = {
        "x": x,
        "row_scale": row_scale,
        "result": result,
        "num_rows": num_rows,
        "num_row_blocks": num_row_blocks,
        "stride": x.stride(0),
        "HAS_ROW_SCALE": row_scale is not None,
        "HAS_ROW_GROUPS": row_scale is not None and matrix.input_group > 0,
        "IS_ONE_SCALE": activation == "none" and matrix.row_block % tiles.outputs == 0,
        "SUM": tl.int32 if x.dtype == torch.int8 else tl.float32,
        **_of_matrix(matrix, tiles),
    }
    if tiles.per_processor and group_sizes is None and activation == "none" and tiles.splits == 1:
        num_programs = min(num_tiles, tiles.per_processor * num_processors(x.device))
        persistent_matmul_kernel[(num_programs,)](**arguments)
        return
    matmul_kernel[(num_tiles, tiles.splits)](
        **arguments, **_of_groups(group_sizes), ACTIVATION=activation, IS_SPLIT=tiles.splits > 1
    )


def _of_groups(group_sizes: Tensor | None) -> dict[str, Any]:
    """Arguments of the launch that follow from the groups."""
    num_groups = 0 if group_sizes is None else len(group_sizes)
    block = triton.next_power_of_2(num_groups + 1)
    return {"group_sizes": group_sizes, "NUM_GROUPS": num_groups, "BLOCK_GROUPS": block}


def _of_matrix(matrix: Matrix, tiles: Tiles) -> dict[str, Any]:
    """Arguments of the launch that follow from the matrix and its tiles."""
    num_inputs = matrix.num_inputs
    return {
        "values": matrix.values.view(torch.int32) if matrix.parts == 4 else matrix.values,
        "scale": matrix.scale,
        "zero": matrix.zero,
        "num_outputs": matrix.values.shape[-2],
        "num_inputs": num_inputs,
        "num_scale_rows": 1 if matrix.scale is None else matrix.scale.shape[-2],
        "num_columns": 1 if matrix.scale is None else matrix.scale.shape[-1],
        "ROW_BLOCK": matrix.row_block,
        "COLUMN_BLOCK": matrix.group,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_OUTPUTS": tiles.outputs,
        "BLOCK_INPUTS": tiles.inputs,
        "HAS_SCALE": matrix.scale is not None,
        "HAS_ZERO": matrix.zero is not None,
        "PARTS": matrix.parts,
        "RUN": RUN if matrix.is_packed else 1,
        "IS_EVEN": num_inputs % tiles.inputs == 0,
        "ROWS_LAST": tiles.rows_last,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _require_fit(x: Tensor, matrix: Matrix, group_sizes: Tensor | None) -> None:
    values = matrix.values
    rule = f"a product takes x [N, {matrix.num_inputs}], dense rows, and a contiguous [O, I], or groups' [E, O, I]"
    is_fit = x.ndim == 2 and x.shape[1] == matrix.num_inputs and x.stride(1) == 1 and x.device == values.device
    is_fit = is_fit and (x.dtype in DTYPES or x.dtype == values.dtype)
    is_fit = is_fit and values.is_contiguous() and values.ndim == (2 if group_sizes is None else 3)
    require(is_fit, rule, x, values)
    if group_sizes is not None:
        is_fit = group_sizes.shape == values.shape[:1] and group_sizes.dtype == torch.int32
        require(is_fit, "groups have a size [E] int32 each", group_sizes, values)
