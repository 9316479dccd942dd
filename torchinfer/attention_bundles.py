"""Bundles of the TPU's ragged attention kernel (kernels/tpu/ragged_attention_kernel.py), from those of its loops.

    query blocks of decodes
        blocks of fetched pages
            starting copies of pages, four and one at a time; awaiting them, four and one
            groups of new tokens; their scales, a page at a time, if the cache has some
            groups of tokens that are written back; others for scales and for awaiting
            chunks of pages
    query blocks of prefills: likewise, with loops over the tiles of a query block, if it has several, before the
        blocks, in a chunk, and behind; in a chunk a loop over KV heads unless there is one

All else in a loop's body counts once each time, branches that are not taken included; the other loops do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchinfer import aot


@dataclass(frozen=True, slots=True)
class AttentionBlocks:
    """What the kernel does at once."""

    fetch_pages: int
    decode_chunk: int  # pages that are computed at once
    prefill_chunk: int
    prefill_tokens: int  # of a query block
    num_tiles: int  # of a prefill's query block, one after the other
    copies_at_once: int
    num_kv_heads: int
    group_tokens: int  # that are put into a page and written back at once
    has_scales: bool
    page_tokens: int  # whose scales are put in at once


@dataclass(frozen=True, slots=True)
class AttentionBundles:
    """A compiled kernel, and the blocks that it was made for."""

    kernel: aot.Kernel
    blocks: AttentionBlocks

    def call(self, num_decodes: float, num_prefills: float, num_pages: int) -> float:
        """Of one core: query blocks of decodes and of prefills, each of which sees so many pages."""
        outside = self.kernel.num_bundles - sum(each.num_bundles for each in self.kernel.inside(None))
        decode, prefill = self._phases()
        return (
            outside
            + num_decodes * self._query_block(decode, num_pages, 1, self.blocks.decode_chunk)
            + num_prefills
            * self._query_block(prefill, num_pages, self.blocks.prefill_tokens, self.blocks.prefill_chunk)
        )

    def decode_block(self) -> float:
        """A decode's block of fetched pages in the middle of a sequence."""
        decode, _ = self._phases()
        return self._block(self._blocks_loop(decode), self.blocks.fetch_pages, 0, self.blocks.decode_chunk)

    def prefill_chunk(self) -> int:
        """A prefill's chunk of pages for one KV head and tile of queries."""
        _, prefill = self._phases()
        loop = self._chunk_loop(self._blocks_loop(prefill))
        while inner := self.kernel.inside(loop):
            (loop,) = inner
        return loop.num_bundles

    def _phases(self) -> tuple[aot.Loop, aot.Loop]:
        """The loops over query blocks of decodes and of prefills; others on the outside start copies."""
        decode, prefill = (loop for loop in self.kernel.inside(None) if self.kernel.inside(loop))
        return decode, prefill

    def _blocks_loop(self, phase: aot.Loop) -> aot.Loop:
        return next(loop for loop in self.kernel.inside(phase) if self.kernel.inside(loop))

    def _chunk_loop(self, block: aot.Loop) -> aot.Loop:
        return max(self.kernel.inside(block)[5:], key=lambda loop: (len(self.kernel.inside(loop)), loop.num_bundles))

    def _query_block(self, phase: aot.Loop, num_pages: int, num_tokens: int, chunk_pages: int) -> float:
        block, fetch = self._blocks_loop(phase), self.blocks.fetch_pages
        pages = [min(fetch, num_pages - first) for first in range(0, num_pages, fetch)]
        new = [0] * (len(pages) - 1) + [num_tokens]
        blocks = sum(self._block(block, *each, chunk_pages) for each in zip(pages, new, strict=True))
        tiles = sum(loop.num_bundles for loop in self.kernel.inside(phase) if loop != block)
        return self._rest(phase) + self.blocks.num_tiles * tiles + blocks

    def _block(self, block: aot.Loop, num_pages: int, new_tokens: int, chunk_pages: int) -> float:
        start_many, start_one, await_many, await_one, insert, *others = self.kernel.inside(block)
        insert_scales = others.pop(0).num_bundles if self.blocks.has_scales else 0
        chunk = self._chunk_loop(block)
        by_many, by_one = divmod(num_pages, self.blocks.copies_at_once)
        return (
            self._rest(block)
            + by_many * (start_many.num_bundles + await_many.num_bundles)
            + by_one * (start_one.num_bundles + await_one.num_bundles)
            + -(-new_tokens // self.blocks.group_tokens) * (insert.num_bundles + others[0].num_bundles)
            + -(-new_tokens // self.blocks.page_tokens) * insert_scales
            + -(-num_pages // chunk_pages) * self._nest(chunk, self._inner_rounds(chunk))
        )

    def _inner_rounds(self, chunk: aot.Loop) -> list[int]:
        """Of the loops in a chunk's: over tiles, over KV heads; a decode has none."""
        rounds = [count for count in (self.blocks.num_tiles, self.blocks.num_kv_heads) if count > 1]
        return rounds if self.kernel.inside(chunk) else []

    def _nest(self, loop: aot.Loop, rounds: list[int]) -> float:
        """A round of a loop, with the rounds of the one in it, and so on."""
        inner = sum(self._nest(each, rounds[1:]) for each in self.kernel.inside(loop))
        return self._rest(loop) + (rounds[0] * inner if rounds else 0)

    def _rest(self, loop: aot.Loop) -> int:
        """Without the loops in it."""
        return loop.num_bundles - sum(inner.num_bundles for inner in self.kernel.inside(loop))
