"""Both formulations against float64, one token, one head and one key at a time, over a cache poisoned with NaN."""

import math

import pytest
import torch

from torchinfer.kernels.reference.paged_attention import paged_attention as reference
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages
from torchinfer.kernels.tpu.paged_attention import paged_attention as static
from torchinfer.testing import Row, assert_close, make_batch, poisoned_cache

PAGE_SIZE = 8
# (new tokens, tokens in the cache) of each row: decode, prefill, chunks, mixed; around the page boundaries.
STEPS = {
    "one token": [(1, 0)],
    "decode": [(1, 6), (1, 7), (1, 8), (1, 62)],
    "prefill": [(7, 0), (8, 0), (9, 0), (63, 0)],
    "chunk": [(9, 7), (2, 8), (5, 15)],
    "mixed": [(1, 0), (1, 23), (17, 0), (4, 12)],
}
OPTIONS = {
    "plain": (None, None),
    "window": (5, None),
    "window of one": (1, None),
    "soft cap": (None, 1.5),
    "both": (9, 1.5),
}


def make_case(step, heads, kv_heads, size, dtype, is_static, num_padded_tokens=0, cache_dtype=None):
    """Query, poisoned cache, batch, and what the cache holds of each row, float64 [2, length, kv_heads, size]."""
    generator = torch.Generator().manual_seed(0)
    num_pages = 2 + sum(-(-(new + old) // PAGE_SIZE) for new, old in step)
    free = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    cache = poisoned_cache((2, num_pages, PAGE_SIZE, kv_heads, size), cache_dtype or dtype)
    write_kv_pages(*torch.zeros(2, 1, kv_heads, size), cache, torch.zeros(1, dtype=torch.int32))
    rows, contexts = [], []
    for new, old in step:
        length = new + old
        pages = [free.pop() for _ in range(-(-length // PAGE_SIZE))]
        context = torch.randn(2, length, kv_heads, size, generator=generator).to(dtype)
        slots = [pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for position in range(length)]
        write_kv_pages(*context, cache, torch.tensor(slots, dtype=torch.int32))
        rows.append(Row([0] * new, old, pages, length))
        contexts.append(stored(cache, slots))
    batch = make_batch(
        rows, PAGE_SIZE, is_static=is_static, num_padded_tokens=num_padded_tokens, num_padded_rows=num_padded_tokens
    )
    query = torch.randn(len(batch.tokens), heads, size, generator=generator).to(dtype)
    return query, cache, batch, contexts


def stored(cache, slots):
    """Keys and values in some slots, scales multiplied in, float64 [2, slots, kv_heads, size]."""
    values = cache.data.double().flatten(1, 2)[:, slots]
    return values if cache.scale is None else values * cache.scale.double().flatten(1, 2)[:, slots, :, None]


def by_hand(query, batch, contexts, scale, window, soft_cap):
    result = torch.zeros(query.shape, dtype=torch.float64)
    num_live = int(batch.query_start[-1])
    for token, (position, row) in enumerate(zip(batch.positions.tolist(), batch.row.tolist(), strict=True)):
        if token >= num_live:
            break
        start = 0 if window is None else max(0, position - window + 1)
        keys, values = contexts[row][:, start : position + 1]
        for head in range(query.shape[1]):
            kv_head = head // (query.shape[1] // keys.shape[1])
            scores = keys[:, kv_head] @ query[token, head].double() * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            weights = torch.exp(scores - scores.max())
            result[token, head] = weights @ values[:, kv_head] / weights.sum()
    return result[:num_live]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 16), (6, 3, 10), (5, 1, 63), (4, 4, 32)])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("port", [reference, static])
def test_equals_float64_by_hand(port, step, option, heads, kv_heads, size, dtype):
    query, cache, batch, contexts = make_case(STEPS[step], heads, kv_heads, size, dtype, port is static)
    actual = port(query, cache, batch, 0.2, *OPTIONS[option])
    assert actual.dtype == dtype
    assert_close(actual, by_hand(query, batch, contexts, 0.2, *OPTIONS[option]))


# Of the cache, and of the model: scaled, narrower than the model, wider, and neither.
CACHES = [
    (torch.int8, torch.float32),
    (torch.float8_e4m3fn, torch.float32),
    (torch.int8, torch.bfloat16),
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize(("cache_dtype", "dtype"), CACHES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("port", [reference, static])
def test_equals_float64_over_what_a_cache_of_another_dtype_holds(port, step, option, cache_dtype, dtype):
    case = make_case(STEPS[step], 6, 3, 10, dtype, port is static, cache_dtype=cache_dtype)
    query, cache, batch, contexts = case
    actual = port(query, cache, batch, 0.2, *OPTIONS[option])
    assert actual.dtype == dtype
    assert_close(actual, by_hand(query, batch, contexts, 0.2, *OPTIONS[option]))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("port", [reference, static])
def test_padded_tokens_over_a_scaled_cache_are_finite(port, cache_dtype):
    case = make_case(STEPS["mixed"], 4, 2, 16, torch.float32, True, num_padded_tokens=5, cache_dtype=cache_dtype)
    query, cache, batch, contexts = case
    actual = port(query, cache, batch, 0.25, 7, None)
    assert actual.isfinite().all()
    assert_close(actual[:-5], by_hand(query, batch, contexts, 0.25, 7, None))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_chunk_over_a_scaled_cache_is_computed_in_parts(monkeypatch, cache_dtype):
    case = make_case(STEPS["mixed"], 4, 2, 16, torch.float32, False, cache_dtype=cache_dtype)
    query, cache, batch, contexts = case
    monkeypatch.setitem(reference.__globals__, "MAX_SCORES", 4 * 17 * 3)
    assert_close(reference(query, cache, batch, 0.25, 5, None), by_hand(query, batch, contexts, 0.25, 5, None))


@pytest.mark.parametrize("port", [reference, static])
def test_padded_tokens_are_finite_and_leave_the_others_alone(port):
    query, cache, batch, contexts = make_case(STEPS["mixed"], 4, 2, 16, torch.float32, True, num_padded_tokens=5)
    actual = port(query, cache, batch, 0.25, 7, None)
    assert actual.isfinite().all()
    assert_close(actual[:-5], by_hand(query, batch, contexts, 0.25, 7, None))


def test_reference_without_the_hosts_facts_equals_with_them():
    query, cache, batch, _ = make_case(STEPS["mixed"], 4, 2, 16, torch.float32, False)
    static_batch = make_case(STEPS["mixed"], 4, 2, 16, torch.float32, True)[2]
    assert_close(
        reference(query, cache, static_batch, 0.25, None, None), reference(query, cache, batch, 0.25, None, None)
    )


def test_static_formulation_traces_without_graph_breaks():
    query, cache, batch, contexts = make_case(STEPS["mixed"], 4, 2, 16, torch.float32, True)
    compiled = torch.compile(static, fullgraph=True, backend="eager")
    scale = 1 / math.sqrt(16)
    assert_close(
        compiled(query, cache, batch, scale, 5, 2.0), by_hand(query, batch, contexts, scale, 5, 2.0), torch.float32
    )


def test_many_rows_are_computed_in_parts(monkeypatch):
    query, cache, batch, contexts = make_case(
        [(1, 20), (1, 3), (1, 39), (1, 0), (4, 4)], 4, 2, 16, torch.float32, False
    )
    monkeypatch.setitem(reference.__globals__, "MAX_GATHERED", 80)
    assert_close(reference(query, cache, batch, 0.25, None, None), by_hand(query, batch, contexts, 0.25, None, None))
