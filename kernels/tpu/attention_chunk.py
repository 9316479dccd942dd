"""The arithmetic of the ragged attention kernel: one KV head's queries against a few pages in VMEM.

A cache in int8 meets the matrix unit as it is. Queries and probabilities are integers too, of 15 and 14 bits in two
planes of 8 that are rows of one product, so that keys and values are pushed once: x = 128 * high + low.
e4m3 becomes bfloat16 by shifts and masks, its value times 2**-120, since v5 converts 13 times slower.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.page_layout import LANES, PAGE_SIZE, SUBLANES, PageLayout, round_up

Span = tuple[Any, Any]  # of tokens of a page, int32 scalars
Ref = Any  # a memory reference of Pallas
MASKED = -1e30  # a score of what is not visible: finite, so that rows that see nothing stay finite
LARGEST = 127 * 128  # of an integer in two planes
E4M3_SHIFT = 2.0**100  # queries and probabilities times this, products times the rest of 2**120
E4M3_REST = 2.0**20
LOG2_E = 1.4426950408889634
ROOM = 32  # tokens before a query block's new ones, and more behind them: a group may begin before, or end behind
ROWS_DOT_ROWS = (((1,), (1,)), ((), ()))
ROWS_DOT_COLUMNS = (((1,), (0,)), ((), ()))


@dataclass(frozen=True)
class KernelConfig:
    """All that a kernel is compiled for."""

    layout: PageLayout
    num_heads: int
    fetch_pages: int  # pages that are fetched at once
    decode_chunk: int  # pages that are computed at once, where a query block has one token
    prefill_chunk: int
    prefill_tokens: int  # of a query block: a multiple of `tile_tokens`
    tile_tokens: int  # of a query block that are computed at once; a multiple of 8
    window: int | None
    soft_cap: float | None
    num_cores: int = 1

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.layout.num_kv_heads

    @property
    def query_heads(self) -> int:
        """Heads of the arrays of queries: a tile of 8 may begin at each KV head's first."""
        return round_up(self.num_heads - self.group_size + round_up(self.group_size, SUBLANES), SUBLANES)

    @property
    def out_heads(self) -> int:
        """Heads of the output's array."""
        return round_up(self.num_heads, SUBLANES)

    @property
    def key_width(self) -> int:
        """Lanes of a query."""
        return self.layout.key_tiles * LANES

    @property
    def num_tiles(self) -> int:
        """Of a query block's tokens."""
        return self.prefill_tokens // self.tile_tokens

    @property
    def planes(self) -> int:
        """Rows of the matrix unit for a row of queries."""
        return 2 if self.layout.dtype == "int8" else 1

    @property
    def block_tokens(self) -> int:
        """Tokens of the cache that are fetched at once."""
        return self.fetch_pages * PAGE_SIZE

    def rows(self, num_tokens: int) -> int:
        """Rows that a query block of so many tokens has for each KV head."""
        return round_up(num_tokens * self.group_size, SUBLANES)


class Refs(NamedTuple):
    """The kernel's memory."""

    query_blocks: Ref  # scalars: see `AttentionPlan`
    bounds: Ref
    page_table: Ref
    query: Ref  # HBM [T, query_heads, key_width] float32, scaled, see `ragged_attention`
    new: Ref  # HBM [T * rows, 128] int32: see `token_insertion`
    pages_in: Ref  # the memory of `pages`
    out: Ref  # HBM [T, out_heads, key_width] float32
    pages: Ref  # HBM [P, rows, 128] int32
    kv: Ref  # VMEM [2, fetch_pages, rows, 128] int32
    q: Ref  # [2, prefill_tokens, query_heads, key_width] float32
    fresh: Ref  # [2, tokens * rows, 128] int32: those of `new`, with room for others on both sides
    result: Ref  # [prefill_tokens, out_heads, key_width] float32
    operand: Ref  # [tiles, K, planes * rows, key_width] int8 or bfloat16: queries as the matrix unit takes them
    q_scale: Ref  # [tiles, K, rows, 128] float32: of the integers in `operand`
    highest: Ref  # [tiles, K, rows, 128] float32: the largest score so far, in all lanes
    total: Ref  # [tiles, K, rows, 128] float32: sums of exponentials, a share in each lane
    acc: Ref  # [tiles, K, rows, key_width] float32: sums of exponentials times values
    kv_sem: Ref  # [2]
    q_sem: Ref  # [2]
    out_sem: Ref
    write_sem: Ref


