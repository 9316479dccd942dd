"""Products with matrices that stream from memory in words, once, and become numbers in the kernel: dense or of experts.

A plain function of jax. int8 and int4 meet the matrix unit as int8: a row of inputs is rounded to 15 bits of its
largest number and split into two planes, x = 128 * high + low, which are rows of one product, so that a matrix is
pushed once, and sums are whole numbers, more exact than bfloat16's. e4m3 becomes bfloat16 by shifts and masks, since v5
converts 13 times slower. Scales meet sums.
Source: arXiv 2211.15841 (blocks of rows and experts), 2208.07339 (scales of outputs).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.attention_chunk import E4M3_REST, E4M3_SHIFT
from torchinfer.kernels.tpu.matmul_plan import (
    BEGIN,
    END,
    EXPERT,
    TILE,
    MatmulConfig,
    dense_visits,
    plan_visits,
)
from torchinfer.kernels.tpu.page_layout import LANES
from torchinfer.kernels.tpu.row_planes import as_operands, split_tile
from torchinfer.kernels.tpu.word_layout import NUMBERS_IN_WORD
from torchinfer.kernels.tpu.word_unpacking import NIBBLE_UNIT, numbers_of, unpack_words

UNITS = {"int4": NIBBLE_UNIT, "float8_e4m3fn": E4M3_REST}  # of what a product with the numbers in a kernel is
Ref = Any  # a memory reference of Pallas


def streamed_matmul(
    x: Array,
    words: Array,
    scale: Array,
    group_sizes: Array | None,
    input_scale: Array | None = None,
    shift: Array | None = None,
    *,
    config: MatmulConfig,
    has_kernel: bool = True,
    interpret: Any = False,
) -> Array:
    """x's rows, sorted by expert, times their experts' matrices; see the door's grouped_matmul.

    x: [N, I], float; or whole numbers in int8, or e4m3, with their `input_scale` [N] float32; words int32 [E, W, O]
    scale float32 [E, G, O] (see `word_layout`); group_sizes: [E] int32, sum at most N, None: one expert has all rows;
    shift: float32 [G, O], of one matrix without activation: subtracted from every number of a group, after its scale.
    Returns [N, outputs] of the config's dtype, zeros for rows of nobody. Without `has_kernel` by XLA's operations.
    """
    if has_kernel and config.num_rows > config.most_rows:
        return _in_parts(x, words, scale, group_sizes, input_scale, shift, config=config, interpret=interpret)
    if has_kernel:
        visits = dense_visits(config) if group_sizes is None else plan_visits(group_sizes, config)
        operands = (_padded(x, config),) if config.is_split else as_operands(x, input_scale, config)
        matrices = [words] * len(_offsets(config)) + [scale] * len(_offsets(config))
        out: Array = _call(config, x.dtype.itemsize, interpret)(visits, *operands, *matrices)
        if group_sizes is not None:
            out = jnp.where(jnp.arange(x.shape[0])[:, None] < group_sizes.sum(), out, 0)  # nobody's were not written
    else:
        out = _with_xla(group_sizes, *as_operands(x, input_scale, config), words, scale, config)
    if shift is not None:
        sums = _padded(x.astype(jnp.float32), config).reshape(x.shape[0], config.num_groups, -1).sum(2)
        out = out - jnp.dot(sums, shift, precision="highest")
    return out


def _padded(x: Array, config: MatmulConfig) -> Array:
    return jnp.pad(x, ((0, 0), (0, config.num_inputs - x.shape[1])))


def _in_parts(
    x: Array,
    words: Array,
    scale: Array,
    group_sizes: Array | None,
    input_scale: Array | None,
    shift: Array | None,
    *,
    config: MatmulConfig,
    interpret: Any,
) -> Array:
    """As many rows after the other as the chip's memory holds. A part has some of the experts, one has them all."""
    results = []
    for first in range(0, config.num_rows, config.most_rows):
        last = min(first + config.most_rows, config.num_rows)
        sizes, unit = group_sizes, None if input_scale is None else input_scale[first:last]
        if group_sizes is not None:
            ends = jnp.cumsum(group_sizes)
            sizes = jnp.clip(ends, first, last) - jnp.clip(ends - group_sizes, first, last)
        part = replace(config, num_rows=last - first)
        results.append(
            streamed_matmul(x[first:last], words, scale, sizes, unit, shift, config=part, interpret=interpret)
        )
    return jnp.concatenate(results)


