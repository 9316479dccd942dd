"""Attention in the CPU library on every level: against float64, and its bits against its bits in another step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from torchinfer.batch import KVCache
from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.paged_attention import paged_attention
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages
from torchinfer.testing import Row, assert_close, make_batch, poisoned_cache

PAGE_SIZE = 8
# (new tokens, tokens in the cache) of each row: around pages of 8, tiles of 64 and spans of 512.
STEPS = {
    "decode": [(1, 0), (1, 6), (1, 8), (1, 63), (1, 64), (1, 300)],
    "one long row": [(1, 1100)],
    "ends of spans": [(1, 510), (1, 511), (1, 512), (1, 1023)],
    "mixed": [(1, 0), (1, 23), (17, 0), (4, 12), (70, 450), (65, 0)],
}
OPTIONS = {"plain": (None, None), "window": (5, None), "wide window": (600, 1.5), "one": (1, None), "cap": (None, 1.5)}
SHAPES = [(6, 3, 10), (5, 1, 63), (4, 4, 24), (8, 1, 64), (71, 1, 64), (4, 2, 80), (2, 1, 96), (8, 2, 128), (2, 2, 256)]
CACHES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@cache
def make_case(step, heads, kv_heads, size, dtype, cache_dtype, page_size=PAGE_SIZE):
    """Query, poisoned cache, batch, and what the cache holds of each row, float64 [2, length, kv_heads, size]."""
    generator = torch.Generator().manual_seed(0)
    num_pages = 2 + sum(-(-(new + old) // page_size) for new, old in step)
    free = (torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    kv_cache = poisoned_cache((2, num_pages, page_size, kv_heads, size), cache_dtype)
    rows, contexts = [], []
    for new, old in step:
        length = new + old
        pages = [free.pop() for _ in range(-(-length // page_size))]
        context = torch.randn(2, length, kv_heads, size, generator=generator).to(dtype)
        slots = [pages[position // page_size] * page_size + position % page_size for position in range(length)]
        write_kv_pages(*context, kv_cache, torch.tensor(slots, dtype=torch.int32))
        rows.append(Row([0] * new, old, pages, length))
        values = kv_cache.data.double().flatten(1, 2)[:, slots]
        if kv_cache.scale is not None:
            values = values * kv_cache.scale.double().flatten(1, 2)[:, slots, :, None]
        contexts.append(values)
    batch = make_batch(rows, page_size)
    query = torch.randn(len(batch.tokens), heads, size, generator=generator).to(dtype)
    return query, kv_cache, batch, contexts


@cache
def by_hand(step, heads, kv_heads, size, dtype, cache_dtype, option):
    query, _, batch, contexts = make_case(step, heads, kv_heads, size, dtype, cache_dtype)
    window, soft_cap = OPTIONS[option]
    parts = []
    for row, (keys, values) in enumerate(contexts):
        tokens = slice(int(batch.query_start[row]), int(batch.query_start[row + 1]))
        grouped = query[tokens].double().unflatten(1, (kv_heads, -1))
        scores = torch.einsum("tkgd,lkd->tkgl", grouped, keys) * 0.2
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position, key = batch.positions[tokens, None], torch.arange(len(keys))
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
        parts.append(torch.einsum("tkgl,lkd->tkgd", weights, values).flatten(1, 2))
    return torch.cat(parts)


def run(case, option="plain"):
    query, kv_cache, batch, _ = case
    return paged_attention(query, kv_cache, batch, 0.2, *OPTIONS[option])


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("step", STEPS)
def test_equals_float64(level, step, option, dtype, cache_dtype):
    key = tuple(STEPS[step]), 6, 3, 10, dtype, cache_dtype
    actual = run(make_case(*key), option)
    assert actual.dtype == dtype
    assert_close(actual, by_hand(*key, option))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_sizes_and_groups(level, shape, dtype, cache_dtype):
    key = ((1, 100), (1, 7), (21, 30)), *shape, dtype, cache_dtype
    assert_close(run(make_case(*key), "plain"), by_hand(*key, "plain"))


def alone(case, row, token, option):
    """A token's result in a step of its own."""
    query, kv_cache, batch, _ = case
    index = int(batch.query_start[row]) + token
    length = int(batch.positions[index]) + 1
    one = replace(
        batch,
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        kv_length=torch.tensor([length], dtype=torch.int32),
        page_table=batch.page_table[row : row + 1].contiguous(),
    )
    return paged_attention(query[index : index + 1], kv_cache, one, 0.2, *OPTIONS[option])


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["plain", "wide window"])
def test_a_token_has_the_same_bits_alone_and_in_any_step_and_chunk(level, num_threads, option, dtype, cache_dtype):
    step = ((1, 1100), (1, 30), (1, 512), (70, 450), (130, 0))
    case = make_case(step, 6, 3, 24, dtype, cache_dtype)
    together = run(case, option)
    starts = case[2].query_start.tolist()
    for row, (new, _) in enumerate(step):
        for token in {0, new // 2, new - 1}:
            result = together[starts[row] + token]
            assert torch.equal(alone(case, row, token, option)[0].view(torch.uint8), result.view(torch.uint8))


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_many_rows_have_the_same_bits_as_few(level, cache_dtype):
    step = tuple((1, 17 * index) for index in range(40))
    case = make_case(step, 8, 2, 64, torch.bfloat16, cache_dtype)
    together = run(case)
    for row in (0, 11, 39):
        assert torch.equal(alone(case, row, 0, "plain")[0], together[row])


@pytest.mark.parametrize("page_size", [1, 5, 16, 128, 2048])
def test_page_sizes(level, page_size):
    key = ((1, 600), (9, 127)), 4, 2, 24, torch.float32, torch.float32
    assert torch.equal(run(make_case(*key, page_size)), run(make_case(*key)))


def test_padded_tokens_are_zeros(level):
    query, kv_cache, batch, _ = make_case(tuple(STEPS["mixed"]), 4, 2, 24, torch.bfloat16, torch.int8)
    padded = torch.cat((query, torch.full((3, 4, 24), torch.nan, dtype=query.dtype)))
    actual = paged_attention(padded, kv_cache, batch, 0.2, None, None)
    assert torch.equal(actual[:-3], run((query, kv_cache, batch, None))) and actual[-3:].count_nonzero() == 0


def test_rows_without_tokens_are_passed_over(level):
    query, kv_cache, batch, _ = make_case(((1, 20), (3, 9)), 4, 2, 24, torch.float32, torch.float32)
    end = batch.query_start[-1:]
    padded = replace(
        batch,
        query_start=torch.cat((batch.query_start, end)),
        kv_length=torch.cat((batch.kv_length, torch.zeros(1, dtype=torch.int32))),
        page_table=torch.cat((batch.page_table, torch.full_like(batch.page_table[:1], -1))),
    )
    assert torch.equal(run((query, kv_cache, padded, None)), run((query, kv_cache, batch, None)))


def test_queries_may_lie_apart(level):
    query, kv_cache, batch, _ = make_case(((1, 20), (3, 9)), 4, 2, 24, torch.float32, torch.float32)
    wide = torch.full((4, 9, 24), torch.nan)
    wide[:, 2:6] = query
    expected = run((query, kv_cache, batch, None))
    assert torch.equal(run((wide[:, 2:6], kv_cache, batch, None)), expected)
    assert torch.equal(run((query.transpose(1, 2).contiguous().transpose(1, 2), kv_cache, batch, None)), expected)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_large_numbers_keep_their_place(level, cache_dtype):
    """Scores far apart: one key takes all of the weight."""
    query, kv_cache, batch, contexts = make_case(((1, 700),), 4, 2, 64, torch.bfloat16, cache_dtype)
    actual = paged_attention(query, kv_cache, batch, 100.0, None, None)
    keys, values = contexts[0]
    scores = torch.einsum("kgd,lkd->kgl", query[0].double().unflatten(0, (2, 2)), keys) * 100
    expected = torch.einsum("kgl,lkd->kgd", scores.softmax(-1), values).flatten(0, 1)
    assert_close(actual[0], expected)


@pytest.mark.parametrize("cache_dtype", CACHES)
def test_a_broken_key_shows_in_its_row_only(level, cache_dtype):
    query, kv_cache, batch, _ = make_case(((1, 20), (1, 9)), 4, 2, 24, torch.bfloat16, cache_dtype)
    broken = KVCache(kv_cache.data.clone(), None if kv_cache.scale is None else kv_cache.scale.clone())
    page = int(batch.page_table[1, 0])
    (broken.data if broken.scale is None else broken.scale)[0, page, 3] = torch.nan
    assert run((query, broken, batch, None)).isnan().flatten(1).any(1).tolist() == [False, True]


def test_no_tokens_and_no_rows(level):
    query, kv_cache, batch, _ = make_case(((1, 20),), 4, 2, 24, torch.float32, torch.float32)
    empty = replace(
        batch, query_start=batch.query_start[:1], kv_length=batch.kv_length[:0], page_table=batch.page_table[:0]
    )
    assert run((query[:0], kv_cache, empty, None)).shape == (0, 4, 24)
    assert run((query, kv_cache, empty, None)).count_nonzero() == 0


def broken(**changes):
    query, kv_cache, batch, _ = make_case(((1, 20), (3, 9)), 4, 2, 24, torch.float32, torch.float32)
    return query, kv_cache, replace(batch, **changes), None


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {"page_table": int32([[1, 2, 10**6], [3, 4, 5]])},
        {"page_table": int32([[1, 2, -1], [3, 4, 5]])},
        {"kv_length": int32([21, 10**9])},
        {"kv_length": int32([25, 12])},
        {"kv_length": int32([21, 2])},
        {"kv_length": int32([0, 12])},
        {"kv_length": int32([-3, 12])},
        {"query_start": int32([0, 1, 5])},
        {"query_start": int32([0, 5, 4])},
        {"query_start": int32([1, 2, 4])},
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="does not fit"):
        run(broken(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"page_table": torch.zeros(2, 3, dtype=torch.int64)},
        {"page_table": torch.zeros(3, 2, dtype=torch.int32).T},
        {"page_table": int32([[1, 2, 3]])},
        {"query_start": int32([0, 1])},
        {"kv_length": torch.tensor([21.0, 12.0])},
        {"page_size": 16},
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match=r"paged_attention takes|a batch has"):
        run(broken(**changes))


def test_caches_that_do_not_fit_are_refused():
    query, kv_cache, batch, _ = broken()
    apart = kv_cache.data.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="contiguous"):
        run((query, KVCache(apart), batch, None))
    with pytest.raises(ValueError, match="scales are"):
        run((query, KVCache(kv_cache.data.to(torch.int8), torch.ones(2, 3)), batch, None))
    with pytest.raises(ValueError, match="does not fit"):
        run((query, KVCache(kv_cache.data.to(torch.int8)), batch, None))
    with pytest.raises(ValueError, match="does not fit"):
        run((query[:, :3], kv_cache, batch, None))
    with pytest.raises(ValueError, match="window"):
        paged_attention(query, kv_cache, batch, 0.2, 0, None)


def test_several_spans_are_used_by_all_threads():
    library.configure(2)
    try:
        two = run(make_case(((1, 3000),), 8, 1, 64, torch.bfloat16, torch.bfloat16))
        library.configure(1)
        assert torch.equal(two, run(make_case(((1, 3000),), 8, 1, 64, torch.bfloat16, torch.bfloat16)))
    finally:
        library.configure()
