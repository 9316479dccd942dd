"""The TPU's attention kernel in Pallas' TPU interpreter against the reference: shapes, formats, races, the cache."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from torchinfer.batch import KVCache
from torchinfer.kernels.reference.paged_attention import paged_attention
from torchinfer.kernels.reference.quantize_rows import quantize_rows
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages
from torchinfer.testing import Row, make_batch, poisoned_cache

jax = pytest.importorskip("jax")
from jax import numpy as jnp  # noqa: E402
from jax._src.pallas.mosaic import interpret  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from torchinfer.kernels.tpu.attention_chunk import token_of_row  # noqa: E402
from torchinfer.kernels.tpu.page_layout import PAGE_SIZE, PageLayout  # noqa: E402
from torchinfer.kernels.tpu.page_packing import pack_pages, unpack_pages  # noqa: E402
from torchinfer.kernels.tpu.ragged_attention import (  # noqa: E402
    MAX_SCRATCH_BYTES,
    make_config,
    ragged_paged_attention,
    scratch_bytes,
)

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
# Of the largest value: int8 has weights of 14 bits; bfloat16 ones of 8, as have queries.
TOLERANCES = {"int8": 2**-11, "bfloat16": 2**-6, "float8_e4m3fn": 2**-6}
NUM_PADDED = 3
# (new tokens, tokens in the cache) of each row; an empty row is (0, 0).
MIXED = [(1, 0), (1, 62), (1, 127), (1, 128), (0, 0), (1, 300), (9, 120), (2, 255), (3, 0)]
LONG_AMONG_SHORT = [*[(1, size) for size in (3, 0, 40, 7, 31)], (1, 1100), *[(1, size) for size in (1, 12, 2)]]
PREFILLS = [(63, 0), (70, 100), (33, 186)]  # of several query blocks


def to_jax(tensor: torch.Tensor) -> Any:
    """The same bits; neither side knows the other's 8 bit and bfloat16 numbers."""
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):
        bits, name = (torch.int16, "bfloat16") if tensor.dtype == torch.bfloat16 else (torch.uint8, "float8_e4m3fn")
        return jax.lax.bitcast_convert_type(jnp.asarray(tensor.view(bits).numpy()), jnp.dtype(name))
    return jnp.asarray(tensor.numpy())


def bits_of(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array).view(np.dtype(f"u{array.dtype.itemsize}"))


