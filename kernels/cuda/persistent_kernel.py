"""Products of many rows by programs that stay: each walks over tiles, and reads the next one's numbers while it writes.

The same tiles and steps as `matmul_kernel` has, and so the same bits; one matrix, whose inputs are not split.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchinfer.kernels.cuda.matmul_kernel import place_of_tile, scaled_products


@triton.jit(do_not_specialize=["num_rows", "num_row_blocks"])
def persistent_matmul_kernel(
    x: tl.tensor,  # as those of `matmul_kernel`
    values: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    row_scale: tl.tensor,
    result: tl.tensor,  # [N, O]
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    num_scale_rows: tl.tensor,
    num_columns: tl.tensor,
    num_row_blocks: tl.tensor,
    stride: tl.tensor,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_ROW_GROUPS: tl.constexpr,
    IS_ONE_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    IS_EVEN: tl.constexpr,
    SUM: tl.constexpr,
    ROWS_LAST: tl.constexpr,
) -> None:
    """A program computes every tile whose number is its own plus a multiple of the number of programs."""
    num_tiles = num_row_blocks * tl.cdiv(num_outputs, BLOCK_OUTPUTS)
    # Tiles and their steps become one loop, so that loads ahead reach into the next tile.
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        block, first_output = place_of_tile(tile, num_row_blocks, num_outputs, BLOCK_OUTPUTS)
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        output = first_output + tl.arange(0, BLOCK_OUTPUTS)
        product = scaled_products(
            x,
            values,
            scale,
            zero,
            row_scale,
            num_rows,
            num_outputs,
            num_inputs,
            num_scale_rows,
            num_columns,
            stride,
            tl.cast(0, tl.int32),
            row,
            row < num_rows,
            first_output,
            output,
            output < num_outputs,
            0,
            num_inputs,
            ROW_BLOCK,
            COLUMN_BLOCK,
            BLOCK_ROWS,
            BLOCK_OUTPUTS,
            BLOCK_INPUTS,
            HAS_SCALE,
            HAS_ZERO,
            HAS_ROW_SCALE,
            HAS_ROW_GROUPS,
            IS_ONE_SCALE,
            PARTS,
            RUN,
            IS_EVEN,
            SUM,
            ROWS_LAST,
        )
        target = result + row[:, None].to(tl.int64) * num_outputs + output[None, :]
        is_there = (row < num_rows)[:, None] & (output < num_outputs)[None, :]
        tl.store(target, product.to(result.dtype.element_ty), mask=is_there)