@functools.lru_cache
def _call(config: MatmulConfig, input_bytes: int, interpret: Any) -> Any:
    size, width = config.tile_rows, config.block_outputs
    result = config.result_outputs if config.is_whole else width

    def of_expert(rows: int, offset: int) -> pl.BlockSpec:
        def at(core: Array, block: Array, visit: Array, visits: Ref) -> tuple[Array, int, Array]:
            column, visit = config.step(core, block, visit)
            return visits[EXPERT, visit], 0, column + offset

        return pl.BlockSpec((1, rows, width), at)

    def of_tile(core: Array, block: Array, visit: Array, visits: Ref) -> tuple[Array, int]:
        return visits[TILE, config.step(core, block, visit)[1]], 0

    def once(core: Array, block: Array, visit: Array, visits: Ref) -> tuple[Array, int]:
        return visits[TILE, jnp.where(block == 0, visit, config.num_visits - 1)], 0

    def of_result(core: Array, block: Array, visit: Array, visits: Ref) -> tuple[Array, Array]:
        column, visit = config.step(core, block, visit)
        return visits[TILE, visit], column

    shape = (config.num_tiles, config.planes * size, config.num_inputs)
    whole = pl.BlockSpec(shape, lambda *_: (0, 0, 0), pipeline_mode=pl.Buffered(1))
    rows = [pl.BlockSpec((size, config.num_inputs), once)]
    kept = [pltpu.VMEM(shape, jnp.int8), pltpu.VMEM((config.num_tiles, size, LANES), jnp.float32)]
    return pl.pallas_call(
        functools.partial(_kernel, config=config),
        out_shape=jax.ShapeDtypeStruct((config.num_rows, config.result_outputs), jnp.dtype(config.result_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(config.used_cores, config.core_blocks, config.num_visits),
            in_specs=[
                *(rows if config.is_split else [whole, pl.BlockSpec((size, LANES), of_tile)]),
                *[of_expert(config.num_words, offset) for offset in _offsets(config)],
                *[of_expert(config.num_groups, offset) for offset in _offsets(config)],
            ],
            out_specs=pl.BlockSpec((size, result), of_result),
            scratch_shapes=kept if config.is_split else [],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=config.vmem_bytes(input_bytes),
        ),
        cost_estimate=_cost(config, input_bytes),
        name="streamed_matmul",
        interpret=interpret,
    )


def _offsets(config: MatmulConfig) -> list[int]:
    """The first block of the matrix, or of gate and of up."""
    return [0] if config.activation is None or config.is_whole else [0, config.num_blocks]


def _cost(config: MatmulConfig, input_bytes: int) -> pl.CostEstimate:
    """Of a step that sees as many experts as it can."""
    num_experts = min(config.num_experts, config.num_rows)
    numbers = config.num_inputs * config.padded_outputs
    rows = config.num_tiles * config.tile_rows
    matrices = num_experts * (4 * config.num_words + 4 * config.num_groups) * config.padded_outputs
    inputs = config.num_rows * config.num_inputs * input_bytes if config.is_split else config.operand_bytes
    inputs *= config.used_cores  # each has them for itself
    return pl.CostEstimate(
        flops=2 * rows * numbers,
        bytes_accessed=matrices + inputs + rows * config.result_outputs * jnp.dtype(config.result_dtype).itemsize,
        transcendentals=0 if config.activation is None else rows * config.result_outputs,
    )


def _kernel(visits: Ref, x: Ref, *refs: Ref, config: MatmulConfig) -> None:
    """One visit of one block of columns. refs: units, unless rows are split here; matrices, their scales, the result;
    then room for all planes, which a core makes beside its first block, and for their units."""
    core, block, visit = (pl.program_id(axis) for axis in range(3))
    tile = visits[TILE, visit]
    if config.is_split:
        *blocks, planes, units = refs
        is_first = (block == 0) & ((visit == 0) | (visits[TILE, jnp.maximum(visit - 1, 0)] != tile))
        split_tile(x, planes, units, tile, is_first, config)
    else:
        planes, (units, *blocks) = x, refs
    half, out = len(blocks) // 2, blocks[-1]

    def result() -> Array:
        pairs = zip(blocks[:half], blocks[half : 2 * half], strict=True)
        unit = (units[tile] if config.is_split else units[...]) * UNITS.get(config.name, 1.0)
        wide = jnp.concatenate([unit] * (config.block_outputs // LANES), 1)
        return _gated([_product(planes, tile, words, scale, config) * wide for words, scale in pairs], config)

    def write() -> None:
        out[...] = result().astype(out.dtype)

    is_live = core * config.core_blocks + block < config.num_blocks
    if config.num_experts == 1:
        if config.num_blocks % config.used_cores:
            pl.when(is_live)(write)
        else:
            write()
        return
    begin, end = visits[BEGIN, visit], visits[END, visit]

    def merge() -> None:
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        is_mine = (row >= begin) & (row < end)
        out[...] = jnp.where(is_mine, result(), out[...].astype(jnp.float32)).astype(out.dtype)

    pl.when((begin < end) & is_live)(merge)


def _gated(products: list[Array], config: MatmulConfig) -> Array:
    """The product, or activation(gate) * up: of two products, or of the halves of one."""
    if config.activation is None:
        return products[0]
    size = config.result_outputs
    gate, up = products if len(products) == 2 else (products[0][:, :size], products[0][:, size : 2 * size])
    if config.activation == "silu":
        return gate * jax.nn.sigmoid(gate) * up
    return jax.nn.gelu(gate, approximate=config.activation == "gelu_tanh") * up


def _product(x: Ref, tile: Array, words: Ref, scale: Ref, config: MatmulConfig) -> Array:
    """[rows of a tile, columns of a block] float32, in units. All loops are unrolled: the matrix unit is always fed."""
    parts = [total * scale[0, group : group + 1] for group, total in enumerate(_sums(x, tile, words, config))]
    return functools.reduce(jnp.add, parts)


def _sums(x: Ref, tile: Array, words: Ref, config: MatmulConfig) -> Iterator[Array]:
    """The products of each group of inputs, summed in int32 or float32 -> float32 [rows of a tile, columns]. A group is
    32, 64, a multiple of 128, or all inputs."""
    dtype = jnp.int32 if config.is_integer else jnp.float32
    numbers, group = NUMBERS_IN_WORD[config.name], config.num_inputs // config.num_groups
    parts = []
    for first in range(0, config.num_inputs, LANES):
        last = min(first + LANES, config.num_inputs)
        matrix = unpack_words(words[0, first // numbers : last // numbers], config.name)
        for begin in range(first, last, min(group, LANES)):
            end = min(begin + group, last)
            rows = matrix[begin - first : end - first]
            parts.append(jnp.dot(x[tile, :, begin:end], rows, preferred_element_type=dtype))
            if end % group == 0:
                yield _join(functools.reduce(jnp.add, parts), config)
                parts = []


def _join(total: Array, config: MatmulConfig) -> Array:
    """Planes of rows, one below the other -> float32, their sums."""
    if config.planes == 2:
        high, low = jnp.split(total, 2, -2)
        total = high * 128 + low if config.is_integer else high + low
    return total.astype(jnp.float32)


def _with_xla(
    group_sizes: Array | None, planes: Array, unit: Array, words: Array, scale: Array, config: MatmulConfig
) -> Array:
    """The kernel's sums in XLA's operations, for devices without it: each expert's matrix meets all rows."""
    groups = (config.num_groups, config.num_inputs // config.num_groups)
    inputs = planes.astype(jnp.float32).reshape(*planes.shape[:2], *groups)
    factor = 1 / E4M3_SHIFT if config.name == "float8_e4m3fn" else 1.0
    sizes = jnp.full(1, unit.shape[0]) if group_sizes is None else group_sizes
    row, ends = jnp.arange(unit.shape[0])[:, None], jnp.cumsum(sizes)
    out = jnp.zeros((unit.shape[0], words.shape[2]), jnp.float32)
    for expert in range(config.num_experts):
        matrix = numbers_of(words[expert], config.name).reshape(*groups, -1) * factor
        sums = _join(jnp.einsum("trgi,gio->gtro", inputs, matrix, precision="highest"), config)
        total = (sums * scale[expert][:, None, None]).sum(0).reshape(out.shape)
        is_mine = (row >= ends[expert] - sizes[expert]) & (row < ends[expert])
        out = jnp.where(is_mine, total, out)
    return _gated([(out * unit[:, :1])[:, : config.num_outputs]], config)[: config.num_rows].astype(config.result_dtype)
