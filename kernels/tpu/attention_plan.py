"""Which queries a ragged attention kernel computes together, and which core computes them.

A query block is some consecutive tokens of one row. Rows with one token have blocks of one token (decode), others of
`prefill_tokens`. All of it is computed on the device, once a step: XLA merges what the layers have in common.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

ROW, TOKEN, NUM_TOKENS, KV_END, FIRST_BLOCK = range(5)  # rows of `query_blocks`
DECODE, PREFILL = range(2)  # rows of `bounds`


class AttentionPlan(NamedTuple):
    """What the kernel's scalar core reads."""

    query_blocks: Array  # [5, N] int32: decodes from 0 on, prefills from R on
    bounds: Array  # [2, cores + 1] int32: the query blocks of core c are [bounds[c], bounds[c + 1])


def plan_attention(
    query_start: Array,  # [R + 1] int32
    kv_length: Array,  # [R] int32
    num_tokens: int,
    *,
    prefill_tokens: int,
    block_tokens: int,  # tokens of the cache that are fetched at once
    window: int | None,
    num_cores: int,
) -> AttentionPlan:
    """Cut rows into query blocks, and give each core about as many blocks of the cache. A row stays on one core,
    which writes its pages before it reads them again."""
    num_rows = kv_length.shape[0]
    lengths = jnp.where(kv_length > 0, query_start[1:] - query_start[:-1], 0)
    # A row with more than one token has at least two.
    most_prefills = num_tokens // prefill_tokens + min(num_rows, num_tokens // 2)
    phases = (
        (jnp.where(lengths == 1, lengths, 0), 1, num_rows),
        (jnp.where(lengths > 1, lengths, 0), prefill_tokens, most_prefills),
    )
    blocks: list[Array] = []
    bounds: list[Array] = []
    for lengths_of_phase, size, total in phases:
        counts = -(-lengths_of_phase // size)
        found = _query_blocks(query_start, kv_length, lengths_of_phase, counts, size, total, block_tokens, window)
        starts = jnp.cumsum(counts) - counts
        costs = jnp.where(jnp.arange(total) < counts.sum(), -(-found[KV_END] // block_tokens) - found[FIRST_BLOCK], 0)
        bounds.append(sum(int(before.shape[1]) for before in blocks) + _split(starts, costs, num_cores))
        blocks.append(found)
    return AttentionPlan(jnp.concatenate(blocks, 1).astype(jnp.int32), jnp.stack(bounds).astype(jnp.int32))


def _query_blocks(
    query_start: Array,
    kv_length: Array,
    lengths: Array,
    counts: Array,
    size: int,
    total: int,
    block_tokens: int,
    window: int | None,
) -> Array:
    row = jnp.repeat(jnp.arange(counts.shape[0]), counts, total_repeat_length=total)
    start = (jnp.arange(total) - (jnp.cumsum(counts) - counts)[row]) * size
    count = jnp.minimum(size, lengths[row] - start)
    kv_end = kv_length[row] - lengths[row] + start + count
    first = jnp.zeros_like(kv_end)
    if window is not None:
        first = jnp.maximum(kv_end - count - window + 1, 0) // block_tokens
    return jnp.stack((row, query_start[row] + start, count, kv_end, first))


def _split(starts: Array, costs: Array, num_cores: int) -> Array:
    """[cores + 1]: where the query blocks of each core begin, at the beginning of a row."""
    num_blocks = (costs > 0).sum()
    done = jnp.cumsum(costs) - costs  # before each query block
    edges = [jnp.zeros_like(num_blocks)]
    for core in range(1, num_cores):
        wanted = (done < costs.sum() * core // num_cores).sum()
        edges.append(jnp.minimum(jnp.where(starts >= wanted, starts, num_blocks).min(), num_blocks))
    return jnp.stack([*edges, num_blocks])
