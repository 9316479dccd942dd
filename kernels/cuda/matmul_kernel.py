"""Products with matrices in fewer bits, one matrix or a group's of many, from rows in their own dtype or in 8 bits.

    element [o, i]  =  (values[o, i] - zero[o, g]) * scale[o // row_block, g],    g = i // column_block

Integers and e4m3 become numbers of the rows' dtype in registers, exactly, less their zeros. A scale of a group of
inputs multiplies the sums of that group, one of a whole output multiplies the result. Rows in e4m3 may have a scale for
each group, too: the sums of a step are multiplied by both, and added in float32 (arXiv 2412.19437, section 3.3).

Numbers of 4 bits are two or four products of a step: of the first numbers of bytes or of 16 bits with the inputs that
belong to them, and so on; these are every second or fourth, or runs of 16 where the matrix was packed for it.

A tile is outputs times rows where the matrix unit takes the matrix from registers, else rows times outputs.

Where the outputs make too few programs, the inputs are split too: each program sums a span of them and writes scaled
sums in float32; a second kernel adds the spans, the first one first, so that a result has the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchinfer.kernels.cuda.gated_activation import gated
from torchinfer.kernels.cuda.nibbles import nibbles

SWIZZLE: tl.constexpr = tl.constexpr(8)  # blocks of rows that go through the outputs together, for the second cache


@triton.jit
def group_of(
    block: tl.tensor,
    group_sizes: tl.tensor,  # [E] int32
    num_rows: tl.tensor,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,  # above NUM_GROUPS
    BLOCK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The group of a block of rows, and its rows from the block's first on; rows past the sum are group NUM_GROUPS.

    A block that is beyond all rows gets start = end.
    """
    index = tl.arange(0, BLOCK_GROUPS)
    sizes = tl.load(group_sizes + index, mask=index < NUM_GROUPS, other=0)
    sizes = tl.where(index == NUM_GROUPS, num_rows - tl.sum(sizes, 0), sizes)
    blocks = (sizes + BLOCK_ROWS - 1) // BLOCK_ROWS
    group = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    first_row = tl.sum(tl.where(index < group, sizes, 0), 0)
    first_block = tl.sum(tl.where(index < group, blocks, 0), 0)
    end = first_row + tl.sum(tl.where(index == group, sizes, 0), 0)
    return group, tl.minimum(first_row + (block - first_block) * BLOCK_ROWS, end), end


@triton.jit
def multiply_add(
    b: tl.tensor,  # [O, K]
    a: tl.tensor,  # [K, R]
    total: tl.tensor,  # [O, R] with ROWS_LAST, else [R, O]
    ROWS_LAST: tl.constexpr,
) -> tl.tensor:
    """total + b a, or its transpose."""
    # Hopper sums e4m3 in fewer bits than float32 has: once a step, sums go into registers.
    MOST: tl.constexpr = b.shape[1] if b.dtype.is_fp8() else None
    left, right = b, a
    if not ROWS_LAST:
        left, right = tl.trans(a), tl.trans(b)
    return tl.dot(left, right, total, input_precision="tf32x3", max_num_imprecise_acc=MOST, out_dtype=total.dtype)


@triton.jit
def place_of_tile(
    tile: tl.tensor,
    num_row_blocks: tl.tensor,
    num_results: tl.tensor,
    WIDTH: tl.constexpr,  # results of a tile
) -> tuple[tl.tensor, tl.tensor]:
    """The block of rows of a tile, and its first result; tiles that follow each other share rows or results."""
    in_swizzle = SWIZZLE * tl.cdiv(num_results, WIDTH)
    first_block = tile // in_swizzle * SWIZZLE
    height = tl.minimum(num_row_blocks - first_block, SWIZZLE)
    return first_block + tile % in_swizzle % height, tile % in_swizzle // height * WIDTH


