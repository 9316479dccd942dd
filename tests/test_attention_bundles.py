"""Bundles of the attention kernel, of loops by hand: what a call runs is counted as often as it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchinfer.aot import Kernel, Loop
from torchinfer.attention_bundles import AttentionBlocks, AttentionBundles

START_4, START_1, AWAIT_4, AWAIT_1, INSERT, INSERT_SCALES, GROUP, SCALES = 100, 30, 6, 5, 70, 60, 20, 10
CHUNK, TILE, HEAD, PREPARE, FINISH = 500, 450, 400, 90, 80
DECODE_REST, PREFILL_REST, BLOCK_REST = 40, 60, 300
BLOCKS = AttentionBlocks(
    fetch_pages=10,
    decode_chunk=5,
    prefill_chunk=2,
    prefill_tokens=160,
    num_tiles=1,
    copies_at_once=4,
    num_kv_heads=8,
    group_tokens=32,
    has_scales=True,
    page_tokens=128,
)


def kernel(has_heads: bool, has_tiles: bool = False) -> Kernel:
    """Two loops that start copies, the decodes, the prefills with one more fetch; 50 bundles in no loop."""
    loops, first = [Loop(10, 30), Loop(40, 30)], 100
    for rest, late in ((DECODE_REST, ()), (PREFILL_REST, (START_4, START_1))):
        tiles = (PREPARE, FINISH) if late and has_tiles else (0, 0)
        inner = [START_4, START_1, AWAIT_4, AWAIT_1, INSERT, INSERT_SCALES, GROUP, SCALES, *late, CHUNK, 3]
        size, start = BLOCK_REST + sum(inner), first + rest + tiles[0]
        loops += [Loop(first, rest + sum(tiles) + size), Loop(start, size)]
        loops += [Loop(at, size) for at, size in ((first + rest, tiles[0]), (start + size, tiles[1])) if size]
        at = start + BLOCK_REST
        for number in inner:
            loops.append(Loop(at, number))
            if number == CHUNK and late:
                loops += [Loop(at + 10, TILE)] if has_tiles else []
                loops += [Loop(at + 20, HEAD)] if has_heads else []
            at += number
        first = start + size + tiles[1]
    total = 50 + sum(loop.num_bundles for loop in Kernel(0, tuple(loops)).inside(None))
    return Kernel(total, tuple(loops))


def test_a_decodes_block_fetches_its_pages_and_computes_its_chunks():
    expected = BLOCK_REST + 2 * (START_4 + AWAIT_4) + 2 * (START_1 + AWAIT_1) + 2 * CHUNK
    assert AttentionBundles(kernel(True), BLOCKS).decode_block() == expected


@pytest.mark.parametrize(
    ("num_tiles", "num_kv_heads", "chunk"),
    [
        (1, 8, CHUNK - HEAD + 8 * HEAD),
        (1, 1, CHUNK),
        (3, 8, CHUNK - TILE + 3 * (TILE - HEAD + 8 * HEAD)),
        (3, 1, CHUNK - TILE + 3 * TILE),
    ],
)
def test_a_call_runs_every_block_of_each_query_block(num_tiles, num_kv_heads, chunk):
    """13 pages are a block of 10 and one of 3, where the new tokens are: 160 are 5 groups, with scales in 2 pages."""
    blocks = replace(BLOCKS, num_tiles=num_tiles, num_kv_heads=num_kv_heads)
    counted = AttentionBundles(kernel(num_kv_heads > 1, num_tiles > 1), blocks)
    copies = 2 * (START_4 + AWAIT_4) + (2 + 3) * (START_1 + AWAIT_1)
    decode = DECODE_REST + 2 * BLOCK_REST + copies + INSERT + INSERT_SCALES + GROUP + (2 + 1) * CHUNK
    prefill = PREFILL_REST + 2 * BLOCK_REST + copies + 5 * (INSERT + GROUP) + 2 * INSERT_SCALES + (5 + 2) * chunk
    prefill += num_tiles * (PREPARE + FINISH) if num_tiles > 1 else 0
    assert counted.call(0, 0, 13) == 50
    assert counted.call(7, 0, 13) == 50 + 7 * decode
    assert counted.call(0.5, 3, 13) == 50 + 0.5 * decode + 3 * prefill
    assert counted.prefill_chunk() == (HEAD if num_kv_heads > 1 else TILE if num_tiles > 1 else CHUNK)


def test_a_cache_without_scales_has_no_loop_for_them():
    counted = AttentionBundles(kernel(True), replace(BLOCKS, has_scales=False))
    with_scales = AttentionBundles(kernel(True), BLOCKS)
    # The loop behind that of groups is then the one that writes back.
    assert with_scales.call(1, 0, 1) - counted.call(1, 0, 1) == GROUP
