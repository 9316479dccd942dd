"""Products with matrices that stream from memory in words, once, and become numbers in the kernel: dense or of experts.

A plain function of jax. int8 and int4 meet the matrix unit as int8: a row of inputs is rounded to 15 bits of its
largest number and split into two planes, x = 128 * high + low, which are rows of one product, so that a matrix is
pushed once, and sums are whole numbers, more exact than bfloat16's. e4m3 becomes bfloat16 by shifts and masks, since v5
converts 13 times slower. Scales meet sums.
Source: arXiv 2211.15841 (blocks of rows and experts), 2208.07339 (scales of outputs).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.attention_chunk import E4M3_REST, E4M3_SHIFT, LARGEST
from torchinfer.kernels.tpu.matmul_plan import BEGIN, END, EXPERT, IS_FIRST, TILE, MatmulConfig, plan_visits
from torchinfer.kernels.tpu.page_layout import LANES
from torchinfer.kernels.tpu.word_layout import NUMBERS_IN_WORD
from torchinfer.kernels.tpu.word_unpacking import NIBBLE_UNIT, numbers_of, unpack_words

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
    Returns [N, outputs of the config] float32, zeros for rows of nobody. Without `has_kernel` by XLA's operations.
    """
    sizes = jnp.full(1, x.shape[0], jnp.int32) if group_sizes is None else group_sizes
    planes, unit = _split(x, input_scale, config)
    if has_kernel:
        out = _call(config, interpret)(plan_visits(sizes, config), planes, words, scale, unit)
        out = out if config.activation is not None else out * unit[:, :1]
    else:
        out = _with_xla(sizes, planes, words, scale, unit, config)
    result: Array = out[: x.shape[0]]
    if shift is not None:
        groups = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, config.num_inputs - x.shape[1])))
        sums = groups.reshape(x.shape[0], config.num_groups, -1).sum(2)
        result = result - jnp.dot(sums, shift, precision="highest")
    return result


def _split(x: Array, input_scale: Array | None, config: MatmulConfig) -> tuple[Array, Array]:
    """What the matrix unit takes, [tiles, planes * rows, I] int8 or bfloat16, and what sums are multiples of, float32
    [rows, 128]."""
    rows = (0, config.num_tiles * config.tile_rows - x.shape[0])
    numbers = jnp.pad(x.astype(jnp.float32), (rows, (0, config.num_inputs - x.shape[1])))
    unit = jnp.ones(x.shape[0]) if input_scale is None else input_scale
    unit = jnp.pad(unit, rows)[:, None]
    if config.is_integer and config.planes == 2:
        unit = jnp.maximum(jnp.max(jnp.abs(numbers), 1, keepdims=True), 1e-30) * (1 / LARGEST)
        whole = jnp.round(numbers / unit).astype(jnp.int32)
        high = (whole + 64) >> 7
        parts = [high.astype(jnp.int8), (whole - high * 128).astype(jnp.int8)]
    elif config.is_integer:
        parts = [numbers.astype(jnp.int8)]
    else:
        shifted = numbers * E4M3_SHIFT if config.name == "float8_e4m3fn" else numbers
        parts = [shifted.astype(jnp.bfloat16)]
        if config.planes == 2:
            parts.append((shifted - parts[0].astype(jnp.float32)).astype(jnp.bfloat16))
    if config.name == "int4":
        unit = unit * NIBBLE_UNIT
    if config.name == "float8_e4m3fn":
        unit = unit * E4M3_REST
    tiles = [part.reshape(config.num_tiles, config.tile_rows, config.num_inputs) for part in parts]
    return jnp.concatenate(tiles, 1), jnp.broadcast_to(unit, (unit.shape[0], LANES))


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
        out_shape=jax.ShapeDtypeStruct((config.num_tiles * size, config.result_outputs), jnp.float32),
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

    def with_blocks(visits: Array, planes: Array, words: Array, scale: Array, unit: Array) -> Array:
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
    return pl.CostEstimate(
        flops=2 * rows * config.planes * numbers,
        bytes_accessed=matrices + inputs + 4 * rows * config.result_outputs,
        transcendentals=0 if config.activation is None else rows * config.result_outputs,
    )


