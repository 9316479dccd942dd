"""The runner of CPU and CUDA: padded decode steps equal exact ones, and a step that is too large ends alone."""

from __future__ import annotations

import random
import re
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from torchinfer import LLM, DeviceError, SamplingParams, kernels, startup
from torchinfer.batch import KVCache
from torchinfer.config import EngineConfig
from torchinfer.decode_graphs import DecodeGraphs
from torchinfer.kv_cache.tensors import allocate
from torchinfer.llm import Output
from torchinfer.loader import Checkpoint
from torchinfer.request import FinishReason
from torchinfer.runner import EagerRunner
from torchinfer.step_input import StepShape
from torchinfer.step_memory import MemoryPlan, warm_up_steps
from torchinfer.testing import save_random_checkpoint, tiny_config

OPTIONS: dict[str, Any] = {"device": "cpu", "max_num_requests": 6, "page_size": 8, "progress": False}
OPTIONS |= {"max_num_batched_tokens": 16, "max_model_len": 96}


class BucketRunner(EagerRunner):
    """As on CUDA, but for the capture."""

    shapes: ClassVar[list[StepShape]] = []

    def __init__(self, *arguments: Any, **sizes: Any) -> None:
        super().__init__(*arguments, **(sizes | {"has_buckets": True}))
        self.overlaps = True  # so that ids are fed on the device

    def _forward_decodes(self, packed: Tensor, shape: StepShape) -> Tensor:
        self.shapes.append(shape)
        return super()._forward_decodes(packed, shape)


def poisoned(*arguments: Any) -> list[KVCache]:
    """Caches in which nothing that was not written can be read without harm."""
    caches = allocate(*arguments)
    for cache in caches:
        for tensor in cache.tensors:
            tensor.fill_(127 if tensor.dtype == torch.int8 else torch.nan)
    return caches


