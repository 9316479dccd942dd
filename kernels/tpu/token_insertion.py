"""How new tokens come into fetched pages in VMEM: in whole groups, whose words get the bytes of several tokens at once.

A new token arrives as rows of 128 words: tile t of its keys and values is part t // R of row t % R, of R rows of words;
behind them its scales are the lanes of another row.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.attention_chunk import ROOM, KernelConfig, Refs
from torchinfer.kernels.tpu.page_layout import LANES, PAGE_SIZE, SUBLANES, PageLayout
from torchinfer.kernels.tpu.page_packing import to_bits, to_tiles, token_of_slot


def fresh_rows(
    key: Array, value: Array, key_scale: Array | None, value_scale: Array | None, layout: PageLayout
) -> Array:
    """New tokens as the kernel inserts them: int32 [T * rows, 128], see above.

    key, value: [T, K, D] of the cache's dtype; key_scale, value_scale: [T, K] float32, or None for bfloat16.
    """
    num_tokens, parts = key.shape[0], layout.tokens_per_word
    bits = to_bits(to_tiles(key, value, layout)).reshape(num_tokens, -1, LANES)
    bits = jnp.pad(bits, ((0, 0), (0, parts * layout.fresh_words - bits.shape[1]), (0, 0)))
    split = bits.reshape(num_tokens, parts, layout.fresh_words, LANES)
    rows = [jnp.stack([split[:, part] << (part * 32 // parts) for part in range(parts)]).sum(0, dtype=jnp.int32)]
    if key_scale is not None and value_scale is not None:
        scales = jax.lax.bitcast_convert_type(jnp.concatenate((key_scale, value_scale), 1), jnp.int32)
        rows.append(jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % LANES))).reshape(num_tokens, -1, LANES))
    fresh = jnp.concatenate(rows, 1)
    fresh = jnp.pad(fresh, ((0, 0), (0, layout.fresh_rows - fresh.shape[1]), (0, 0)))
    return fresh.reshape(-1, LANES)


@dataclass(frozen=True)
class Insertion:
    """A query block's tokens and a fetched block, whose positions count from its first token."""

    refs: Refs
    config: KernelConfig
    slot: Array  # of the block
    q_slot: Array  # of the tokens
    first: Array  # position of the query block's first token, less than 0 in a block behind it
    end: Array  # behind that of its last

    def insert(self, begin: Array, end: Array) -> None:
        """Put in the tokens at positions [begin, end) of the block, all that the query block has there."""
        size = self.config.layout.group_tokens
        groups = begin // size, jnp.where(begin < end, (end - 1) // size + 1, begin // size)
        jax.lax.fori_loop(*groups, lambda group, _: self._insert_group(group), None)
        if self.config.layout.scale_rows:
            pages = begin // PAGE_SIZE, jnp.where(begin < end, (end - 1) // PAGE_SIZE + 1, begin // PAGE_SIZE)
            jax.lax.fori_loop(*pages, lambda page, _: self._insert_scales(page), None)

    def _insert_group(self, group: Array) -> None:
        layout, kv = self.config.layout, self.refs.kv
        parts, start = layout.tokens_per_word, group * layout.group_tokens
        width = 32 // parts
        low = jnp.int32(2**width - 1)
        row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        is_new = jnp.zeros((SUBLANES, LANES), jnp.int32)
        for part in range(parts):
            at = start + token_of_slot(part, layout) + row * self._stride
            is_new |= jnp.where((at >= self.first) & (at < self.end), low << (part * width), 0)
        page, in_page = group // layout.num_groups, group % layout.num_groups
        for words in range(layout.fresh_words):
            loaded = [self._words(start + token_of_slot(part, layout) - self.first, words) for part in range(parts)]
            for tile in range(words, layout.num_kv_heads * layout.num_tiles, layout.fresh_words):
                shift = tile // layout.fresh_words * width
                bits = [((each >> shift) & low) << (part * width) for part, each in enumerate(loaded)]
                new = sum(bits[1:], bits[0])
                rows = pl.ds(pl.multiple_of(in_page * layout.group_rows + tile * SUBLANES, SUBLANES), SUBLANES)
                kv[self.slot, page, rows] = (kv[self.slot, page, rows] & ~is_new) | (new & is_new)

    @property
    def _stride(self) -> int:
        """From a row of words to the next: tokens."""
        layout = self.config.layout
        return token_of_slot(layout.tokens_per_word, layout)

    def _words(self, token: Array, row: int, stride: int | None = None) -> Array:
        """A row of 8 tokens, `stride` from each to the next: [8, 128]."""
        size = self.config.layout.fresh_rows
        first = (token + ROOM) * size + row
        words: Array = self.refs.fresh[self.q_slot, pl.ds(first, SUBLANES, stride=(stride or self._stride) * size)]
        return words

    def _insert_scales(self, page: Array) -> None:
        """Scales have a row for each head, and a token for each lane: the new ones are transposed."""
        layout, kv, start = self.config.layout, self.refs.kv, page * PAGE_SIZE
        most = self.config.prefill_tokens
        at = start + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
        is_new = (at >= self.first) & (at < self.end)
        for index in range(-(-layout.scale_rows // LANES)):
            row = layout.fresh_words + index
            # Eight without a new one among them may come from anywhere.
            tokens = [jnp.clip(start + of_page - self.first, -ROOM, most) for of_page in range(0, PAGE_SIZE, SUBLANES)]
            loaded = jnp.concatenate([self._words(token, row, 1) for token in tokens])
            new = pltpu.bitcast(pltpu.bitcast(loaded, jnp.float32).T, jnp.int32)
            for first in range(0, min(layout.scale_rows - index * LANES, LANES), SUBLANES):
                rows = pl.ds(layout.data_rows + index * LANES + first, SUBLANES)
                kv[self.slot, page, rows] = jnp.where(is_new, new[first : first + SUBLANES], kv[self.slot, page, rows])