def _kernel(visits: Ref, x: Ref, unit: Ref, *refs: Ref, config: MatmulConfig) -> None:
    """One visit of one block of columns."""
    matrices, out = refs[:-1], refs[-1]
    half = len(matrices) // 2

    def result() -> Array:
        pairs = zip(matrices[:half], matrices[half:], strict=True)
        return _gated([_product(x, unit, words, scale, config) for words, scale in pairs], config)

    if config.num_experts == 1:
        out[...] = result()
        return
    visit = pl.program_id(1)
    begin, end = visits[BEGIN, visit], visits[END, visit]

    def fill() -> None:
        out[...] = jnp.zeros_like(out)

    def merge() -> None:
        row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        out[...] = jnp.where((row >= begin) & (row < end), result(), out[...])

    pl.when(visits[IS_FIRST, visit] == 1)(fill)
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


def _product(x: Ref, unit: Ref, words: Ref, scale: Ref, config: MatmulConfig) -> Array:
    """[rows of a tile, columns of a block] float32. All loops are unrolled, so that the matrix unit is always fed."""
    size, width = config.tile_rows, config.block_outputs
    group = config.num_inputs // config.num_groups
    sums = jnp.zeros((size, width), jnp.float32)
    for number in range(config.num_groups):
        of_group = _sum(x, words, number * group, (number + 1) * group, config)
        sums = sums + of_group * scale[0, number : number + 1]
    if config.activation is None:  # then the caller multiplies by units
        return sums
    return sums * jnp.concatenate([unit[...]] * -(-width // LANES), 1)[:, :width]


def _sum(x: Ref, words: Ref, begin: int, end: int, config: MatmulConfig) -> Array:
    """The products of inputs [begin, end), summed in int32 or float32 -> float32 [rows of a tile, columns]."""
    dtype = jnp.int32 if config.is_integer else jnp.float32
    total = jnp.zeros((config.planes * config.tile_rows, config.block_outputs), dtype)
    numbers = NUMBERS_IN_WORD[config.name]
    for first in range(begin, end, LANES):
        last = min(first + LANES, end)
        matrix = unpack_words(words[0, first // numbers : last // numbers], config.name)
        total = total + jnp.dot(x[0, :, first:last], matrix, preferred_element_type=dtype)
    return _join(total, config)


def _join(total: Array, config: MatmulConfig) -> Array:
    """Planes of rows, one below the other -> float32, their sums."""
    if config.planes == 2:
        high, low = jnp.split(total, 2, -2)
        total = high * 128 + low if config.is_integer else high + low
    return total.astype(jnp.float32)


def _with_xla(
    group_sizes: Array, planes: Array, words: Array, scale: Array, unit: Array, config: MatmulConfig
) -> Array:
    """The kernel's sums in XLA's operations, for devices without it: each expert's matrix meets all rows."""
    groups = (config.num_groups, config.num_inputs // config.num_groups)
    inputs = planes.astype(jnp.float32).reshape(*planes.shape[:2], *groups)
    factor = {"int4": 1 / NIBBLE_UNIT, "float8_e4m3fn": 1 / (E4M3_SHIFT * E4M3_REST)}.get(config.name, 1.0)
    row, ends = jnp.arange(unit.shape[0])[:, None], jnp.cumsum(group_sizes)
    out = jnp.zeros((unit.shape[0], config.num_outputs), jnp.float32)
    for expert in range(config.num_experts):
        matrix = numbers_of(words[expert], config.name).reshape(*groups, config.num_outputs) * factor
        sums = _join(jnp.einsum("trgi,gio->gtro", inputs, matrix, precision="highest"), config)
        total = (sums * scale[expert][:, None, None]).sum(0).reshape(out.shape)
        is_mine = (row >= ends[expert] - group_sizes[expert]) & (row < ends[expert])
        out = jnp.where(is_mine, total, out)
    return _gated([out * unit[:, :1]], config)
