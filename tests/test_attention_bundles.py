"""Bundles of the attention kernel, of loops by hand: what a call runs is counted as often as it runs."""

from __future__ import annotations

import pytest

from torchinfer.aot import Kernel, Loop
from torchinfer.attention_bundles import AttentionBlocks, AttentionBundles

START_4, START_1, AWAIT_4, AWAIT_1, INSERT, GROUP, SCALES, CHUNK, HEAD = 100, 30, 6, 5, 70, 20, 10, 500, 400
DECODE_REST, PREFILL_REST, BLOCK_REST = 40, 60, 300
BLOCKS = AttentionBlocks(
    fetch_pages=10,
    decode_chunk=5,
    prefill_chunk=2,
    prefill_tokens=32,
    copies_at_once=4,
    num_kv_heads=8,
    group_tokens=32,
)


def kernel(has_heads: bool) -> Kernel:
    """Two loops that start copies, the decodes, the prefills with one more fetch; 50 bundles in no loop."""
    loops, first = [Loop(10, 30), Loop(40, 30)], 100
    for rest, late in ((DECODE_REST, ()), (PREFILL_REST, (START_4, START_1))):
        inner = [START_4, START_1, AWAIT_4, AWAIT_1, INSERT, GROUP, SCALES, *late, CHUNK, 3]
        size = BLOCK_REST + sum(inner)
        loops += [Loop(first, rest + size), Loop(first + rest, size)]
        at = first + rest + BLOCK_REST
        for number in inner:
            loops.append(Loop(at, number))
            if number == CHUNK and late and has_heads:
                loops.append(Loop(at + 20, HEAD))
            at += number
        first = at
    total = 50 + sum(loop.num_bundles for loop in Kernel(0, tuple(loops)).inside(None))
    return Kernel(total, tuple(loops))


def test_a_decodes_block_fetches_its_pages_and_computes_its_chunks():
    expected = BLOCK_REST + 2 * (START_4 + AWAIT_4) + 2 * (START_1 + AWAIT_1) + 2 * CHUNK
    assert AttentionBundles(kernel(True), BLOCKS).decode_block() == expected


@pytest.mark.parametrize(("has_heads", "chunk"), [(True, CHUNK - HEAD + 8 * HEAD), (False, CHUNK)])
def test_a_call_runs_every_block_of_each_query_block(has_heads, chunk):
    """13 pages are a block of 10 and one of 3, where the new tokens are."""
    counted = AttentionBundles(kernel(has_heads), BLOCKS)
    copies = 2 * (START_4 + AWAIT_4) + (2 + 3) * (START_1 + AWAIT_1)
    decode = DECODE_REST + 2 * BLOCK_REST + copies + INSERT + GROUP + (2 + 1) * CHUNK
    prefill = PREFILL_REST + 2 * BLOCK_REST + copies + 32 * INSERT + GROUP + (5 + 2) * chunk
    assert counted.call(0, 0, 13) == 50
    assert counted.call(7, 0, 13) == 50 + 7 * decode
    assert counted.call(0.5, 3, 13) == 50 + 0.5 * decode + 3 * prefill
    assert counted.prefill_chunk() == (HEAD if has_heads else CHUNK)
