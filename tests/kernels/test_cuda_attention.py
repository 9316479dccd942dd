"""Ragged paged attention in Triton against float64, and its bits against its bits in another step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from torchinfer.batch import KVCache
from torchinfer.kernels.cuda.paged_attention import paged_attention
from torchinfer.kernels.reference.paged_attention import paged_attention as reference
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages
from torchinfer.testing import Row, assert_close, make_batch, poisoned_cache

PAGE_SIZE = 8
# (new tokens, tokens in the cache) of each row: around pages of 8, tiles of 64 and spans of 512.
STEPS = {
    "decode": ((1, 0), (1, 7), (1, 63), (1, 64), (1, 575)),
    "mixed": ((1, 0), (1, 23), (17, 0), (70, 90), (1, 20)),
}
OPTIONS = {"plain": (None, None), "window": (5, None), "wide window": (600, 1.5), "one": (1, None), "cap": (None, 1.5)}
SHAPES = [(5, 1, 63), (71, 1, 64), (4, 4, 10), (4, 2, 80), (2, 1, 96), (4, 1, 128), (2, 2, 256)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e4m3fn),
]


@cache
def make_case(step, heads, kv_heads, size, dtype, cache_dtype, device):
    """Query, poisoned cache, batch, and the cache's numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    num_pages = 2 + sum(-(-(new + old) // PAGE_SIZE) for new, old in step)
    free = (torch.randperm(num_pages - 1, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    kv_cache = poisoned_cache((2, num_pages, PAGE_SIZE, kv_heads, size), cache_dtype)
    rows = []
    for new, old in step:
        pages = [free.pop() for _ in range(-(-(new + old) // PAGE_SIZE))]
        context = torch.randn(2, new + old, kv_heads, size, generator=generator).to(dtype)
        slots = [pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for position in range(new + old)]
        write_kv_pages(*context, kv_cache, torch.tensor(slots, dtype=torch.int32))
        rows.append(Row([0] * new, old, pages, new + old))
    numbers = kv_cache.data.double() * (1.0 if kv_cache.scale is None else kv_cache.scale.double()[..., None])
    query = torch.randn(sum(new for new, _ in step), heads, size, generator=generator).to(dtype)
    moved = KVCache(*(tensor.to(device) for tensor in kv_cache.tensors))
    return query.to(device), moved, make_batch(rows, PAGE_SIZE, device=device), KVCache(numbers)


def run(case, option="plain"):
    query, kv_cache, batch, _ = case
    return paged_attention(query, kv_cache, batch, 0.2, *OPTIONS[option])


def by_reference(case, option):
    query, _, batch, numbers = case
    tables = {name: getattr(batch, name).cpu() for name in ("query_start", "kv_length", "page_table")}
    return reference(query.cpu().double(), numbers, replace(batch, **tables), 0.2, *OPTIONS[option])


def check(case, option="plain"):
    actual = run(case, option)
    assert actual.dtype == case[0].dtype
    assert_close(actual.cpu(), by_reference(case, option), actual.dtype)


@pytest.mark.parametrize(("dtype", "cache_dtype"), DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_equals_float64(gpu, step, dtype, cache_dtype):
    check(make_case(STEPS[step], 6, 2, 24, dtype, cache_dtype, gpu))


@pytest.mark.parametrize("option", ["window", "wide window", "one", "cap"])
@pytest.mark.parametrize("step", STEPS)
def test_windows_and_soft_caps(gpu, step, option):
    check(make_case(STEPS[step], 6, 2, 24, torch.bfloat16, torch.int8, gpu), option)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_sizes_and_groups(gpu, shape):
    check(make_case(((1, 70), (5, 30)), *shape, torch.bfloat16, torch.int8, gpu))


def alone(case, row, num_tokens):
    """The last tokens of a row in a step of their own, without what the host knows."""
    query, kv_cache, batch, _ = case
    end = int(batch.query_start[row + 1])
    one = replace(
        batch,
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32, device=query.device),
        kv_length=batch.kv_length[row : row + 1],
        page_table=batch.page_table[row : row + 1].contiguous(),
        num_decodes=None,
        max_decode_kv_length=None,
        prefills=None,
    )
    return paged_attention(query[end - num_tokens : end].contiguous(), kv_cache, one, 0.2, *OPTIONS["wide window"])


def test_a_token_has_the_same_bits_alone_and_in_any_step_and_chunk(gpu):
    step = ((1, 1100), (1, 30), (70, 70), (33, 0), (1, 20))
    case = make_case(step, 6, 2, 24, torch.bfloat16, torch.int8, gpu)
    together = run(case, "wide window")
    for row, (new, _) in enumerate(step):
        end = int(case[2].query_start[row + 1])
        for num_tokens in {1} if new == 1 else {2, 13, new}:
            assert torch.equal(alone(case, row, num_tokens), together[end - num_tokens : end])


def test_what_the_host_knows_changes_no_bit_and_padding_is_finite(gpu):
    query, kv_cache, batch, _ = case = make_case(STEPS["mixed"], 4, 2, 24, torch.bfloat16, torch.int8, gpu)
    end, table = batch.query_start[-1:], batch.page_table
    padded = replace(
        batch,
        query_start=torch.cat((batch.query_start, end, end)),
        kv_length=torch.cat((batch.kv_length, torch.zeros_like(batch.kv_length[:2]))),
        page_table=torch.cat((table, torch.full_like(table[:2], 2**30))),
        num_decodes=None,
        max_decode_kv_length=None,
        prefills=None,
    )
    wide = torch.full((len(query) + 3, 7, 24), torch.nan, dtype=query.dtype, device=gpu)
    wide[:-3, 1:5] = query
    actual = paged_attention(wide[:, 1:5], kv_cache, padded, 0.2, None, None)
    assert torch.equal(actual[:-3], run(case)) and actual[-3:].isfinite().all()


def test_large_numbers_keep_their_place(gpu):
    """Scores far apart: one key takes all of the weight."""
    query, kv_cache, batch, numbers = make_case(((1, 700),), 2, 1, 64, torch.bfloat16, torch.int8, gpu)
    check((query * 400, kv_cache, batch, numbers))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_a_broken_key_shows_in_its_row_only(gpu, cache_dtype):
    query, kv_cache, batch, _ = make_case(((1, 20), (1, 9)), 4, 2, 24, torch.bfloat16, cache_dtype, gpu)
    broken = KVCache(kv_cache.data.clone(), None if kv_cache.scale is None else kv_cache.scale.clone())
    page = int(batch.page_table[1, 0])
    (broken.data if broken.scale is None else broken.scale)[0, page, 3] = torch.nan
    assert run((query, broken, batch, None)).isnan().flatten(1).any(1).tolist() == [False, True]


def test_no_tokens(gpu):
    query, kv_cache, batch, _ = make_case(((1, 20),), 4, 2, 24, torch.float32, torch.float32, gpu)
    empty = replace(batch, query_start=batch.query_start[:1], kv_length=batch.kv_length[:0], num_decodes=0, prefills=())
    empty = replace(empty, page_table=batch.page_table[:0], max_decode_kv_length=0)
    assert run((query[:0], kv_cache, empty, None)).shape == (0, 4, 24)


def test_what_does_not_fit_is_refused(gpu):
    query, kv_cache, batch, _ = make_case(((1, 20),), 4, 2, 24, torch.float32, torch.float32, gpu)
    with pytest.raises(ValueError, match="a batch has"):
        run((query, kv_cache, replace(batch, page_table=batch.page_table.long()), None))
    with pytest.raises(ValueError, match="a batch has"):
        run((query, kv_cache, replace(batch, query_start=batch.query_start[:1]), None))
    with pytest.raises(ValueError, match="paged_attention takes"):
        run((query, kv_cache, replace(batch, page_size=16), None))
    with pytest.raises(ValueError, match="paged_attention takes"):
        run((query[:, :3], kv_cache, batch, None))
    with pytest.raises(ValueError, match="window"):
        paged_attention(query, kv_cache, batch, 0.2, 0, None)
