"""Which expert's matrix meets which rows, and how large the blocks are.

Rows are sorted by expert and cut into tiles. A visit is a tile with one expert that has rows in it, in the order of the
experts: of E experts and T tiles there are less than T + E, and a matrix that several visits share is fetched once. All
of it is computed on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from torchinfer.kernels.tpu.page_layout import LANES, round_up
from torchinfer.kernels.tpu.word_layout import INTEGERS, NUMBERS_IN_WORD

EXPERT, TILE, BEGIN, END = range(4)  # rows of `visits`
ROW_TILES = (8, 16, 32, 64, 128)
BLOCK_BYTES = 2**22  # of a matrix that is fetched at once, at most
BLOCK_TILES = 256  # of 128 inputs x 128 outputs in it, at most: they are unrolled
WHOLE_BYTES = 2**23  # of a block that cannot be cut
OPERAND_BYTES = 2**25  # of rows that stay on the chip while a matrix passes, at most; of a core of two, half of it
SPILLED_SUMS = 8  # of integers: products of a block, at most, that wait in memory
MARGIN_BYTES = 2**21


@dataclass(frozen=True)
class MatmulConfig:
    """All that a kernel is compiled for."""

    name: str  # of the numbers, a key of NUMBERS_IN_WORD
    num_experts: int
    num_inputs: int  # padded
    num_outputs: int  # of the matrix
    num_groups: int  # of inputs with scales of their own
    num_rows: int
    tile_rows: int
    planes: int  # what a row of inputs is split into: rows of the matrix unit for each
    block_outputs: int  # columns of a block
    activation: str | None = None  # outputs are gate, then up; the result is activation(gate) * up
    result_dtype: str = "float32"
    num_cores: int = 1

    @property
    def is_integer(self) -> bool:
        """Inputs are integers, too, and so are sums."""
        return self.name in INTEGERS

    @property
    def is_split(self) -> bool:
        """Inputs become integers, in two planes, in the kernel."""
        return self.is_integer and self.planes == 2

    @property
    def most_rows(self) -> int:
        """Rows that can stay on the chip while a matrix passes, whole tiles."""
        tile = self.operand_bytes // self.num_tiles
        return max(OPERAND_BYTES // self.num_cores // tile, 1) * self.tile_rows

    @property
    def operand_bytes(self) -> int:
        """Of all rows as the matrix unit takes them."""
        rows = self.num_tiles * self.tile_rows * self.planes
        return rows * self.num_inputs * (1 if self.is_integer else 2)

    @property
    def num_tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.num_rows // self.tile_rows)

    @property
    def num_visits(self) -> int:
        """Pairs of tile and expert, at most."""
        return self.num_tiles + min(self.num_experts, self.num_rows) - 1

    @property
    def num_words(self) -> int:
        """Rows of words of a matrix."""
        return self.num_inputs // NUMBERS_IN_WORD[self.name]

    @property
    def padded_outputs(self) -> int:
        """Columns of words."""
        return round_up(self.num_outputs, LANES)

    @property
    def result_outputs(self) -> int:
        """Columns of the result."""
        return self.num_outputs if self.activation is None else self.num_outputs // 2

    @property
    def is_whole(self) -> bool:
        """A block has gate and up beside each other; otherwise they are two blocks."""
        return self.activation is not None and self.block_outputs >= self.num_outputs

    @property
    def num_blocks(self) -> int:
        """Blocks of columns, the last of which may reach beyond them."""
        return 1 if self.is_whole else -(-self.result_outputs // self.block_outputs)

    def vmem_bytes(self, input_bytes: int) -> int:
        """Of a core's fast memory, what the kernel takes at most: two of each block, rows in planes, what waits."""
        matrices = 1 if self.activation is None or self.is_whole else 2
        groups = round_up(self.num_groups, 8)
        blocks = matrices * 4 * (self.num_words + groups) * self.block_outputs
        blocks += self.tile_rows * 4 * (self.block_outputs + LANES)
        sums = SPILLED_SUMS if self.is_integer else -(-self.num_inputs // LANES)
        waiting = matrices * sums * self.planes * self.tile_rows * self.block_outputs * 4
        if self.is_split:
            blocks += self.tile_rows * self.num_inputs * input_bytes
            waiting += 3 * min(self.tile_rows, 32) * self.num_inputs * 4
        units = self.num_tiles * self.tile_rows * LANES * 4
        return 2 * blocks + self.operand_bytes + units + waiting + MARGIN_BYTES

    @property
    def used_cores(self) -> int:
        """Cores that share the blocks."""
        return min(self.num_cores, self.num_blocks)

    @property
    def core_blocks(self) -> int:
        """Blocks of a core; the last one's may be fewer."""
        return -(-self.num_blocks // self.used_cores)

    def step(self, core: Any, block: Any, visit: Any) -> tuple[Any, Any]:
        """Column and visit of a step of the grid. Where a core has no more blocks it stays at its last step."""
        column = core * self.core_blocks + block
        if self.num_blocks % self.used_cores == 0:
            return column, visit
        last = jnp.where(column < self.num_blocks, visit, self.num_visits - 1)
        return jnp.minimum(column, self.num_blocks - 1), last


def can_gate(num_inputs: int, num_outputs: int, name: str) -> bool:
    """Whether gate, up and activation can be one pass: halves of whole tiles, or a matrix that is one block."""
    num_bytes = num_inputs * num_outputs * 4 // NUMBERS_IN_WORD[name]
    return num_outputs // 2 % LANES == 0 or num_bytes <= WHOLE_BYTES


def make_config(
    name: str,
    shape: tuple[int, int, int],  # experts, padded inputs, outputs
    num_groups: int,
    num_rows: int,
    planes: int,
    activation: str | None = None,
    *,
    result_dtype: str = "float32",
    num_cores: int = 1,
) -> MatmulConfig:
    """Sizes of blocks. A tile has the least rows that hold all, or those of two experts if all have the same, so that
    few experts' rows lie in more than one. A block has as many outputs as it may; of one matrix there are at least
    four, so that copying one hides computing another, and cores share them evenly."""
    num_experts, num_inputs, num_outputs = shape
    wanted = num_rows if num_experts == 1 else -(-2 * num_rows // num_experts)
    tile_rows = next((size for size in ROW_TILES if size >= wanted), ROW_TILES[-1])
    by_bytes = BLOCK_BYTES * NUMBERS_IN_WORD[name] // (4 * num_inputs)
    by_tiles = BLOCK_TILES * LANES * LANES // num_inputs
    most = max(min(by_bytes, by_tiles) // LANES, 1)
    if activation is None:
        block = _cut(num_outputs, most, 4 if num_experts == 1 else 1, num_cores)
    else:
        assert can_gate(num_inputs, num_outputs, name)
        block = _divide(num_outputs // 2, max(most // 2, 1), num_cores) or round_up(num_outputs, LANES)
    sizes = (num_experts, num_inputs, num_outputs, num_groups, num_rows, tile_rows, planes, block)
    return MatmulConfig(name, *sizes, activation, result_dtype, num_cores)


def _cut(num_outputs: int, most: int, least_blocks: int, num_cores: int) -> int:
    """Columns of a block of at most `most` tiles; the last one may reach beyond the outputs."""
    tiles = -(-num_outputs // LANES)
    blocks = min(round_up(max(-(-tiles // most), least_blocks), num_cores), tiles)
    return -(-tiles // blocks) * LANES


def _divide(num_outputs: int, most: int, num_cores: int) -> int | None:
    """Columns of a block that divides the outputs, so that blocks of up begin where one of gate does; None: none."""
    if num_outputs % LANES:
        return None
    tiles = num_outputs // LANES
    fitting = [size for size in range(1, min(most, tiles) + 1) if tiles % size == 0]
    even = [size for size in fitting if tiles // size % num_cores == 0 and 2 * size >= fitting[-1]]
    return (even or fitting)[-1] * LANES


def dense_visits(config: MatmulConfig) -> Any:
    """What `plan_visits` says of one matrix for all rows, known beforehand; an array of NumPy."""
    tile = np.arange(config.num_tiles, dtype=np.int32)
    zero = np.zeros_like(tile)
    return np.stack((zero, tile, zero, zero + config.tile_rows))


def plan_visits(group_sizes: Array, config: MatmulConfig) -> Array:
    """int32 [4, visits]: expert, tile, and the expert's rows [begin, end) in the tile.

    group_sizes: [E] int32, sum at most the rows. Visits beyond the last repeat it and have no rows.
    """
    size, number = config.tile_rows, jnp.arange(config.num_experts)
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    first = starts // size
    counts = jnp.where(group_sizes > 0, (ends - 1) // size + 1 - first, 0)
    after = jnp.cumsum(counts)
    visit = jnp.arange(config.num_visits)[:, None]
    is_mine = (visit >= after - counts) & (visit < after)  # [visits, experts]; sums over it, since gathers are slow

    def of_expert(values: Array) -> Array:
        return jnp.where(is_mine, values, 0).sum(1)

    is_live = is_mine.any(1)
    expert = jnp.where(is_live, of_expert(number), jnp.max(jnp.where(group_sizes > 0, number, 0)))
    tile = jnp.where(is_live, of_expert(first + visit - after + counts), jnp.maximum(ends[-1] - 1, 0) // size)
    begin = jnp.where(is_live, jnp.maximum(of_expert(starts) - tile * size, 0), 0)
    end = jnp.where(is_live, jnp.minimum(of_expert(ends) - tile * size, size), 0)
    return jnp.stack((expert, tile, begin, end)).astype(jnp.int32)
