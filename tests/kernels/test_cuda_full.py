"""The kernels for CUDA at the shapes of Llama 3 8B and Mixtral on a GPU, at small ones in the interpreter, against
float64 on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")

from torchinfer.batch import KVCache, SamplingTensors
from torchinfer.kernels.cuda.grouped_matmul import grouped_matmul
from torchinfer.kernels.cuda.matrix import as_matrix
from torchinfer.kernels.cuda.packed_weight import prepare
from torchinfer.kernels.cuda.paged_attention import paged_attention
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul
from torchinfer.kernels.cuda.rotary_embedding import rotary_embedding
from torchinfer.kernels.cuda.rotate_and_write import rotate_and_write
from torchinfer.kernels.cuda.sample import sample
from torchinfer.kernels.cuda.write_kv_pages import write_kv_pages as write_kernel
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import Row, assert_close, exact_product, make_batch, poisoned_cache

HEADS, KV_HEADS, HEAD_SIZE, PAGE_SIZE = 32, 8, 128, 16


@dataclass(frozen=True)
class Shapes:
    """What differs between a card and the interpreter."""

    linear: tuple[tuple[int, int], ...]  # outputs, inputs
    rows: tuple[int, ...]
    experts: tuple[int, int, int]
    heads: tuple[int, int]
    decode: tuple[int, ...]  # lengths of contexts
    chunk: tuple[int, int]  # tokens, and those in the cache before
    vocabulary: int


FULL = Shapes(
    ((6144, 4096), (28672, 4096), (4096, 14336), (1280, 8192)),
    (1, 64, 1000, 4096),
    (8, 28672, 4096),
    (HEADS, KV_HEADS),
    (1, 511, 4096, 33000),
    (1024, 2000),
    128256,
)
SMALL = Shapes(((40, 256),), (1, 64), (3, 40, 128), (2, 1), (1, 530), (20, 30), 5000)
SHAPES = FULL if torch.cuda.is_available() else SMALL


def make_weight(name: str, outputs: int, inputs: int, device: str) -> QuantizedWeight:
    weight = torch.randn(outputs, inputs, device=device) / inputs**0.5
    return SCHEMES[name].weight(dict(SCHEMES[name].pack(weight)), inputs, ())


@pytest.mark.parametrize("shape", SHAPES.linear, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_products(gpu: str, name: str, shape: tuple[int, int]) -> None:
    weight = make_weight(name, *shape, gpu)
    x = torch.randn(max(SHAPES.rows), shape[1], device=gpu).bfloat16()
    expected, held = exact_product(x, weight), prepare(weight) or weight
    for rows in SHAPES.rows:
        actual = quantized_matmul(x[:rows], held)
        assert_close(actual, expected[:rows])
        # Up to 16 rows, and beyond 64, the same instructions: the same bits.
        assert rows > 16 or torch.equal(actual, quantized_matmul(x[:16], held)[:rows])


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int8_w8a8"])
def test_experts(gpu: str, name: str) -> None:
    num_experts, *shape = SHAPES.experts
    matrices = [make_weight(name, *shape, gpu) for _ in range(num_experts)]
    stacked = {field: torch.stack([getattr(one, field) for one in matrices]) for field in ("values", "scale")}
    together = replace(matrices[0], **stacked)
    for sizes in ([2, 0, *[1] * (num_experts - 2)], [130, 3, *[40] * (num_experts - 2)]):
        x = torch.randn(sum(sizes), shape[1], device=gpu).bfloat16()
        parts = zip(torch.split(x, sizes), matrices, strict=True)
        expected = torch.cat([exact_product(rows, one) for rows, one in parts])
        held = prepare(together) or as_matrix(together)
        actual = grouped_matmul(x, held, torch.tensor(sizes, dtype=torch.int32, device=gpu))
        assert_close(actual, expected)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_attention_over_long_contexts(gpu: str, cache_dtype: torch.dtype) -> None:
    new, old = SHAPES.chunk
    lengths = [*((1, length) for length in SHAPES.decode), (new, new + old)]
    (num_heads, num_kv_heads), num_pages = SHAPES.heads, 1 + sum(-(-length // PAGE_SIZE) for _, length in lengths)
    shape = (2, num_pages, PAGE_SIZE, num_kv_heads)
    scale = torch.zeros(shape, device=gpu) if cache_dtype.itemsize == 1 else None
    kv_cache = KVCache(torch.zeros((*shape, HEAD_SIZE), device=gpu).to(cache_dtype), scale)
    free = (torch.randperm(num_pages - 1) + 1).tolist()
    rows, slots = [], []
    for count, length in lengths:
        pages = [free.pop() for _ in range(-(-length // PAGE_SIZE))]
        own = torch.tensor(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
        slots.append(own.flatten()[:length].to(gpu))
        context = torch.randn(2, length, num_kv_heads, HEAD_SIZE, device=gpu).bfloat16()
        write_kv_pages(*context, kv_cache, slots[-1].int())
        rows.append(Row([0] * count, length - count, pages, length))
    query = torch.randn(sum(count for count, _ in lengths), num_heads, HEAD_SIZE, device=gpu).bfloat16()
    actual = paged_attention(query, kv_cache, make_batch(rows, PAGE_SIZE, device=gpu), HEAD_SIZE**-0.5, None, None)
    numbers = kv_cache.data.float().double() * (1.0 if kv_cache.scale is None else kv_cache.scale.double()[..., None])
    start = 0
    for (count, length), slot in zip(lengths, slots, strict=True):
        keys, values = (half.flatten(0, 1)[slot].repeat_interleave(num_heads // num_kv_heads, 1) for half in numbers)
        own = slice(start, start + count)
        scores = torch.einsum("thd,shd->hts", query[own].double(), keys) * HEAD_SIZE**-0.5
        is_seen = torch.ones(count, length, dtype=torch.bool, device=gpu).tril(length - count)
        weights = scores.masked_fill_(~is_seen, float("-inf")).softmax(-1)
        assert_close(actual[own], torch.einsum("hts,shd->thd", weights, values))
        start += count


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_rotation_and_cache_in_one_launch_have_the_bits_of_two(gpu: str, cache_dtype: torch.dtype) -> None:
    (num_heads, num_kv_heads), (num_tokens, _) = SHAPES.heads, SHAPES.chunk
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, HEAD_SIZE, device=gpu).bfloat16()
    query_key, value = heads.tensor_split((num_heads + num_kv_heads,), 1)
    angles = torch.randn(num_tokens, HEAD_SIZE // 2, device=gpu) * 1000
    slot = torch.randperm(2 * num_tokens, device=gpu)[:num_tokens].int()
    caches = [
        poisoned_cache((2, 2 * num_tokens // 4, 4, num_kv_heads, HEAD_SIZE), cache_dtype, torch.device(gpu))
        for _ in range(2)
    ]
    actual = rotate_and_write(query_key, value, angles.cos(), angles.sin(), False, caches[0], slot)
    rotated = rotary_embedding(query_key, angles.cos(), angles.sin(), False)
    write_kernel(rotated[:, num_heads:], value, caches[1], slot)
    assert torch.equal(actual, rotated[:, :num_heads])
    for ours, theirs in zip(caches[0].tensors, caches[1].tensors, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("filters", [(0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)], ids=str)
def test_a_number_picks_the_token_in_whose_interval_it_lies(
    gpu: str, filters: tuple[int, float], spread: float
) -> None:
    (top_k, top_p), num_rows = filters, 4
    logits, uniform = torch.randn(num_rows, SHAPES.vocabulary, device=gpu) * spread, torch.rand(num_rows, device=gpu)
    reals = [torch.full((num_rows,), value, device=gpu) for value in (0.7, top_p, 0.0)]
    top_ks = torch.full((num_rows,), top_k, dtype=torch.int32, device=gpu)
    ids = sample(logits, SamplingTensors(reals[0], top_ks, reals[1], reals[2], uniform), True).long()
    exact = logits.double() / reals[0].double()[:, None]
    ranked = exact.sort(-1, descending=True).values[:, : top_k or None]
    share = ranked.softmax(-1)
    num_kept = ((share.cumsum(-1) - share) < top_p).sum(-1) if top_p < 1 else torch.full_like(ids, ranked.shape[1])
    last = ranked.gather(1, num_kept[:, None] - 1)
    weights = exact.masked_fill(exact < last, -torch.inf).softmax(-1)
    end = weights.cumsum(-1).gather(1, ids[:, None])[:, 0]
    weight = weights.gather(1, ids[:, None])[:, 0]
    assert (weight > 0).all() and (uniform < end + 1e-5).all() and (uniform >= end - weight - 1e-5).all()
