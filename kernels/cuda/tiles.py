"""Sizes of the tiles of `matmul_kernel`: what was measured on this card for this matrix, else a rule.

The rule is made from what the compiler says of registers, shared memory and instructions on Hopper: few rows take tiles
of all rows and few outputs, and split the inputs where outputs are few, so that many programs read the matrix at once;
many rows take square tiles. The table may have these computed by fewer programs that walk over them.

Up to 64 rows the steps of a sum are the same whatever the number of rows, so that others do not change a row: 128
inputs (or a group), added in the same spans. Neither the rule nor the table can say otherwise: rows choose the block of
outputs, warps and loads ahead; splits are the matrix's. Only the instruction that adds within a step may differ: Hopper
has one that four warps issue together, which tiles of 32 (4 bits) or 64 rows take.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

from torchinfer.kernels.cuda.tuned_table import Tuned

NUM_PROCESSORS = 132  # of an H100 or H200, for which kernels are compiled where there is no card
LEAST_SPAN = 512  # inputs of a split; shorter ones would write sums that are read again
LEAST_MATRICES = 2  # experts of a token: so many have rows in any step


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of a program's block, its warps, and the steps that are loaded ahead."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    splits: int = 1  # spans of inputs, each another program's
    rows_last: bool = False  # whether the matrix unit takes the matrix, as it is read, from registers
    per_processor: int = 0  # programs of a multiprocessor that walk over tiles; 0: a program for each tile


@dataclass(frozen=True, slots=True)
class Product:
    """What rows are multiplied with, as far as tiles depend on it."""

    format: str  # see `Matrix.format`
    num_outputs: int
    num_inputs: int
    num_matrices: int  # experts, or 1
    element_bytes: int  # of what is multiplied
    group: int  # inputs that share a scale, 0: all
    is_nibbles: bool


def choose_tiles(product: Product, num_rows: int, num_processors: int, tuned: Tuned | None = None) -> Tiles:
    """Tiles for so many rows of each matrix: by the rule, and what the table has in place of it."""
    rows = min(max(triton.next_power_of_2(num_rows), 8), 128)
    tiles = _of_many_rows(product) if rows == 128 else _of_few_rows(product, rows, num_processors)
    if tuned is None:
        return tiles
    launch = tuned.launches.get(rows)
    if launch is not None:
        tiles = replace(tiles, outputs=launch.outputs, num_warps=launch.warps, num_stages=launch.stages)
        tiles = replace(tiles, per_processor=launch.per_processor)
    return tiles if rows == 128 else replace(tiles, splits=tuned.splits)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else NUM_PROCESSORS


def _of_many_rows(product: Product) -> Tiles:
    # Numbers of 4 bits are up to four products of a step, and the matrix unit takes 16 inputs at least.
    inputs = min(max(128 // product.element_bytes, 64 if product.is_nibbles else 0), product.group or 128)
    return Tiles(128, 128, inputs, 8, 3, rows_last=product.is_nibbles)


def _of_few_rows(product: Product, rows: int, num_processors: int) -> Tiles:
    """1.5 programs for each processor, or as many as splits that are long enough make.

    Two warps do what four would do, with the instructions around it half as often, as long as products are few; those
    of 4 bits also take twice the outputs, where these are many.
    """
    num_programs, splits = triton.cdiv(product.num_outputs, 64) * min(product.num_matrices, LEAST_MATRICES), 1
    while 2 * num_programs * splits < 3 * num_processors and product.num_inputs >= 2 * splits * LEAST_SPAN:
        splits *= 2
    outputs = 64 if num_programs * splits >= num_processors else 32
    inputs = min(128, product.group or 128)
    if rows <= (16 if product.is_nibbles else 32):
        return Tiles(rows, outputs, inputs, 2, 4, splits, True)
    is_tall = product.is_nibbles and num_programs * splits >= 2 * num_processors
    return Tiles(rows, 128 if is_tall else outputs, inputs, 4, 3, splits, product.is_nibbles)
