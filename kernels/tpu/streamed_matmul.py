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
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.attention_chunk import E4M3_REST, E4M3_SHIFT, LARGEST
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
from torchinfer.kernels.tpu.word_layout import NUMBERS_IN_WORD
from torchinfer.kernels.tpu.word_unpacking import NIBBLE_UNIT, numbers_of, unpack_words

UNITS = {"int4": NIBBLE_UNIT, "float8_e4m3fn": E4M3_REST}  # of what a product with the numbers in a kernel is
VMEM_LIMIT_BYTES = 48 * 2**20  # of 128 MiB a core on v5e, 64 MiB on v5p
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
    (see `word_layout`), scale float32 [E, G, O]; group_sizes: [E] int32, sum at most N, None: one expert has all rows;
    shift: float32 [G, O], of one matrix without activation: subtracted from every number of a group, after its scale.
    Returns [N, outputs] of the config's dtype, zeros for rows of nobody. Without `has_kernel` by XLA's operations.
    """
    if config.is_integer and config.planes == 2:
        planes, unit = split_rows(x, config, has_kernel, interpret)
    else:
        planes, unit = _as_operands(x, input_scale, config)
    if config.name in UNITS:
        unit = unit * UNITS[config.name]
    if has_kernel:
        visits = dense_visits(config) if group_sizes is None else plan_visits(group_sizes, config)
        out = _call(config, interpret)(visits, planes, unit, words, scale)
        if group_sizes is not None:
            out = jnp.where(jnp.arange(x.shape[0])[:, None] < group_sizes.sum(), out, 0)  # nobody's were not written
    else:
        out = _with_xla(group_sizes, planes, unit, words, scale, config)
    if shift is not None:
        groups = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, config.num_inputs - x.shape[1])))
        sums = groups.reshape(x.shape[0], config.num_groups, -1).sum(2)
        out = out - jnp.dot(sums, shift, precision="highest")
    return out


def _as_operands(x: Array, input_scale: Array | None, config: MatmulConfig) -> tuple[Array, Array]:
    """[tiles, planes * rows, I] int8 or bfloat16, as the matrix unit takes them, and float32 [rows of tiles, 128], what
    sums are multiples of."""
    missing = (0, config.num_tiles * config.tile_rows - x.shape[0])
    numbers = jnp.pad(x, (missing, (0, config.num_inputs - x.shape[1])))
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


def split_rows(x: Array, config: MatmulConfig, has_kernel: bool, interpret: Any = False) -> tuple[Array, Array]:
    """Rows as integers of 15 bits in two planes of int8, one below the other in each tile, and what they are multiples
    of: as `_as_operands`. A kernel, because XLA makes ten operations of it."""
    x = jnp.pad(x, ((0, 0), (0, config.num_inputs - x.shape[1])))
    tiles, size, width = config.num_tiles, config.tile_rows, config.num_inputs
    if not has_kernel:
        x = jnp.pad(x, ((0, tiles * size - x.shape[0]), (0, 0)))
        planes, unit = jax.vmap(_planes)(x.reshape(tiles, size, -1))
        return planes.astype(jnp.int8), jnp.broadcast_to(unit.reshape(-1, 1), (tiles * size, LANES))
    # Parts of a tile, so that intermediate values fit the chip; 32 rows of int8 are a tile of the registers.
    rows = min(size, 32)
    parts, last = size // rows, -(-config.num_rows // rows) - 1  # the last part that has rows

    def kernel(x: Ref, planes: Ref, unit: Ref) -> None:
        whole, of_row = _planes(x[...])
        planes[...] = whole.reshape(planes.shape).astype(jnp.int8)
        unit[...] = jnp.broadcast_to(of_row, unit.shape)

    shape, block = ((tiles, 2 * size), (1, 2 * rows)) if parts == 1 else ((tiles, 2, size), (1, 2, rows))
    planes, unit = pl.pallas_call(
        kernel,
        grid=(tiles, parts),
        in_specs=[pl.BlockSpec((rows, width), lambda tile, part: (jnp.minimum(tile * parts + part, last), 0))],
        out_specs=[
            pl.BlockSpec((*block, width), lambda tile, part: (tile, *(0,) * (len(block) - 2), part, 0)),
            pl.BlockSpec((rows, LANES), lambda tile, part: (tile * parts + part, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, width), jnp.int8),
            jax.ShapeDtypeStruct((tiles * size, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        name="split_rows",
        interpret=interpret,
    )(x)
    return planes.reshape(tiles, 2 * size, width), unit


def _planes(rows: Array) -> tuple[Array, Array]:
    """[rows, I] -> whole numbers [2 * rows, I] of 8 bits, the high plane, then the low one, and units [rows, 1]."""
    rows = rows.astype(jnp.float32)
    unit = jnp.maximum(jnp.max(jnp.abs(rows), 1, keepdims=True), 1e-30) * (1 / LARGEST)
    whole = jnp.floor(rows / unit + 0.5).astype(jnp.int32)
    high = (whole + 64) >> 7
    return jnp.concatenate((high, whole - high * 128)), unit


@functools.lru_cache
def _call(config: MatmulConfig, interpret: Any) -> Any:
    size, width = config.tile_rows, config.block_outputs
    words = [((1, config.num_words, width), offset) for offset in _offsets(config)]
    scales = [((1, config.num_groups, width), offset) for offset in _offsets(config)]
    result = config.result_outputs if config.is_whole else width

    def of_expert(block: tuple[int, int, int], offset: int) -> pl.BlockSpec:
        return pl.BlockSpec(block, lambda column, visit, visits: (visits[EXPERT, visit], 0, column + offset))

    call = pl.pallas_call(
        functools.partial(_kernel, config=config),
        out_shape=jax.ShapeDtypeStruct((config.num_rows, config.result_outputs), jnp.dtype(config.result_dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(config.num_blocks, config.num_visits),
            in_specs=[
                pl.BlockSpec(
                    (1, config.planes * size, config.num_inputs), lambda _, visit, visits: (visits[TILE, visit], 0, 0)
                ),
                pl.BlockSpec((size, LANES), lambda _, visit, visits: (visits[TILE, visit], 0)),
                *[of_expert(*each) for each in words],
                *[of_expert(*each) for each in scales],
            ],
            out_specs=pl.BlockSpec((size, result), lambda column, visit, visits: (visits[TILE, visit], column)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=_cost(config),
        name="streamed_matmul",
        interpret=interpret,
    )

    def with_blocks(visits: Array, planes: Array, unit: Array, words: Array, scale: Array) -> Array:
        num_matrices = len(_offsets(config))
        out: Array = call(visits, planes, unit, *[words] * num_matrices, *[scale] * num_matrices)
        return out

    return with_blocks


def _offsets(config: MatmulConfig) -> list[int]:
    """The first block of the matrix, or of gate and of up."""
    return [0] if config.activation is None or config.is_whole else [0, config.num_blocks]


def _cost(config: MatmulConfig) -> pl.CostEstimate:
    """Of a step that sees as many experts as it can."""
    num_experts = min(config.num_experts, config.num_rows)
    numbers = config.num_inputs * config.num_outputs
    rows = config.num_tiles * config.tile_rows
    matrices = num_experts * (4 * config.num_words + 4 * config.num_groups) * config.num_outputs
    inputs = rows * config.planes * config.num_inputs * (1 if config.is_integer else 2)
    inputs *= config.num_blocks if config.num_tiles > 1 else 1  # a tile stays only if it is the only one
    return pl.CostEstimate(
        flops=2 * rows * numbers,
        bytes_accessed=matrices + inputs + rows * config.result_outputs * jnp.dtype(config.result_dtype).itemsize,
        transcendentals=0 if config.activation is None else rows * config.result_outputs,
    )


def _kernel(visits: Ref, x: Ref, unit: Ref, *refs: Ref, config: MatmulConfig) -> None:
    """One visit of one block of columns. refs: matrices, their scales, the result."""
    half, out = len(refs) // 2, refs[-1]

    def result() -> Array:
        pairs = zip(refs[:half], refs[half : 2 * half], strict=True)
        units = jnp.concatenate([unit[...]] * -(-config.block_outputs // LANES), 1)[:, : config.block_outputs]
        return _gated([_product(x, words, scale, config) * units for words, scale in pairs], config)

    if config.num_experts == 1:
        out[...] = result().astype(out.dtype)
        return
    visit = pl.program_id(1)
    begin, end = visits[BEGIN, visit], visits[END, visit]

    def merge() -> None:
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        is_mine = (row >= begin) & (row < end)
        out[...] = jnp.where(is_mine, result(), out[...].astype(jnp.float32)).astype(out.dtype)

    pl.when(begin < end)(merge)


def _gated(products: list[Array], config: MatmulConfig) -> Array:
    """The product, or activation(gate) * up: of two products, or of the halves of one."""
    if config.activation is None:
        return products[0]
    size = config.result_outputs
    gate, up = products if len(products) == 2 else (products[0][:, :size], products[0][:, size:])
    if config.activation == "silu":
        return gate * jax.nn.sigmoid(gate) * up
    return jax.nn.gelu(gate, approximate=config.activation == "gelu_tanh") * up


def _product(x: Ref, words: Ref, scale: Ref, config: MatmulConfig) -> Array:
    """[rows of a tile, columns of a block] float32, in units. All loops are unrolled: the matrix unit is always fed."""
    parts = [total * scale[0, group : group + 1] for group, total in enumerate(_sums(x, words, config))]
    return functools.reduce(jnp.add, parts)


def _sums(x: Ref, words: Ref, config: MatmulConfig) -> Iterator[Array]:
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
            parts.append(jnp.dot(x[0, :, begin:end], rows, preferred_element_type=dtype))
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
    factor = 1 / (UNITS.get(config.name, 1.0) * (E4M3_SHIFT if config.name == "float8_e4m3fn" else 1.0))
    sizes = jnp.full(1, unit.shape[0]) if group_sizes is None else group_sizes
    row, ends = jnp.arange(unit.shape[0])[:, None], jnp.cumsum(sizes)
    out = jnp.zeros((unit.shape[0], config.num_outputs), jnp.float32)
    for expert in range(config.num_experts):
        matrix = numbers_of(words[expert], config.name).reshape(*groups, config.num_outputs) * factor
        sums = _join(jnp.einsum("trgi,gio->gtro", inputs, matrix, precision="highest"), config)
        total = (sums * scale[expert][:, None, None]).sum(0).reshape(out.shape)
        is_mine = (row >= ends[expert] - sizes[expert]) & (row < ends[expert])
        out = jnp.where(is_mine, total, out)
    return _gated([out * unit[:, :1]], config)[: config.num_rows].astype(config.result_dtype)
