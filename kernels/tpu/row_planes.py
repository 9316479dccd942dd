"""Rows of inputs as the matrix unit takes them beside a matrix in words: in a kernel, or by XLA's operations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from torchinfer.kernels.tpu.attention_chunk import E4M3_SHIFT, LARGEST
from torchinfer.kernels.tpu.matmul_plan import MatmulConfig
from torchinfer.kernels.tpu.page_layout import LANES

SPLIT_ROWS = 32  # at once: a tile of the registers for int8
Ref = Any  # a memory reference of Pallas


def as_operands(x: Array, input_scale: Array | None, config: MatmulConfig) -> tuple[Array, Array]:
    """[tiles, planes * rows, I] int8 or bfloat16, and float32 [rows of tiles, 128], what sums are multiples of."""
    missing = (0, config.num_tiles * config.tile_rows - x.shape[0])
    numbers = jnp.pad(x, (missing, (0, config.num_inputs - x.shape[1])))
    if config.is_split:
        planes, unit = jax.vmap(integer_planes)(numbers.reshape(config.num_tiles, config.tile_rows, -1))
        return planes.astype(jnp.int8), jnp.broadcast_to(unit.reshape(-1, 1), (numbers.shape[0], LANES))
    unit = jnp.ones(x.shape[0]) if input_scale is None else input_scale
    unit = jnp.broadcast_to(jnp.pad(unit, missing)[:, None], (numbers.shape[0], LANES))
    if config.is_integer:
        return numbers.reshape(config.num_tiles, config.tile_rows, config.num_inputs), unit
    factor = E4M3_SHIFT if config.name == "float8_e4m3fn" else 1.0
    numbers = numbers.astype(jnp.float32).reshape(config.num_tiles, -1, config.num_inputs) * factor
    parts = [numbers.astype(jnp.bfloat16)]
    if config.planes == 2:
        parts.append((numbers - parts[0].astype(jnp.float32)).astype(jnp.bfloat16))
    return jnp.concatenate(parts, 1), unit


def split_tile(x: Ref, planes: Ref, unit: Ref, tile: Array, is_wanted: Array, config: MatmulConfig) -> None:
    """In a kernel, if it is wanted: rows x [rows, I] as integers of 15 bits in two planes of int8, one below the other
    in planes [tiles, 2 * rows, I], and in unit [tiles, rows, 128] float32 what they are multiples of."""
    rows = min(config.tile_rows, SPLIT_ROWS)

    def one(part: Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(part * rows, rows), rows)
        whole, of_row = integer_planes(x[here])
        unit[tile, here] = jnp.broadcast_to(of_row, (rows, LANES))
        if rows == config.tile_rows:
            planes[tile] = whole.astype(jnp.int8)
            return
        high, low = jnp.split(whole.astype(jnp.int8), 2)
        planes[tile, here] = high
        planes[tile, pl.ds(pl.multiple_of(config.tile_rows + part * rows, rows), rows)] = low

    # A loop in any case, whose rounds are few: what else a step of the grid takes can be counted without it.
    jax.lax.fori_loop(0, jnp.where(is_wanted, config.tile_rows // rows, 0), one, None)


def integer_planes(rows: Array) -> tuple[Array, Array]:
    """[rows, I] -> whole numbers [2 * rows, I] of 8 bits, the high plane, then the low one, and units [rows, 1]."""
    rows = rows.astype(jnp.float32)
    unit = jnp.maximum(jnp.max(jnp.abs(rows), 1, keepdims=True), 1e-30) * (1 / LARGEST)
    whole = jnp.floor(rows / unit + 0.5).astype(jnp.int32)
    high = (whole + 64) >> 7
    return jnp.concatenate((high, whole - high * 128)), unit
