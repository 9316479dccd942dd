"""Caches of another dtype than the model's, on the embedded checkpoint, float32 on the CPU."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchinfer import LLM, ConfigError, Output, SamplingParams
from torchinfer.kv_cache.tensors import allocate, kernel_pages, page_bytes, resolve_cache_dtype, resolve_page_size
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.models.config import ModelConfig

CHECKPOINT = Path(__file__).parents[1] / "recipes" / "tiny-llama"
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "progress": False}
GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_dict(Checkpoint.open(CHECKPOINT).config)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(CHECKPOINT, **OPTIONS, kv_cache_dtype=request.param) as llm:
        yield llm


def random_prompts(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 4000) for _ in range(rng.randint(1, 100))] for _ in range(count)]


def ids(outputs: list[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def test_a_batch_equals_each_prompt_alone(llm: LLM) -> None:
    prompts = random_prompts(10, 0)
    assert ids(llm.generate(prompts, GREEDY)) == [llm.generate([p], GREEDY)[0].token_ids for p in prompts]


def test_prefix_hits_change_nothing(llm: LLM) -> None:
    prompts = random_prompts(12, 1)
    expected = ids(llm.generate(prompts, GREEDY))
    hits_before = llm.stats().num_prefix_hit_tokens
    assert ids(llm.generate(prompts, GREEDY)) == expected
    assert llm.stats().num_prefix_hit_tokens > hits_before


def test_chunks_and_preemption_change_nothing(llm: LLM, model: ModelConfig) -> None:
    prompts = random_prompts(12, 1)
    name = {"int8": "int8", "float8_e4m3fn": "fp8"}[llm.model_info.kv_cache_dtype]
    memory = 18 * page_bytes(model, 16, resolve_cache_dtype(name, torch.float32, torch.device("cpu")))
    cramped = {"max_num_requests": 8, "max_num_batched_tokens": 13, "max_model_len": 160, "kv_cache_memory": memory}
    with LLM(CHECKPOINT, **OPTIONS, **cramped, kv_cache_dtype=name, prefix_cache=False) as other:
        assert ids(other.generate(prompts, GREEDY)) == ids(llm.generate(prompts, GREEDY))
        assert other.stats().num_preemptions > 0


@pytest.mark.parametrize(("name", "least"), [("float32", 1.0), ("bfloat16", 0.9), ("int8", 0.9), ("fp8", 0.6)])
def test_most_first_tokens_are_those_of_the_models_own_dtype(name: str, least: float) -> None:
    prompts = random_prompts(40, 2)
    first = SamplingParams(max_tokens=1, temperature=0)
    with LLM(CHECKPOINT, **OPTIONS) as plain, LLM(CHECKPOINT, **OPTIONS, kv_cache_dtype=name) as other:
        pairs = zip(ids(plain.generate(prompts, first)), ids(other.generate(prompts, first)), strict=True)
        assert sum(mine == theirs for mine, theirs in pairs) >= least * len(prompts)


@pytest.mark.parametrize(
    ("dtype", "bytes_per_value", "bytes_per_row"),
    [
        (torch.float32, 4, 0),
        (torch.bfloat16, 2, 0),
        (torch.float16, 2, 0),
        (torch.int8, 1, 4),
        (torch.float8_e4m3fn, 1, 4),
    ],
)
def test_a_page_takes_the_bytes_that_are_allocated(
    model: ModelConfig, dtype: torch.dtype, bytes_per_value: int, bytes_per_row: int
) -> None:
    expected = 2 * 16 * model.num_layers * model.num_kv_heads * (model.head_dim * bytes_per_value + bytes_per_row)
    assert page_bytes(model, 16, dtype) == expected
    caches = allocate(model, 3, 16, dtype, torch.device("cpu"))
    assert sum(tensor.nbytes for cache in caches for tensor in cache.tensors) == 3 * expected


def test_pages_of_the_tpus_kernel_take_the_bytes_that_are_allocated(model: ModelConfig) -> None:
    pages = kernel_pages(model, torch.int8, 2)
    assert pages is not None and resolve_page_size(None, pages) == resolve_page_size(128, pages) == 128
    caches = allocate(model, 3, 128, torch.int8, torch.device("meta"), pages)
    assert [cache.data.shape for cache in caches] == [(3, pages.num_rows, 128)] * model.num_layers
    assert sum(tensor.nbytes for cache in caches for tensor in cache.tensors) == 3 * page_bytes(
        model, 128, torch.int8, pages
    )


def test_a_cache_that_the_tpus_kernel_cannot_take_is_gathered_and_the_log_says_so(
    model: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "torchinfer"):
        assert kernel_pages(model, torch.float32, 1) is None
        assert kernel_pages(replace(model, num_heads=129 * model.num_kv_heads), torch.int8, 1) is None
        assert kernel_pages(model, torch.float32, None) is None  # no TPU, no word
    reasons = [record.message for record in caplog.records]
    assert len(reasons) == 2 and all("attention gathers pages" in reason for reason in reasons)
    assert "a cache of dtype float32 is not among bfloat16, int8, float8_e4m3fn" in reasons[0]
    assert "each KV head needs 1 to 128 whole query heads" in reasons[1]
    assert resolve_page_size(None, None) == 16 and resolve_page_size(32, None) == 32


def test_int8_holds_at_least_1_88_times_the_tokens_of_bfloat16_at_head_size_128(model: ModelConfig) -> None:
    wide = replace(model, head_dim=128)
    assert page_bytes(wide, 16, torch.bfloat16) >= 1.88 * page_bytes(wide, 16, torch.int8)


@pytest.mark.parametrize(
    ("options", "stored"),
    [({}, "float32"), ({"kv_cache_dtype": "bfloat16"}, "bfloat16"), ({"kv_cache_dtype": "fp8"}, "float8_e4m3fn")],
)
def test_the_dtype_is_logged_and_told(options: dict[str, str], stored: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torchinfer"), LLM(CHECKPOINT, **OPTIONS, **options) as llm:
        info = llm.model_info
    assert (info.dtype, info.kv_cache_dtype) == ("float32", stored)
    assert f"KV cache: {info.num_pages} pages of 16 tokens, {stored}," in caplog.text


def test_auto_is_the_models_dtype() -> None:
    assert resolve_cache_dtype("auto", torch.float16, torch.device("cpu")) == torch.float16


def test_fp8_on_a_device_that_lacks_it_is_refused() -> None:
    # A device without any values cannot give one back.
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='fp8' stores torch.float8_e4m3fn, which meta.*use int8"):
        resolve_cache_dtype("fp8", torch.float32, torch.device("meta"))