def make_case(rows, heads, kv_heads, size, dtype, sink=None):
    """Query, new keys and values, the cache before and after them, and the batch; slots of nobody are poisoned. With a
    `sink` the first token's score is by so much larger than the others', which are near each other, as are values."""
    num_pages = 2 + sum(-(-(new + old) // PAGE_SIZE) for new, old in rows)
    free = (torch.randperm(num_pages - 1) + 1).tolist()
    cache = poisoned_cache((2, num_pages, PAGE_SIZE, kv_heads, size), DTYPES[dtype])
    batch_rows, new_keys, old = [], [], []
    for new, length in rows:
        pages = [free.pop() for _ in range(-(-(new + length) // PAGE_SIZE))]
        context = torch.randn(2, new + length, kv_heads, size) * torch.rand(2, new + length, kv_heads, 1) * 3
        if sink is not None:
            context[0] /= 10
            context[0, :, :, 0] = 0
            context[0, :1, :, 0] = sink
            context[1] += 1
        slots = [pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(new + length)]
        old.append((context[:, :length], slots[:length]))
        new_keys.append(context[:, length:])
        batch_rows.append(Row([0] * new, length, pages, new + length))
    batch = make_batch(batch_rows, PAGE_SIZE, is_static=True, num_padded_tokens=NUM_PADDED, num_padded_rows=2)
    for context, slots in old:
        write_kv_pages(*context, cache, torch.tensor(slots, dtype=torch.int32))
    new = torch.cat([*new_keys, torch.zeros(2, NUM_PADDED, kv_heads, size)], 1)
    after = KVCache(cache.data.clone(), None if cache.scale is None else cache.scale.clone())
    num_live = new.shape[1] - NUM_PADDED
    write_kv_pages(*new[:, :num_live], after, batch.slot[:num_live])
    query = torch.randn(new.shape[1], heads, size)
    if sink is not None:
        query[:, :, 0] = size**0.5
    return query, new, cache, after, batch


def run(rows, heads, kv_heads, size, dtype, num_cores=1, fetch_pages=2, sink=None, **options):
    """The kernel's output, the reference's, and the pages after the step, the kernel's and the reference's."""
    query, new, before, after, batch = make_case(rows, heads, kv_heads, size, dtype, sink)
    layout = PageLayout(kv_heads, size, dtype)
    config = make_config(layout, heads, num_cores=num_cores, fetch_pages=fetch_pages, **options)
    if before.scale is None:
        numbers, scales = [to_jax(each.to(torch.bfloat16)) for each in new], [None, None]
    else:
        quantized = [quantize_rows(each, DTYPES[dtype]) for each in new]
        numbers, scales = [to_jax(each) for each, _ in quantized], [to_jax(scale) for _, scale in quantized]
    strict = pltpu.InterpretParams(
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        dma_execution_mode="on_wait",
        num_cores_per_device=num_cores,
    )
    compiled = jax.jit(ragged_paged_attention, static_argnames=("config", "scale", "interpret"))
    actual, pages = compiled(
        to_jax(query),
        *numbers,
        *scales,
        packed(before, layout),
        *(to_jax(each) for each in (batch.query_start, batch.kv_length, batch.page_table)),
        config=config,
        scale=size**-0.5,
        interpret=strict,
    )
    jax.block_until_ready(pages)
    assert interpret.races is not None and not interpret.races.races_found
    expected = paged_attention(query, after, batch, size**-0.5, options.get("window"), options.get("soft_cap"))
    return np.asarray(actual), expected.numpy(), pages, packed(after, layout)


def packed(cache: KVCache, layout: PageLayout) -> Any:
    scale = None if cache.scale is None else to_jax(cache.scale)
    return jax.jit(pack_pages, static_argnames="layout")(to_jax(cache.data), scale, layout=layout)


def assert_equal(actual, expected, pages, expected_pages, dtype):
    live = slice(0, len(actual) - NUM_PADDED)
    error = np.abs(actual[live] - expected[live]).max() / np.abs(expected[live]).max()
    assert error < TOLERANCES[dtype]
    assert (actual[-NUM_PADDED:] == 0).all()
    # Bit by bit, page 0 apart, which belongs to nobody: what the step did not write is as it was.
    np.testing.assert_array_equal(np.asarray(pages)[1:], np.asarray(expected_pages)[1:])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype", "options"),
    [
        (4, 2, 128, "int8", {}),
        (4, 4, 80, "int8", {"window": 100}),
        (3, 1, 96, "int8", {"window": 130}),
        (4, 2, 256, "int8", {"soft_cap": 1.5}),
        (6, 2, 80, "float8_e4m3fn", {"window": 1}),
        (5, 1, 96, "bfloat16", {"soft_cap": 1.5}),
        (2, 1, 256, "bfloat16", {"window": 130}),
        (16, 1, 64, "float8_e4m3fn", {"soft_cap": 2.0}),
    ],
)
def test_a_mixed_step_equals_the_reference_and_writes_the_cache(heads, kv_heads, size, dtype, options):
    assert_equal(*run(MIXED, heads, kv_heads, size, dtype, **options), dtype)


def test_a_sequence_of_8192_tokens_among_short_ones():
    """Its first token weighs as much as all others together: they are not lost, though each is far below it."""
    rows = [(1, 5 * size) for size in range(18)]
    rows.insert(9, (1, 8191))
    actual, expected, pages, expected_pages = run(rows, 2, 1, 64, "int8", fetch_pages=16, sink=math.log(8191))
    np.testing.assert_array_equal(np.asarray(pages)[1:], np.asarray(expected_pages)[1:])
    error = np.abs(actual - expected).max((1, 2)) / np.abs(expected).max((1, 2)).clip(min=1e-6)
    assert (error[: len(rows)] < 2**-8).all()


def test_a_long_sequence_among_short_ones_over_two_cores():
    assert_equal(*run(LONG_AMONG_SHORT, 8, 1, 128, "int8", num_cores=2, fetch_pages=4, window=1000), "int8")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "num_cores"),
    [(16, 1, "int8", 1), (16, 1, "bfloat16", 2), (3, 3, "float8_e4m3fn", 2)],  # of 3 tiles of 8 tokens, of one of 24
)
def test_query_blocks_of_one_row_see_what_the_ones_before_wrote(heads, kv_heads, dtype, num_cores):
    assert_equal(*run(PREFILLS, heads, kv_heads, 64, dtype, num_cores, fetch_pages=1, max_prefill_tokens=24), dtype)


def test_a_query_block_of_many_tiles_sees_all_before_each_token_and_no_more_than_its_window():
    assert_equal(*run(PREFILLS, 16, 2, 64, "int8", fetch_pages=2, window=50), "int8")


@pytest.mark.parametrize("group_size", range(1, 129))
def test_rows_of_a_group_are_of_one_token(group_size):
    rows = np.arange(2**11, dtype=np.int32)
    np.testing.assert_array_equal(token_of_row(rows, group_size), rows // group_size)


def test_scales_of_more_heads_than_a_row_has_lanes():
    assert_equal(*run([(3, 126)], 66, 66, 16, "int8", fetch_pages=1), "int8")


def test_a_query_block_has_the_tokens_that_its_memory_holds():
    few, many = (make_config(PageLayout(heads, 128, "int8"), heads) for heads in (8, 64))
    assert few.prefill_tokens == 256 and many.prefill_tokens < 128
    assert max(map(scratch_bytes, (few, many))) <= MAX_SCRATCH_BYTES


def test_a_step_without_tokens_changes_nothing():
    actual, _, pages, expected_pages = run([(0, 0), (0, 0)], 4, 2, 64, "int8")
    assert (actual == 0).all()
    np.testing.assert_array_equal(np.asarray(pages), np.asarray(expected_pages))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "size"), [(1, 16), (3, 64), (2, 80), (8, 128), (1, 256)])
def test_pages_that_are_packed_and_unpacked_are_the_same(kv_heads, size, dtype):
    layout = PageLayout(kv_heads, size, dtype)
    data = torch.randint(0, 2**7, (2, 3, PAGE_SIZE, kv_heads, size * DTYPES[dtype].itemsize)).to(torch.uint8)
    data = data.view(DTYPES[dtype])
    scale = None if dtype == "bfloat16" else torch.rand(2, 3, PAGE_SIZE, kv_heads)
    pages = packed(KVCache(data, scale), layout)
    assert pages.shape == layout.shape(3)
    found, found_scale = jax.jit(unpack_pages, static_argnames="layout")(pages, layout=layout)
    np.testing.assert_array_equal(bits_of(found), bits_of(to_jax(data)))
    if scale is not None:
        np.testing.assert_array_equal(np.asarray(found_scale), scale.numpy())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype", "options", "message"),
    [
        (6, 4, "int8", {}, "6 query heads over 4 KV heads"),
        (129, 1, "int8", {}, "129 query heads over 1 KV heads: each KV head needs 1 to 128"),
        (4, 4, "float16", {}, "float16 is not among bfloat16, int8, float8_e4m3fn"),
        (4, 4, "int8", {"window": 0}, "window=0"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(heads, kv_heads, dtype, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(PageLayout(kv_heads, 64, dtype), heads, **options)


def test_arrays_that_do_not_fit_the_layout_are_refused_together():
    config = make_config(PageLayout(2, 64, "int8"), 4)
    numbers = jnp.zeros((8, 2, 64), jnp.bfloat16)
    ints = jnp.zeros(2, jnp.int32)
    with pytest.raises(
        ValueError, match=r"\(3, 64\) is not \(4, 64\); key's dtype bfloat16 is not int8; shape of pages"
    ):
        ragged_paged_attention(
            jnp.zeros((8, 3, 64)), numbers, numbers, None, None, jnp.zeros((4, 8, 128), jnp.int32), ints, ints[:1],
            jnp.zeros((1, 1), jnp.int32), config=config, scale=1.0,
        )  # fmt: skip
