"""Least times of steps, against arithmetic by hand."""

import pytest

from torchinfer.planner.accelerators import ACCELERATORS
from torchinfer.planner.roofline import decode_step, prefill_steps, price_per_million, touched_experts

MATRICES_7B = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # Llama 2 7B, without tables


def step_of(models, name, accelerator, topology, batch, context, **options):
    place = models.placement(name, accelerator, topology, context=context, **options)
    return decode_step(place.footprint, place.accelerator, batch, context)


def test_decode_reads_weights_head_cache_and_a_row_of_the_embeddings(models):
    """Llama 2 7B in bfloat16 on one L4: per token 2 * 32 * 32 * 128 numbers of cache, read for 1,000 tokens and
    written for one."""
    step = step_of(models, "llama-2-7b", "l4", "1", 4, 1000)
    weights = 2 * (MATRICES_7B + 32000 * 4096)
    cache = 4 * 1001 * 2 * 32 * 4096 * 2
    assert step.memory_bytes == weights + cache + 4 * 4096 * 2
    assert step.memory_seconds == step.memory_bytes / 300e9


def test_decode_computes_two_operations_a_weight_and_attention(models):
    step = step_of(models, "llama-2-7b", "l4", "1", 4, 1000)
    attention = 32 * 4 * 32 * 128 * 4 * 1000
    assert step.flops == 2 * 4 * (MATRICES_7B + 32000 * 4096) + attention
    assert step.compute_seconds == pytest.approx(step.flops / 121e12)
    assert step.limit == "memory"
    assert step.seconds == step.memory_seconds


def test_tensor_parallel_divides_and_talks(models):
    """Llama 2 70B int8 on v5e 2x4: 161 all-reduces of [8, 8192] bfloat16, and logits [8, 32000] float32, of which a
    chip has 1 / 8, and of it 1 / 8 each for chips 1, 2, 3, 4, 3, 2 and 1 hops away."""
    step = step_of(models, "llama-2-70b", "v5e", "2x4", 8, 4096, quantization="int8", kv_cache_dtype="int8")
    reduced = 161 * 2 * 7 / 8 * 8 * 8192 * 2
    exchanged = (1 + 2 + 3 + 4 + 3 + 2 + 1) / 8 / 8 * 8 * 32000 * 4
    assert step.interconnect_bytes == int(reduced + exchanged)
    hops = 161 * 8 + 4
    assert step.interconnect_seconds == pytest.approx((reduced + exchanged) / 100e9 + hops * 1e-6)
    matrices = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    flops = 2 * 8 * (matrices + 32000 * 8192) / 8 + 80 * 4 * 8 * 128 * 8 * 4096
    assert step.flops == flops
    assert step.seconds == max(step.memory_seconds, step.compute_seconds) + step.interconnect_seconds


def test_one_chip_does_not_talk(models):
    step = step_of(models, "llama-2-7b", "l4", "1", 4, 1000)
    assert (step.interconnect_bytes, step.interconnect_seconds) == (0, 0.0)


def test_int8_inputs_are_multiplied_at_the_peak_of_int8(models):
    """And with 16-bit inputs at that of bfloat16. The head is in bfloat16 in both."""
    wide, narrow = (
        step_of(models, "llama-2-7b", "v5e", "1x1", 8, 16, quantization=scheme) for scheme in ("int8", "int8_w8a8")
    )
    assert wide.flops == narrow.flops
    saved = 2 * 8 * MATRICES_7B * (1 / 197e12 - 1 / 394e12)
    assert wide.compute_seconds - narrow.compute_seconds == pytest.approx(saved)


def test_tpus_multiply_fp8_as_bfloat16():
    assert ACCELERATORS["v5e"].peak("fp8") == 197e12
    assert ACCELERATORS["h100"].peak("fp8") == 1979e12


@pytest.mark.parametrize(("num_tokens", "touched"), [(1, 2.0), (2, 3.5), (8, 8 * (1 - 0.75**8)), (512, 8.0)])
def test_experts_that_are_touched(num_tokens, touched):
    """Of 8 with 2 a token: the second token finds each of the other 6 with a quarter."""
    assert touched_experts(8, 2, num_tokens) == pytest.approx(touched)


def test_mixtral_reads_the_experts_that_its_tokens_choose(models):
    one, eight = (step_of(models, "mixtral-8x7b", "h200", "1", batch, 16, kv_cache_dtype="int8") for batch in (1, 8))
    expert = 32 * 3 * 4096 * 14336 * 2
    more = 7 * (4096 * 2 + 17 * 2 * 32 * 8 * 132)  # rows of the embeddings, and the cache
    touched = 8 * (1 - 0.75**8) - 2
    assert eight.memory_bytes - one.memory_bytes == pytest.approx(touched * expert + more, abs=2)


def test_mixtral_computes_two_experts_a_token(models):
    step = step_of(models, "mixtral-8x7b", "h200", "1", 1, 16)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 14336 + 8 * 4096
    assert step.flops == 2 * (32 * layer + 32000 * 4096) + 32 * 4 * 4096 * 16


def test_windows_bound_what_is_read(models):
    """Gemma 2: every second of 42 layers sees 4,096 tokens."""
    short, long = (step_of(models, "gemma-2-9b", "h100", "1", 1, context) for context in (4096, 8192))
    per_layer = 2 * 8 * 256 * 2
    assert long.memory_bytes - short.memory_bytes == 21 * 4096 * per_layer
    assert long.flops - short.flops == 21 * 4096 * 4 * 16 * 256


def test_prefill_sees_a_triangle(models):
    """1,000 tokens in steps of 512, as by one sum over all positions; the head once."""
    place = models.placement("llama-2-7b", "l4", "1")
    steps = prefill_steps(place.footprint, place.accelerator, 1000, 512)
    pairs = sum(range(1, 1001))
    assert [step.num_tokens for step in steps] == [512, 488]
    assert [step.num_requests for step in steps] == [0, 1]
    assert sum(step.flops for step in steps) == 2 * (1000 * MATRICES_7B + 32000 * 4096) + 32 * 4 * 4096 * pairs


@pytest.mark.parametrize("length", [100, 4096, 4097, 5000, 8192])
@pytest.mark.parametrize("chunk", [64, 8192])
def test_prefill_with_windows_sees_a_band(models, length, chunk):
    place = models.placement("gemma-2-9b", "h100", "1")
    steps = prefill_steps(place.footprint, place.accelerator, length, chunk)
    pairs = 21 * sum(min(i, 4096) for i in range(1, length + 1)) + 21 * sum(range(1, length + 1))
    products = sum(product.num_weights for product in place.footprint.products if product.kind == "layer")
    assert sum(step.flops for step in steps) == pytest.approx(
        2 * (length * products + 256000 * 3584) + 4 * 16 * 256 * pairs, rel=1e-12
    )


def test_price_of_a_million_tokens():
    """1,000 tokens a second: 3.6 million an hour."""
    assert price_per_million(1000.0, 7.2) == pytest.approx(2.0)