def rounding_thresholds() -> Array:
    """[1, 128] float32 in (-0.5, 0.5), each once: what is added to numbers of a page's tokens before they are rounded.
    Of many weights below a half, such as those behind one that is much larger, all would become 0; so some become 1."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return ((lane * 79) & (LANES - 1)).astype(jnp.float32) * (1 / LANES) - (0.5 - 0.5 / LANES)


def token_of_row(row: Array, group_size: int) -> Array:
    """row // group_size of up to 2**11 rows, int32, for groups of up to 128: by multiplication, a division is slow."""
    return (row * (2**20 // group_size + 1)) >> 20


@dataclass(frozen=True)
class Chunk:
    """Some pages of a fetched block, and the rows of a tile of queries that meet them."""

    refs: Refs
    config: KernelConfig
    tile: Array | int
    rows: int
    num_pages: int
    slot: Array
    page: Array  # the first one, counted from the block's first

    def visibility(self, base: Array, first: Array, kv_end: Array, is_decode: bool) -> tuple[list[Array], list[Span]]:
        """For each page: what each row sees, bool [rows, 128], and the tokens [begin, end) that any row sees.

        base: position of the block's first token; first: that of the tile.
        """
        shape, window = (self.rows, LANES), self.config.window
        query = first
        if not is_decode:
            query = first + token_of_row(jax.lax.broadcasted_iota(jnp.int32, shape, 0), self.config.group_size)
        visible, seen = [], []
        for index in range(self.num_pages):
            start = base + (self.page + index) * PAGE_SIZE
            token = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            mask = token <= query
            if window is not None:
                mask = mask & (token > query - window)
            visible.append(mask)
            seen.append((0 if window is None else first - window + 1 - start, kv_end - start))
        return visible, seen

    def attend(self, heads: list[Array | int], visible: list[Array], seen: list[Span]) -> None:
        """Scores, running softmax and weighted values of some KV heads, step by step for all of them: the products of
        one are on their way while another's are used."""
        refs, rows = self.refs, slice(0, self.rows)
        scores = [
            [jnp.where(mask, self._scores(head, index), MASKED) for index, mask in enumerate(visible)] for head in heads
        ]
        weights, decays, shares = [], [], []
        for head, of_head in zip(heads, scores, strict=True):
            before = refs.highest[self.tile, head, rows]
            here = jnp.max(functools.reduce(jnp.maximum, of_head), 1, keepdims=True)
            after = jnp.maximum(before, here)
            # Integers hold little of weights far below the largest: they are those of these pages, not of all so far.
            largest = here if self.config.layout.dtype == "int8" else after
            weights.append([jnp.exp2(score - largest) for score in of_head])
            decays.append(jnp.exp2(before - after))
            shares.append(jnp.exp2(here - after) if self.config.layout.dtype == "int8" else 1.0)
            refs.highest[self.tile, head, rows] = after
            refs.total[self.tile, head, rows] = (
                refs.total[self.tile, head, rows] * decays[-1] + sum(weights[-1][1:], weights[-1][0]) * shares[-1]
            )
        products = [self._weighted_values(head, each, seen) for head, each in zip(heads, weights, strict=True)]
        for head, decay, share, of_head in zip(heads, decays, shares, products, strict=True):
            for tile, product in enumerate(of_head):
                lanes = slice(tile * LANES, (tile + 1) * LANES)
                acc = refs.acc[self.tile, head, rows, lanes]
                refs.acc[self.tile, head, rows, lanes] = acc * decay + product * share

    def _scores(self, head: Array | int, index: int) -> Array:
        """[rows, 128] float32 against one page, times log2(e): their weights are powers of 2."""
        layout, planes = self.config.layout, self.config.planes
        parts = []
        for tile in range(layout.key_tiles):
            query = self.refs.operand[self.tile, head, : planes * self.rows, tile * LANES : (tile + 1) * LANES]
            keys = self._numbers(head, index, tile)
            parts.append(jax.lax.dot_general(query, keys, ROWS_DOT_ROWS, **self._accumulate()))
        product = sum(parts[1:], parts[0])
        if layout.dtype == "int8":
            numbers = (product[: self.rows] << 7) + product[self.rows :]
            scores = (
                numbers.astype(jnp.float32)
                * self.refs.q_scale[self.tile, head, : self.rows]
                * self._scale_row(index, head)
            )
        elif layout.dtype == "bfloat16":
            scores = product
        else:
            scores = product * (self._scale_row(index, head) * E4M3_REST)
        if self.config.soft_cap is not None:
            scores = (self.config.soft_cap * LOG2_E) * jnp.tanh(scores * (1 / self.config.soft_cap))
        return scores

    def _weighted_values(self, head: Array | int, weights: list[Array], seen: list[Span]) -> list[Array]:
        """Weights times values, [rows, 128] float32 for each tile of a value."""
        layout = self.config.layout
        factor: Array | float = 1.0
        if layout.dtype == "bfloat16":
            operand = jnp.concatenate([weight.astype(jnp.bfloat16) for weight in weights], 1)
        else:
            row = head + layout.num_kv_heads
            scales = [self._seen_scales(index, row, span) for index, span in enumerate(seen)]
            if layout.dtype == "int8":
                operand, factor = self._weights_as_integers(weights, scales)
            else:
                scaled = [weight * (scale * E4M3_SHIFT) for weight, scale in zip(weights, scales, strict=True)]
                operand, factor = jnp.concatenate([each.astype(jnp.bfloat16) for each in scaled], 1), E4M3_REST
        products = []
        for tile in range(layout.value_tile, layout.num_tiles):
            values = jnp.concatenate([self._values(head, index, tile, span) for index, span in enumerate(seen)])
            product = jax.lax.dot_general(operand, values, ROWS_DOT_COLUMNS, **self._accumulate())
            if layout.dtype == "int8":
                product = ((product[: self.rows] << 7) + product[self.rows :]).astype(jnp.float32)
            products.append(product * factor)
        return products

    def _weights_as_integers(self, weights: list[Array], scales: list[Array]) -> tuple[Array, Array]:
        """Weights times scales as two planes int8 [2 * rows, pages * 128], and what the integers are multiples of."""
        largest = scales[0]
        for other in scales[1:]:
            largest = jnp.maximum(largest, other)
        unit = jnp.maximum(jnp.max(largest, 1, keepdims=True), 1e-30) * (1 / LARGEST)
        planes, threshold = [], rounding_thresholds()
        for weight, scale in zip(weights, scales, strict=True):
            # Beyond 2**23 float32 has the integers only, in its low bits: rounded without a conversion.
            bits = jax.lax.bitcast_convert_type(weight * (scale / unit) + threshold + 1.5 * 2.0**23, jnp.int32)
            planes.append(jnp.concatenate(((bits >> 7) & 127, bits & 127)).astype(jnp.int8))
        return jnp.concatenate(planes, 1), unit

    def _seen_scales(self, index: int, row: Array | int, span: Span) -> Array:
        """Zeros for tokens that no row sees, whose scales may be anything, NaN too."""
        token = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        return jnp.where((token >= span[0]) & (token < span[1]), self._scale_row(index, row), 0.0)

    def _values(self, head: Array | int, index: int, tile: int, span: Span) -> Array:
        """A page's values. What no row sees may be NaN in bfloat16, and becomes 0; all 8 bit numbers are finite."""
        if self.config.layout.dtype != "bfloat16":
            return self._numbers(head, index, tile)
        words = []
        for group in range(self.config.layout.num_groups):
            token = group * 16 + 2 * jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
            low = jnp.where((token >= span[0]) & (token < span[1]), 0xFFFF, 0)
            high = jnp.where((token + 1 >= span[0]) & (token + 1 < span[1]), -0x10000, 0)
            words.append(self._words(head, index, tile, group) & (low | high))
        return pltpu.bitcast(jnp.concatenate(words), jnp.bfloat16)

    def _scale_row(self, index: int, row: Array | int) -> Array:
        """A page's scales of keys (rows 0 to K - 1) or values (from K on), float32 [1, 128]."""
        rows = pl.ds(self.config.layout.data_rows + row, 1)
        return pltpu.bitcast(self.refs.kv[self.slot, self.page + index, rows], jnp.float32)

    def _words(self, head: Array | int, index: int, tile: int, group: int) -> Array:
        layout = self.config.layout
        row = group * layout.group_rows + (head * layout.num_tiles + tile) * SUBLANES
        row = row if isinstance(row, int) else pl.multiple_of(row, SUBLANES)
        words: Array = self.refs.kv[self.slot, self.page + index, pl.ds(row, SUBLANES)]
        return words

    def _numbers(self, head: Array | int, index: int, tile: int) -> Array:
        """A page's keys or values of a head, [128, 128] int8 or bfloat16; e4m3 times 2**-120."""
        layout = self.config.layout
        words = [self._words(head, index, tile, group) for group in range(layout.num_groups)]
        if layout.dtype == "int8":
            return pltpu.bitcast(jnp.concatenate(words), jnp.int8)
        if layout.dtype == "bfloat16":
            return pltpu.bitcast(jnp.concatenate(words), jnp.bfloat16)
        return jnp.concatenate([part for group in words for part in e4m3_to_bfloat16(group)])

    def _accumulate(self) -> dict[str, Any]:
        return {"preferred_element_type": jnp.int32 if self.config.layout.dtype == "int8" else jnp.float32}


def e4m3_to_bfloat16(words: Array) -> tuple[Array, Array]:
    """Numbers times 2**-120, of the even and the odd bytes of words [8, 128] -> two of bfloat16 [16, 128].

    The exponent's bits move to the low end of bfloat16's; NaN becomes 480, denormals are denormals.
    """
    even = ((words << 4) & 0x07F007F0) | ((words << 8) & jnp.int32(-0x7FFF8000))
    odd = ((words >> 4) & 0x07F007F0) | (words & jnp.int32(-0x7FFF8000))
    return pltpu.bitcast(even, jnp.bfloat16), pltpu.bitcast(odd, jnp.bfloat16)
