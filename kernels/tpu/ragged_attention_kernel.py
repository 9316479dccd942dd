"""The body of the ragged attention kernel: what one core does with its query blocks.

For each query block and each block of the cache that it sees: fetch the next pages, wait for these, put the new tokens
into them, send what that changed back, then compute chunk by chunk. Softmax is online (arXiv 2205.14135) in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.attention_chunk import E4M3_SHIFT, MASKED, ROOM, Chunk, KernelConfig, Refs
from torchinfer.kernels.tpu.attention_plan import DECODE, FIRST_BLOCK, KV_END, NUM_TOKENS, PREFILL, ROW, TOKEN
from torchinfer.kernels.tpu.page_layout import LANES, PAGE_SIZE, SUBLANES
from torchinfer.kernels.tpu.row_planes import integer_planes
from torchinfer.kernels.tpu.token_insertion import Insertion

COPIES_AT_ONCE = 4  # of pages, whose scalar work overlaps
HEADS_AT_ONCE = 8  # whose work is interleaved: more have too many values for the registers
Ref = Any  # a memory reference of Pallas
Action = Callable[[Any], None]  # on a copy: start it, or wait for it


def attention_kernel(*refs: Ref, config: KernelConfig) -> None:
    """One core's share: its decodes, then its prefills."""
    for phase in (DECODE, PREFILL):
        _Phase(Refs(*refs), config, phase).run(pl.program_id(0))