def generate(folder: Path, patch: pytest.MonkeyPatch, runner: type[EagerRunner], **options: Any) -> list[Output]:
    """Of requests that come and go, with all kinds of parameters."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 160) for _ in range(rng.randint(1, 40))] for _ in range(14)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(2, 24),
            temperature=rng.choice([0.0, 0.8]),
            top_p=rng.choice([1.0, 0.9]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logprobs=3,
            prompt_logprobs=rng.choice([None, 2]),
            seed=rng.randrange(1000),
            ignore_eos=True,
        )
        for _ in prompts
    ]
    patch.setattr(startup, "EagerRunner", runner)
    patch.setattr(startup, "allocate", poisoned)
    patch.setattr("torchinfer.decode_graphs.LEAST_LENGTH", 40)
    with LLM(folder, **OPTIONS, **options) as llm:
        return llm.generate(prompts, params)


def reference_only(patch: pytest.MonkeyPatch) -> None:
    table = {op: getattr(import_module(f"torchinfer.kernels.reference.{op}"), op) for op in kernels.PORTS}
    patch.setitem(kernels._folders, "cpu", "reference")
    patch.setitem(kernels._loaded, "cpu", table)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gemma2", {"kv_cache_dtype": "int8"}),
        ("llama-dynamic", {"quantization": "int8_w8a8", "kv_cache_dtype": "bfloat16"}),
        ("qwen2-moe", {"moe_mode": "capacity", "moe_capacity_factor": 1.0, "kv_cache_dtype": "fp8"}),
        ("mixtral", {"is_reference": True}),
    ],
)
def test_padded_decode_steps_give_the_ids_and_log_probabilities_of_exact_ones(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if options.pop("is_reference", False):
        reference_only(monkeypatch)
    save_random_checkpoint(tiny_config(name), tmp_path)
    expected = generate(tmp_path, monkeypatch, EagerRunner, **options)
    monkeypatch.setattr(BucketRunner, "shapes", [])
    outputs = generate(tmp_path, monkeypatch, BucketRunner, **options)
    assert {shape.num_requests for shape in BucketRunner.shapes} == {1, 2, 4, 6}
    assert {shape.table_width for shape in BucketRunner.shapes} == {5, 12}
    for output, truth in zip(outputs, expected, strict=True):
        assert output.token_ids == truth.token_ids
        pairs = [*zip(output.logprobs or [], truth.logprobs or [], strict=True)]
        pairs += zip((output.prompt_logprobs or [])[1:], (truth.prompt_logprobs or [])[1:], strict=True)
        assert len(pairs) >= len(output.token_ids)
        for mine, theirs in pairs:
            assert mine.rank == theirs.rank and mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_buckets_hold_every_decode_step_and_no_more_than_there_can_be() -> None:
    device = torch.device("cpu")
    graphs = DecodeGraphs(lambda packed, shape: packed, 16, device, table_width=600, max_num_requests=6)
    shapes = list(graphs.shapes())
    assert {shape.num_requests for shape in shapes} == {1, 2, 4, 6}
    assert {shape.table_width for shape in shapes} == {128, 512, 600}
    assert len(shapes) == 12 and all(shape.is_decode and shape.num_tokens == shape.num_requests for shape in shapes)
    small = DecodeGraphs(lambda packed, shape: packed, 16, device, table_width=4, max_num_requests=1)
    assert list(small.shapes()) == [StepShape(1, 1, 4, is_decode=True)]


class OutOfMemory(torch.nn.Module):
    """A layer that finds no memory."""

    def forward(self, *arguments: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_step_without_memory_ends_its_requests_with_the_arithmetic_and_the_next_ones_are_served(
    overlaps: bool, tmp_path: Path
) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    prompts = [[5, 6, 7, 8, 9] * 6, [9, 8, 7]]
    with LLM(tmp_path, **OPTIONS | {"max_num_batched_tokens": 64}) as llm:
        expected = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
        engine = llm._engine
        assert engine is not None
        runner: Any = engine.runner
        runner.overlaps, runner._memory = overlaps, MemoryPlan(80 << 30, 16 << 30, 2 << 30, 1 << 30, 50 << 30)
        layer = runner._model.layers[1]
        runner._model.layers[1] = OutOfMemory()
        outputs = llm.generate(prompts, params)
        for output in outputs:
            assert output.finish_reason is FinishReason.ERROR and output.error is not None
            assert re.match(r"a step of 9 tokens of 2 requests did not fit", output.error)
            assert "Tried to allocate 2.00 GiB." in output.error and "more of it" not in output.error
            assert "80.00 GiB = 16.00 GiB taken before" in output.error and "11.00 GiB left" in output.error
        runner._model.layers[1] = layer
        first = llm.stream(prompts[1], params)
        begun = [next(first), next(first)]
        runner._model.layers[1] = OutOfMemory()
        other = llm.generate([prompts[0]], params)[0]
        rest = list(first)
        assert other.finish_reason is FinishReason.ERROR and rest[-1].finish_reason is FinishReason.ERROR
        assert [event.usage for event in begun + rest[:-1]] == [None] * (len(begun) + len(rest) - 1)
        runner._model.layers[1] = layer
        # With the prefix cache: nothing that was not computed may be found there.
        assert [llm.generate([prompt], params)[0].token_ids for prompt in prompts] == expected
        engine._scheduler.check()
        assert llm.stats().num_used_pages == 0


@pytest.mark.parametrize("max_num_requests", [1, 2, 6])
def test_the_largest_steps_have_no_more_requests_than_there_can_be(max_num_requests: int, tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    options = OPTIONS | {"max_num_requests": max_num_requests, "max_model_len": 16, "max_num_batched_tokens": 70}
    with LLM(tmp_path, **options) as llm:
        runner: Any = llm._engine.runner  # type: ignore[union-attr]
        steps = list(warm_up_steps(*runner._sizes))
        for plan, page_table in steps:
            assert len(runner.collect(runner.launch(plan, page_table)).token_ids) == len(plan.sampled)
    assert max(plan.num_tokens for plan, _ in steps) == min(70, 16 * max_num_requests)
    assert max(len(plan.sampled) for plan, _ in steps) <= max_num_requests


def test_the_cache_gets_what_the_largest_steps_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    peaks = iter([3000, 2000])
    steps = []

    def peak_bytes(call: Any, device: torch.device) -> int:
        steps.append(call())
        return next(peaks)

    monkeypatch.setattr(startup, "peak_bytes", peak_bytes)
    monkeypatch.setattr(startup, "total_memory_bytes", lambda device: 100_000)
    monkeypatch.setattr(startup, "free_memory_bytes", lambda device: 60_000)
    model = load(tmp_path)
    arguments = (model, 8, torch.float32, torch.device("cpu"), 96)
    memory = startup._measure_memory(EngineConfig(model=tmp_path, **OPTIONS), *arguments)
    assert memory == MemoryPlan(total=100_000, taken=40_000, step=3000, graphs=2000) and memory.free == 55_000
    chunks, decodes = steps
    assert len(chunks.prompt_logprobs[0].entries) == 15 and len(chunks.logprobs[0].top) == 20
    assert len(decodes.token_ids) == OPTIONS["max_num_requests"]
    model.layers[0] = OutOfMemory()
    with pytest.raises(DeviceError, match=r"max_num_batched_tokens=16 .* do not fit beside what is taken"):
        startup._measure_memory(EngineConfig(model=tmp_path, **OPTIONS), *arguments)


def load(folder: Path) -> Any:
    from torchinfer.loader import load_model
    from torchinfer.models.config import ModelConfig

    checkpoint = Checkpoint.open(folder)
    return load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, torch.device("cpu"))
