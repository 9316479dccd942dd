"""Ragged paged attention for TPU v5: decodes and chunks of prompts in one kernel, which also writes the cache.

A plain function of jax. The cache is bfloat16, int8 or e4m3 with a scale for each token and KV head; scales meet scores
and probabilities, never keys and values. Source: arXiv 2604.15464 (ragged), 2309.06180 (paged).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.attention_chunk import LOG2_E, ROOM, KernelConfig
from torchinfer.kernels.tpu.attention_plan import plan_attention
from torchinfer.kernels.tpu.page_layout import LANES, PAGE_SIZE, SUBLANES, PageLayout, head_problem
from torchinfer.kernels.tpu.ragged_attention_kernel import attention_kernel
from torchinfer.kernels.tpu.token_insertion import fresh_rows

CHUNK_BYTES = 9 * 2**17  # of pages that are computed at once, at most
FETCH_BYTES = 2**21  # of pages that are fetched at once, at least: more than is on its way during the memory's latency
MAX_CHUNK_PAGES = {1: 8, 2: 16}  # by cores: v5e's memory takes longer for a page than a core's share of v5p's
PREFILL_CHUNK_PAGES = 4
PREFILL_ROWS = 128  # of queries for each KV head that are computed at once: the matrix unit's height
MAX_PREFILL_TOKENS = 256  # of a query block, which fetches all that it sees
MAX_SCRATCH_BYTES = 36 * 2**20  # of 128 MiB a core on v5e, 64 MiB on v5p
TEMPORARY_BYTES = 8 * 2**20  # what the compiler may take beside


def make_config(
    layout: PageLayout,
    num_heads: int,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    num_cores: int = 1,
    fetch_pages: int | None = None,
    max_prefill_tokens: int = MAX_PREFILL_TOKENS,
) -> KernelConfig:
    """The sizes of blocks for a model's heads.

    A decode computes as many pages at once as are about a mebibyte, a power of two up to 8 or 16: fewer leave the
    matrix unit waiting for itself, more are empty where contexts are short. It fetches whole chunks, at least two
    mebibytes. A query block of a prompt has as many tokens as fit the chip's memory: all of them meet the pages that it
    fetches, a tile after the other.

    Raises:
        ValueError: for heads, a dtype or a window that the kernel cannot take.
    """
    heads = layout.num_kv_heads
    problem = head_problem(num_heads, heads, layout.dtype)
    if problem is not None:
        raise ValueError(problem)
    if window is not None and window < 1:
        raise ValueError(f"window={window} lets a token see nothing; it must be at least 1")
    fits = [size for size in (16, 8, 4, 2, 1) if size * layout.page_bytes <= CHUNK_BYTES]
    chunk = min(fits[0] if fits else 1, fetch_pages or MAX_CHUNK_PAGES[num_cores])
    prefill_chunk = min(PREFILL_CHUNK_PAGES, fetch_pages or PREFILL_CHUNK_PAGES)
    multiple = max(chunk, prefill_chunk)  # powers of two
    fetch = fetch_pages or multiple * -(-FETCH_BYTES // (multiple * layout.page_bytes))
    if fetch % chunk or fetch % prefill_chunk:
        raise ValueError(f"fetch_pages={fetch} is no multiple of the {multiple} pages that are computed at once")
    whole = max(SUBLANES, min(PREFILL_ROWS // (num_heads // heads), max_prefill_tokens) // SUBLANES * SUBLANES)
    configs = [
        KernelConfig(layout, num_heads, fetch, chunk, prefill_chunk, count * tile, tile, window, soft_cap, num_cores)
        for tile in (whole, *[size for size in (64, 32, 16, 8) if size < whole])
        for count in range(max(max_prefill_tokens // tile, 1), 0, -1)
    ]
    return next((config for config in configs if scratch_bytes(config) <= MAX_SCRATCH_BYTES), configs[-1])


def scratch_bytes(config: KernelConfig) -> int:
    """Of a core's VMEM, what the kernel keeps there itself."""
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in _scratch(config))


def _scratch(config: KernelConfig) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of kv, q, fresh, result, operand, q_scale, highest, total and acc."""
    layout, most, width = config.layout, config.prefill_tokens, config.key_width
    rows = config.rows(config.tile_tokens)
    tiles = (config.num_tiles, layout.num_kv_heads)
    return [
        ((2, config.fetch_pages, layout.num_rows, LANES), "int32"),
        ((2, most, config.query_heads, width), "float32"),
        ((2, (most + 2 * ROOM + SUBLANES) * layout.fresh_rows, LANES), "int32"),
        ((most, config.out_heads, width), "float32"),
        ((*tiles, config.planes * rows, width), "int8" if layout.dtype == "int8" else "bfloat16"),
        *[((*tiles, rows, LANES), "float32")] * 3,
        ((*tiles, rows, width), "float32"),
    ]


def ragged_paged_attention(
    query: Array,
    key: Array,
    value: Array,
    key_scale: Array | None,
    value_scale: Array | None,
    pages: Array,
    query_start: Array,
    kv_length: Array,
    page_table: Array,
    *,
    config: KernelConfig,
    scale: float,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Write each token's key and value into its page, then attend: see the door's paged_attention.

    query: [T, H, D]; key, value: [T, K, D] of the cache's dtype, with scales [T, K] float32 unless it is bfloat16;
    pages: int32 [P, rows, 128] (see `page_layout`), written in place; query_start [R + 1], kv_length [R] (0: an empty
    row), page_table [R, max_pages] int32. A row's tokens are the last ones of its context, and on pages that no other
    row writes. Returns float32 [T, H, D], zeros for tokens of no row, and the pages.
    """
    _check(query, key, pages, page_table, config)
    num_tokens, num_heads, head_dim = query.shape
    layout = config.layout
    plan = plan_attention(
        query_start,
        kv_length,
        num_tokens,
        prefill_tokens=config.prefill_tokens,
        block_tokens=config.block_tokens,
        window=config.window,
        num_cores=config.num_cores,
    )
    widths = ((0, 0), (0, config.query_heads - num_heads), (0, config.key_width - head_dim))
    # Weights are powers of 2; behind a soft cap the kernel multiplies by log2(e) itself.
    factor = scale if config.soft_cap is not None else scale * LOG2_E
    queries = jnp.pad(query.astype(jnp.float32) * factor, widths)
    new = fresh_rows(key, value, key_scale, value_scale, layout)
    out, pages = _call(config, num_tokens, pages.shape, page_table.shape, interpret)(
        *plan, page_table, queries, new, pages
    )
    lane = layout.value_lane
    is_live = jnp.arange(num_tokens) < jnp.where(kv_length > 0, query_start[1:], 0).max()
    return jnp.where(is_live[:, None, None], out[:, :num_heads, lane : lane + head_dim], 0), pages