class _Phase:
    """The loop over query blocks of one kind."""

    def __init__(self, refs: Refs, config: KernelConfig, phase: int) -> None:
        self.refs, self.config, self.layout = refs, config, config.layout
        self.is_decode = phase == DECODE
        self.phase = phase
        self.rows = config.rows(1 if self.is_decode else config.tile_tokens)
        self.chunk = config.decode_chunk if self.is_decode else config.prefill_chunk

    def run(self, core: Array) -> None:
        """Compute query blocks [bounds[core], bounds[core + 1])."""
        begin, end = self.refs.bounds[self.phase, core], self.refs.bounds[self.phase, core + 1]

        def all_blocks() -> None:
            self._copy_queries(begin, 0, _start)
            self._copy_pages(begin, self._field(FIRST_BLOCK, begin), 0, _start)
            jax.lax.fori_loop(begin, end, lambda index, step: self._query_block(index, step, begin, end), 0)
            self._copy_result(end - 1, _wait)

        pl.when(begin < end)(all_blocks)

    def _query_block(self, index: Array, step: Array, begin: Array, end: Array) -> Array:
        self._copy_queries(index, (index - begin) % 2, _wait)
        self._for_tiles(index, lambda tile: self._prepare_queries(tile, (index - begin) % 2))

        def one(block: Array, step: Array) -> Array:
            self._block(index, block, step, begin, end)
            return step + 1

        step = jax.lax.fori_loop(self._field(FIRST_BLOCK, index), self._num_blocks(index), one, step)

        def wait_for_result() -> None:
            self._copy_result(index - 1, _wait)

        pl.when(index > begin)(wait_for_result)

        self._for_tiles(index, self._finish)
        self._copy_result(index, _start)
        return step

    def _for_tiles(self, index: Array, one: Callable[[Array | int], None]) -> None:
        """Do it for each tile that has tokens."""
        if self.is_decode or self.config.num_tiles == 1:
            one(0)
            return
        num_tiles = pl.cdiv(self._field(NUM_TOKENS, index), self.config.tile_tokens)
        jax.lax.fori_loop(0, num_tiles, lambda tile, _: one(tile), None)

    def _block(self, index: Array, block: Array, step: Array, begin: Array, end: Array) -> None:
        slot, q_slot = step % 2, (index - begin) % 2
        is_last = block + 1 == self._num_blocks(index)
        after = jnp.where(is_last, index + 1, index)
        has_next = after < end
        after = jnp.minimum(after, end - 1)
        # The next query block of the same row reads pages that this one writes.
        is_late = has_next & is_last & (self._field(ROW, after) == self._field(ROW, index)) & (not self.is_decode)

        def fetch_next() -> None:
            self._copy_pages(after, jnp.where(is_last, self._field(FIRST_BLOCK, after), block + 1), 1 - slot, _start)

            def start_queries() -> None:
                self._copy_queries(after, 1 - q_slot, _start)

            pl.when(is_last)(start_queries)

        pl.when(has_next & ~is_late)(fetch_next)
        self._copy_pages(index, block, slot, _wait)
        self._insert_new_tokens(index, block, slot, q_slot)
        self._copy_changed(index, block, slot, _start)

        def write_before_fetch() -> None:
            self._copy_changed(index, block, slot, _wait)
            fetch_next()

        pl.when(is_late)(write_before_fetch)

        self._attend(index, block, slot)

        def wait_for_writes() -> None:
            self._copy_changed(index, block, slot, _wait)

        pl.when(~is_late)(wait_for_writes)

    def _field(self, field: int, index: Array) -> Array:
        return self.refs.query_blocks[field, index]

    def _num_blocks(self, index: Array) -> Array:
        return pl.cdiv(self._field(KV_END, index), self.config.block_tokens)

    def _copy_queries(self, index: Array, slot: Array | int, action: Action) -> None:
        """Queries and new tokens of a query block."""
        refs, size, token = self.refs, self.layout.fresh_rows, self._field(TOKEN, index)
        count = self._count(index)
        queries = refs.query.at[pl.ds(token, count)], refs.q.at[slot, pl.ds(0, count)]
        rows = pl.ds(pl.multiple_of(token * size, SUBLANES), pl.multiple_of(count * size, SUBLANES))
        here = pl.ds(ROOM * size, pl.multiple_of(count * size, SUBLANES))
        action(pltpu.make_async_copy(*queries, refs.q_sem.at[slot]))
        action(pltpu.make_async_copy(refs.new.at[rows], refs.fresh.at[slot, here], refs.q_sem.at[slot]))

    def _count(self, index: Array) -> Array | int:
        return 1 if self.is_decode else self._field(NUM_TOKENS, index)

    def _copy_result(self, index: Array, action: Action) -> None:
        count = self._count(index)
        tokens = pl.ds(self._field(TOKEN, index), count)
        refs = self.refs
        action(pltpu.make_async_copy(refs.result.at[pl.ds(0, count)], refs.out.at[tokens], refs.out_sem))

    def _page_range(self, index: Array, block: Array) -> tuple[Array | int, Array]:
        """The pages of a block that the query block sees, counted from the block's first."""
        kv_end, base = self._field(KV_END, index), block * self.config.fetch_pages
        end = jnp.minimum(self.config.fetch_pages, pl.cdiv(kv_end, PAGE_SIZE) - base)
        if self.config.window is None:
            return 0, end
        first = jnp.maximum(kv_end - self._field(NUM_TOKENS, index) - self.config.window + 1, 0) // PAGE_SIZE
        return jnp.maximum(first - base, 0), end

    def _copy_pages(self, index: Array, block: Array, slot: Array | int, action: Action) -> None:
        refs, row = self.refs, self._field(ROW, index)

        def one(at: Array, _: None) -> None:
            page = refs.page_table[row, block * self.config.fetch_pages + at]
            action(pltpu.make_async_copy(refs.pages.at[page], refs.kv.at[slot, at], refs.kv_sem.at[slot]))

        begin, end = self._page_range(index, block)
        num_many = (end - begin) // COPIES_AT_ONCE

        def many(number: Array, _: None) -> None:
            for at in range(COPIES_AT_ONCE):
                one(begin + number * COPIES_AT_ONCE + at, None)

        jax.lax.fori_loop(0, num_many, many, None)
        jax.lax.fori_loop(begin + num_many * COPIES_AT_ONCE, end, one, None)

    def _new_range(self, index: Array, block: Array) -> tuple[Array, Array]:
        """The query block's own tokens in a block, as positions counted from the block's first."""
        kv_end, base = self._field(KV_END, index), block * self.config.block_tokens
        first = kv_end - self._field(NUM_TOKENS, index)
        return jnp.maximum(first - base, 0), jnp.minimum(kv_end - base, self.config.block_tokens)

    def _insert_new_tokens(self, index: Array, block: Array, slot: Array, q_slot: Array) -> None:
        """Put the query block's own tokens into the fetched pages."""
        end = self._field(KV_END, index) - block * self.config.block_tokens
        first = end - self._field(NUM_TOKENS, index)
        Insertion(self.refs, self.config, slot, q_slot, first, end).insert(*self._new_range(index, block))

    def _copy_changed(self, index: Array, block: Array, slot: Array, action: Action) -> None:
        """Send the groups of tokens that hold new ones back to their pages, and those pages' scales."""
        refs, layout, row = self.refs, self.layout, self._field(ROW, index)
        begin, end = self._new_range(index, block)

        def copy(at: Array, rows: Any) -> None:
            page = refs.page_table[row, block * self.config.fetch_pages + at]
            action(pltpu.make_async_copy(refs.kv.at[slot, at, rows], refs.pages.at[page, rows], refs.write_sem))

        def copy_group(group: Array, _: None) -> None:
            first = pl.multiple_of((group % layout.num_groups) * layout.group_rows, SUBLANES)
            copy(group // layout.num_groups, pl.ds(first, layout.group_rows))

        def copy_scales(page: Array, _: None) -> None:
            copy(page, pl.ds(layout.data_rows, layout.scale_rows))

        def each() -> None:
            groups = begin // layout.group_tokens, (end - 1) // layout.group_tokens + 1
            jax.lax.fori_loop(*groups, copy_group, None)
            if layout.scale_rows:
                jax.lax.fori_loop(begin // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1, copy_scales, None)

        pl.when(begin < end)(each)

    def _prepare_queries(self, tile: Array | int, slot: Array) -> None:
        """Bring a tile's queries into rows of KV heads, quantized where the cache is int8, and set sums to zero."""
        config, refs, rows = self.config, self.refs, slice(0, self.rows)
        heads = self.layout.num_kv_heads
        for head in range(heads):
            x = self._queries(tile, slot, head)
            if self.layout.dtype == "int8":
                planes, scale = integer_planes(x)
                refs.operand[tile, head, : 2 * self.rows] = planes.astype(jnp.int8)
                refs.q_scale[tile, head, rows] = jnp.broadcast_to(scale, (self.rows, LANES))
            elif self.layout.dtype == "bfloat16":
                refs.operand[tile, head, rows] = x.astype(jnp.bfloat16)
            else:
                refs.operand[tile, head, rows] = (x * E4M3_SHIFT).astype(jnp.bfloat16)
        refs.highest[tile, :, rows] = jnp.full((heads, self.rows, LANES), MASKED, jnp.float32)
        refs.total[tile, :, rows] = jnp.zeros((heads, self.rows, LANES), jnp.float32)
        refs.acc[tile, :, rows] = jnp.zeros((heads, self.rows, config.key_width), jnp.float32)

    def _queries(self, tile: Array | int, slot: Array, head: int) -> Array:
        """[rows, key_width] float32 of a KV head."""
        config, refs, first = self.config, self.refs, head * self.config.group_size
        if self.is_decode:
            x: Array = refs.q[slot, 0, first : first + self.rows]
            return x
        tokens = self._tile_tokens(tile)
        if config.group_size == 1:
            refs.acc[tile, head] = refs.q[slot, tokens, first]  # through memory, to become rows of whole tiles
            x = refs.acc[tile, head]
            return x
        return refs.q[slot, tokens, first : first + config.group_size].reshape(self.rows, config.key_width)

    def _tile_tokens(self, tile: Array | int) -> Any:
        return pl.ds(tile * self.config.tile_tokens, self.config.tile_tokens)

    def _finish(self, tile: Array | int) -> None:
        config, refs, tokens = self.config, self.refs, self._tile_tokens(tile)
        for head in range(self.layout.num_kv_heads):
            total = jnp.sum(refs.total[tile, head, : self.rows], 1, keepdims=True)
            result = refs.acc[tile, head, : self.rows] / total
            heads = slice(head * config.group_size, (head + 1) * config.group_size)
            if self.is_decode:
                refs.result[0, heads] = result[: config.group_size]
            elif config.group_size == 1:
                refs.result[tokens, head] = result
            else:
                refs.result[tokens, heads] = result.reshape(config.tile_tokens, config.group_size, config.key_width)

    def _attend(self, index: Array, block: Array, slot: Array) -> None:
        begin, end = self._page_range(index, block)

        def chunk(number: Array, _: None) -> None:
            self._for_tiles(index, lambda tile: self._attend_chunk(index, block, slot, number * self.chunk, tile))

        jax.lax.fori_loop(begin // self.chunk, pl.cdiv(end, self.chunk), chunk, None)

    def _attend_chunk(self, index: Array, block: Array, slot: Array, page: Array, tile: Array | int) -> None:
        first = self._field(KV_END, index) - self._field(NUM_TOKENS, index) + tile * self.config.tile_tokens
        chunk = Chunk(self.refs, self.config, tile, self.rows, self.chunk, slot, page)
        base = block * self.config.block_tokens
        visible = chunk.visibility(base, first, self._field(KV_END, index), self.is_decode)
        if self.is_decode:
            heads = list(range(self.layout.num_kv_heads))
            for start in range(0, len(heads), HEADS_AT_ONCE):
                chunk.attend(heads[start : start + HEADS_AT_ONCE], *visible)
        else:
            for_each = functools.partial(jax.lax.fori_loop, 0, self.layout.num_kv_heads)
            for_each(lambda head, _: chunk.attend([head], *visible), None)


def _start(copy: Any) -> None:
    copy.start()


def _wait(copy: Any) -> None:
    copy.wait()