@triton.jit(do_not_specialize=["num_rows", "num_row_blocks"])
def matmul_kernel(
    x: tl.tensor,  # [N, I], rows `stride` apart; rounded where HAS_ROW_SCALE
    values: tl.tensor,  # [E, O, I]; of 4 bits uint8 [E, O, I / 2] or int32 [E, O, I / 8]
    scale: tl.tensor,  # [E, S, G] float32, where HAS_SCALE
    zero: tl.tensor,  # [E, O, G], where HAS_ZERO
    row_scale: tl.tensor,  # [N] float32, where HAS_ROW_SCALE; [G, N] where HAS_ROW_GROUPS
    group_sizes: tl.tensor,  # [E] int32, where NUM_GROUPS
    result: tl.tensor,  # [N, O]; [N, O / 2] with ACTIVATION; float32 [spans, N, O] where IS_SPLIT
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    num_scale_rows: tl.tensor,  # S
    num_columns: tl.tensor,  # G
    num_row_blocks: tl.tensor,
    stride: tl.tensor,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,  # 0: G is 1
    NUM_GROUPS: tl.constexpr,  # 0: one matrix for all rows
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_ROW_GROUPS: tl.constexpr,  # then HAS_ROW_SCALE, too
    IS_ONE_SCALE: tl.constexpr,  # whether the outputs of a program share the scale of a group
    PARTS: tl.constexpr,  # products of a step: 2 for bytes of 4 bits, 4 for words of them, else 1
    RUN: tl.constexpr,  # inputs of a part that lie side by side; those of the next part follow
    IS_EVEN: tl.constexpr,  # I is a multiple of BLOCK_INPUTS
    SUM: tl.constexpr,  # dtype of the sums
    ACTIVATION: tl.constexpr,  # of the first half of the outputs, which then multiplies the second; or none
    ROWS_LAST: tl.constexpr,  # tiles are outputs times rows
    IS_SPLIT: tl.constexpr,  # whether each of the spans of inputs is another program's; then without ACTIVATION
) -> None:
    """A program computes BLOCK_ROWS x BLOCK_OUTPUTS products. With ACTIVATION half of them are outputs of the gate and
    half the same ones of up, and two become one result."""
    tl.static_assert(not IS_SPLIT or ACTIVATION == "none")
    WIDTH: tl.constexpr = BLOCK_OUTPUTS // (2 if ACTIVATION != "none" else 1)  # results of a block
    num_results = num_outputs // (2 if ACTIVATION != "none" else 1)
    block, first_result = place_of_tile(tl.program_id(0), num_row_blocks, num_results, WIDTH)
    in_block = tl.arange(0, BLOCK_OUTPUTS)
    output = first_result + in_block % WIDTH + in_block // WIDTH * num_results
    group, start, end = tl.cast(0, tl.int32), block * BLOCK_ROWS, num_rows
    if NUM_GROUPS > 0:
        group, start, end = group_of(block, group_sizes, num_rows, NUM_GROUPS, BLOCK_GROUPS, BLOCK_ROWS)
        if start >= end:
            return
    row = start + tl.arange(0, BLOCK_ROWS)
    is_row, is_output = row < end, first_result + in_block % WIDTH < num_results
    column_of_result = first_result + tl.arange(0, WIDTH)
    is_result = is_row[:, None] & (column_of_result < num_results)[None, :]
    split = tl.program_id(1).to(tl.int64)
    target = result + (split * num_rows + row)[:, None] * num_results + column_of_result[None, :]
    if NUM_GROUPS > 0:
        if group == NUM_GROUPS:
            tl.store(target, tl.zeros((BLOCK_ROWS, WIDTH), result.dtype.element_ty), mask=is_result)
            return
    start_input, end_input = 0, num_inputs
    if IS_SPLIT:
        span = tl.cdiv(tl.cdiv(num_inputs, BLOCK_INPUTS), tl.num_programs(1)) * BLOCK_INPUTS
        start_input = tl.program_id(1) * span
        end_input = tl.minimum(start_input + span, num_inputs)
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
        group,
        row,
        is_row,
        first_result,
        output,
        is_output,
        start_input,
        end_input,
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
    if ACTIVATION != "none":
        halves = tl.permute(tl.reshape(product.to(result.dtype.element_ty), (BLOCK_ROWS, 2, WIDTH)), (0, 2, 1))
        gate, up = tl.split(halves)
        product = gated(gate, up, ACTIVATION, result.dtype.element_ty)
    tl.store(target, product.to(result.dtype.element_ty), mask=is_result)