def _check(query: Array, key: Array, pages: Array, page_table: Array, config: KernelConfig) -> None:
    layout = config.layout
    problems = [
        (query.shape[1:], (config.num_heads, layout.head_dim), "query's heads and head size"),
        (key.shape[1:], (layout.num_kv_heads, layout.head_dim), "key's heads and head size"),
        (key.dtype, jnp.dtype(layout.dtype), "key's dtype"),
        (pages.shape, layout.shape(pages.shape[0]), "shape of pages"),
    ]
    found = [f"{name} {value} is not {wanted}" for value, wanted, name in problems if value != wanted]
    if found:
        raise ValueError("; ".join(found))


@functools.lru_cache
def _call(
    config: KernelConfig, num_tokens: int, pages_shape: tuple[int, ...], table_shape: tuple[int, ...], interpret: Any
) -> Any:
    width = config.key_width
    scratch = [
        *[pltpu.VMEM(shape, jnp.dtype(dtype)) for shape, dtype in _scratch(config)],
        *[pltpu.SemaphoreType.DMA((2,)) for _ in ("kv", "q")],
        *[pltpu.SemaphoreType.DMA for _ in ("out", "write")],
    ]
    in_hbm = pl.BlockSpec(memory_space=pltpu.ANY)
    seen = _pages_seen(config, num_tokens, pages_shape[0], *table_shape)
    return pl.pallas_call(
        functools.partial(attention_kernel, config=config),
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, config.out_heads, width), jnp.float32),
            jax.ShapeDtypeStruct(pages_shape, jnp.int32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            in_specs=[in_hbm] * 3,
            out_specs=[in_hbm] * 2,
            scratch_shapes=scratch,
            grid=(config.num_cores,),
        ),
        input_output_aliases={5: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if config.num_cores > 1 else "arbitrary",),
            vmem_limit_bytes=scratch_bytes(config) + TEMPORARY_BYTES,
            disable_bounds_checks=True,  # half of what it takes to start a copy; pages are ours, not a request's
        ),
        cost_estimate=_cost(config, num_tokens, table_shape[0], seen),
        name="ragged_paged_attention",
        interpret=interpret,
    )


def _pages_seen(config: KernelConfig, num_tokens: int, num_pages: int, num_rows: int, table_width: int) -> int:
    """Pages that all query blocks fetch, if every row decodes behind a full page table, as far as there are pages, and
    tokens beyond one a row are those of a prompt, in query blocks behind full tables too."""
    width = table_width
    if config.window is not None:
        width = min(width, -(-(config.window - 1) // PAGE_SIZE) + 1)
    num_decodes, num_prefills = _query_blocks(config, num_tokens, num_rows)
    return min(num_decodes * width, num_pages - 1) + num_prefills * width


def _query_blocks(config: KernelConfig, num_tokens: int, num_rows: int) -> tuple[int, int]:
    """Of decodes and of prefills, if every row decodes and all other tokens are those of a prompt."""
    num_decodes = min(num_rows, num_tokens)
    return num_decodes, -(-(num_tokens - num_decodes) // config.prefill_tokens)


def _cost(config: KernelConfig, num_tokens: int, num_rows: int, num_pages_seen: int) -> pl.CostEstimate:
    """What the compiler is told, which knows nothing of the inside: pages that are fetched, queries and new tokens,
    results; of each query block the groups of tokens that are written back, which may begin in the middle of one, and
    a page's scales."""
    layout = config.layout
    numbers = (config.query_heads + config.out_heads) * config.key_width + config.layout.fresh_rows * LANES
    num_decodes, num_prefills = _query_blocks(config, num_tokens, num_rows)
    groups = num_decodes + num_prefills * (-(-config.prefill_tokens // layout.group_tokens) + 1)
    changed = groups * layout.group_rows + (num_decodes + num_prefills) * layout.scale_rows
    scores = config.num_heads * PAGE_SIZE * num_pages_seen
    return pl.CostEstimate(
        flops=4 * scores * config.key_width,
        transcendentals=scores,
        bytes_accessed=num_pages_seen * layout.page_bytes + 4 * (num_tokens * numbers + changed * LANES),
    )