@triton.jit
def scaled_products(
    x: tl.tensor,  # as those of `matmul_kernel`, down to `stride`
    values: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    row_scale: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    num_inputs: tl.tensor,
    num_scale_rows: tl.tensor,
    num_columns: tl.tensor,
    stride: tl.tensor,
    group: tl.tensor,  # whose matrix it is
    row: tl.tensor,  # [BLOCK_ROWS]
    is_row: tl.tensor,  # [BLOCK_ROWS]
    first_output: tl.tensor,
    output: tl.tensor,  # [BLOCK_OUTPUTS]
    is_output: tl.tensor,  # [BLOCK_OUTPUTS]
    start_input: tl.tensor,
    end_input: tl.tensor,
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
) -> tl.tensor:  # [BLOCK_ROWS, BLOCK_OUTPUTS] float32
    """The products of a tile over a span of inputs, times all scales."""
    PART: tl.constexpr = BLOCK_INPUTS // PARTS
    NUMBERS: tl.constexpr = 8 if PARTS == 4 else PARTS  # in one of `values`
    in_row, packed = tl.arange(0, PART), tl.arange(0, BLOCK_INPUTS // NUMBERS)
    if PARTS > 1:
        in_row = in_row // RUN * (RUN * PARTS) + in_row % RUN
    # In rows of the whole E x O table; outputs past the last read row 0, so that no mask is needed.
    place = group.to(tl.int64) * num_outputs + tl.where(is_output, output, 0)
    numbers = values + place[:, None] * (num_inputs // NUMBERS) + start_input // NUMBERS + packed[None, :]
    inputs = x + tl.where(is_row, row, 0)[None, :].to(tl.int64) * stride + start_input + in_row[:, None]
    scale_place = group.to(tl.int64) * num_scale_rows + tl.where(is_output, output, 0) // ROW_BLOCK
    if COLUMN_BLOCK > 0:
        # Read a step ahead: the copies that hide the wait for numbers are not for what goes into registers.
        if IS_ONE_SCALE:
            scale_place = group.to(tl.int64) * num_scale_rows + first_output // ROW_BLOCK
        scale_at = scale + scale_place * num_columns
        column = tl.minimum(start_input, num_inputs - 1) // COLUMN_BLOCK  # there may be more splits than steps
        step_scale = tl.load(scale_at + column)
        if HAS_ROW_GROUPS:
            row_scale_at = row_scale + tl.where(is_row, row, 0)
            step_row_scale = tl.load(row_scale_at + column * num_rows)
    HEIGHT: tl.constexpr = BLOCK_OUTPUTS if ROWS_LAST else BLOCK_ROWS
    total = tl.zeros((HEIGHT, BLOCK_ROWS * BLOCK_OUTPUTS // HEIGHT), SUM)
    for first in range(start_input, end_input, BLOCK_INPUTS):
        is_input = first + in_row < num_inputs
        if IS_EVEN:
            b = tl.load(numbers)
        else:
            b = tl.load(numbers, mask=(first // NUMBERS + packed < num_inputs // NUMBERS)[None, :], other=0.0)
        column = first // COLUMN_BLOCK if COLUMN_BLOCK > 0 else 0
        if HAS_ZERO:
            offset = tl.load(zero + place * num_columns + column).to(tl.int16)[:, None]
        else:
            offset = tl.full((1, 1), 8 if PARTS > 1 else 0, tl.int16)
        if COLUMN_BLOCK > 0:
            following = tl.minimum(first + BLOCK_INPUTS, end_input - 1) // COLUMN_BLOCK
            next_scale = tl.load(scale_at + following)
            if HAS_ROW_GROUPS:
                next_row_scale = tl.load(row_scale_at + following * num_rows)
        if PARTS > 1 or COLUMN_BLOCK > 0:
            product = tl.zeros(total.shape, tl.float32)
            for part in tl.static_range(PARTS):
                if IS_EVEN:
                    a = tl.load(inputs + part * RUN)
                else:
                    a = tl.load(inputs + part * RUN, mask=is_input[:, None], other=0.0)
                if PARTS > 1:
                    c = nibbles(b, part, offset, a.dtype)
                elif HAS_ZERO:
                    c = (b.to(tl.int16) - offset).to(a.dtype)
                else:
                    c = b.to(a.dtype)
                product = multiply_add(c, a, product, ROWS_LAST)
            if COLUMN_BLOCK > 0:
                factor = step_scale
                if not IS_ONE_SCALE:
                    factor = factor[:, None] if ROWS_LAST else factor[None, :]
                if HAS_ROW_GROUPS:
                    factor *= step_row_scale[None, :] if ROWS_LAST else step_row_scale[:, None]
                    step_row_scale = next_row_scale
                product *= factor
                step_scale = next_scale
            total += product
        else:
            if IS_EVEN:
                a = tl.load(inputs)
            else:
                a = tl.load(inputs, mask=is_input[:, None], other=0.0)
            if HAS_ZERO:
                b = (b.to(tl.int16) - offset).to(a.dtype)
            total = multiply_add(b.to(a.dtype), a, total, ROWS_LAST)
        inputs += BLOCK_INPUTS
        numbers += BLOCK_INPUTS // NUMBERS
    product = tl.trans(total.to(tl.float32)) if ROWS_LAST else total.to(tl.float32)
    if HAS_ROW_SCALE and not HAS_ROW_GROUPS:
        product *= tl.load(row_scale + row, mask=is_row, other=0.0)[:, None]
    if HAS_SCALE and COLUMN_BLOCK == 0:
        product *= tl.load(scale + scale_place)[None, :]
    return product


@triton.jit(do_not_specialize=["num_rows"])
def sum_splits_kernel(
    partial: tl.tensor,  # [SPLITS, N, O] float32
    result: tl.tensor,  # [N, O]; [N, O / 2] with ACTIVATION
    num_rows: tl.tensor,
    num_results: tl.tensor,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program adds the spans of BLOCK results of a row, and activates what `matmul_kernel` would have activated."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = column < num_results
    num_outputs = num_results * (2 if ACTIVATION != "none" else 1)
    product = sum_of_splits(partial + row * num_outputs + column, num_rows, num_outputs, is_there, SPLITS)
    if ACTIVATION != "none":
        up = sum_of_splits(partial + row * num_outputs + num_results + column, num_rows, num_outputs, is_there, SPLITS)
        product = gated(product, up, ACTIVATION, result.dtype.element_ty)
    tl.store(result + row * num_results + column, product.to(result.dtype.element_ty), mask=is_there)


@triton.jit
def sum_of_splits(
    place: tl.tensor,  # [BLOCK] pointers into the first split
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    is_there: tl.tensor,  # [BLOCK]
    SPLITS: tl.constexpr,
) -> tl.tensor:  # [BLOCK] float32
    """Always in the same order."""
    total = tl.load(place, mask=is_there, other=0.0)
    for _ in tl.static_range(SPLITS - 1):
        place += num_rows.to(tl.int64) * num_outputs
        total += tl.load(place, mask=is_there, other=0.0)
    return total
