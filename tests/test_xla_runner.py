"""The engine on XLA (XLA:CPU will do): transformers' ids, no compilation after the warm-up, caches in place."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchinfer import LLM, ConfigError, SamplingParams, startup
from torchinfer.testing import TINY, save_random_checkpoint, tiny_config

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")

OPTIONS: dict[str, Any] = {"device": "xla", "dtype": "float32", "max_num_requests": 8, "progress": False}
ONE_PER_ARCHITECTURE = list({kind: name for name, (kind, _) in TINY.items()}.values())


def greedy(max_tokens: int = 16, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **params)


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(3, 160) for _ in range(rng.randint(1, longest))]


@pytest.mark.parametrize("name", ONE_PER_ARCHITECTURE)
def test_greedy_ids_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = save_random_checkpoint(tiny_config(name), tmp_path)
    rng = random.Random(0)
    prompts = [random_prompt(rng, 40) for _ in range(5)]
    with LLM(tmp_path, **OPTIONS, max_num_batched_tokens=16, max_model_len=64) as llm:
        outputs = llm.generate(prompts, greedy())
    # transformers 4.57's Qwen2-MoE masks a windowed cache wrongly.
    use_cache = not name.startswith("qwen2-moe")
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            use_cache=use_cache,
        )
        assert output.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("scheme", ["int8_w8a8", "fp8", "int4_g32"])
def test_quantized_weights_give_the_ids_of_the_cpu_and_compile_nothing_later(scheme: str, tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("mixtral"), tmp_path)
    rng = random.Random(0)
    prompts = [random_prompt(rng, 40) for _ in range(5)]
    options = OPTIONS | {"max_num_batched_tokens": 16, "max_model_len": 64}
    options["quantization"] = {"*.experts.*.w2": "int8", "*": scheme}  # 96 columns: not a multiple of a group
    with LLM(tmp_path, **options) as llm:
        before = llm.stats().num_compilations
        outputs = llm.generate(prompts, greedy())
        assert llm.stats().num_compilations == before
    with LLM(tmp_path, **(options | {"device": "cpu"})) as llm:
        assert [output.token_ids for output in outputs] == [o.token_ids for o in llm.generate(prompts, greedy())]


def test_matrices_packed_for_the_tpus_kernel_give_the_cpus_ids_and_compile_nothing_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "tensor_cores", lambda device: 0 if device.type == "xla" else None)
    save_random_checkpoint(tiny_config("mixtral"), tmp_path)
    rng = random.Random(4)
    prompts = [random_prompt(rng, 40) for _ in range(5)]
    options = OPTIONS | {"max_num_batched_tokens": 16, "max_model_len": 64, "quantization": "int8"}
    with LLM(tmp_path, **options) as llm:
        before = llm.stats().num_compilations
        outputs = llm.generate(prompts, greedy())
        assert llm.stats().num_compilations == before > 0
    with LLM(tmp_path, **(options | {"device": "cpu"})) as llm:
        assert [output.token_ids for output in outputs] == [o.token_ids for o in llm.generate(prompts, greedy())]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_random_checkpoint(tiny_config("llama"), folder)
    return folder


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randint(1, 30),
        temperature=rng.choice([0.0, 0.8]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logprobs=rng.choice([None, None, 3]),
        prompt_logprobs=rng.choice([None, None, 2]),
        seed=rng.randrange(1000),
        ignore_eos=True,
    )


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_cache_of_another_dtype_gives_the_cpus_ids_and_compiles_nothing_after_the_warm_up(
    checkpoint: Path, kv_cache_dtype: str
) -> None:
    rng = random.Random(2)
    prompts = [random_prompt(rng, 40) for _ in range(12)]
    options = OPTIONS | {"max_num_batched_tokens": 16, "max_model_len": 64, "kv_cache_dtype": kv_cache_dtype}
    with LLM(checkpoint, **options) as llm:
        before = llm.stats().num_compilations
        outputs = llm.generate(prompts, greedy())
        assert llm.stats().num_compilations == before > 0
    with LLM(checkpoint, **options | {"device": "cpu"}) as llm:
        expected = llm.generate(prompts, greedy())
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


@pytest.fixture
def kernel_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache in the pages of the TPU's attention kernel, which XLA's own operations read here."""
    monkeypatch.setattr(startup, "tensor_cores", lambda device: 0 if device.type == "xla" else None)


@pytest.mark.usefixtures("kernel_pages")
@pytest.mark.parametrize(
    ("name", "kv_cache_dtype"),
    [("llama", "int8"), ("llama-one-key-head", "fp8"), ("gemma2", "bfloat16")],
)
def test_pages_of_the_attention_kernel_give_the_cpus_ids_and_compile_nothing_after_the_warm_up(
    name: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    save_random_checkpoint(tiny_config(name), tmp_path)
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 160) for _ in range(length)] for length in (125, 150, 9, 2)]  # two pages, or one
    options = OPTIONS | {"max_num_batched_tokens": 16, "max_model_len": 200, "kv_cache_dtype": kv_cache_dtype}
    with LLM(tmp_path, **options) as llm:
        before = llm.stats().num_compilations
        outputs = llm.generate(prompts, greedy())
        assert llm.stats().num_compilations == before > 0
        assert (llm.model_info.page_size, llm.model_info.num_pages) == (128, 1 + 8 * 2)
    with LLM(tmp_path, **options | {"device": "cpu"}) as llm:
        expected = llm.generate(prompts, greedy())
        assert llm.model_info.page_size == 16
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


@pytest.mark.usefixtures("kernel_pages")
def test_another_page_size_than_the_kernels_is_refused_before_weights_are_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(startup, "load_model")
    with pytest.raises(ConfigError, match=r"page_size=16: .* pages of 128 tokens; use 128, or leave it out"):
        LLM(checkpoint, **OPTIONS, kv_cache_dtype="int8", page_size=16)


def test_every_parameter_equals_the_cpu_and_nothing_is_compiled_after_the_warm_up(checkpoint: Path) -> None:
    rng = random.Random(1)
    prompts = [random_prompt(rng, 100) for _ in range(30)]
    params = [random_params(rng) for _ in prompts]
    with LLM(checkpoint, **OPTIONS, max_num_batched_tokens=64, max_model_len=160) as llm:
        before = llm.stats().num_compilations
        outputs = llm.generate(prompts, params)
        assert llm.stats().num_compilations == before > 0
    with LLM(checkpoint, **OPTIONS | {"device": "cpu"}, max_model_len=160) as llm:
        expected = llm.generate(prompts, params)
    for output, truth in zip(outputs, expected, strict=True):
        assert output.token_ids == truth.token_ids
        assert (output.logprobs is None) == (truth.logprobs is None)
        for mine, theirs in zip(output.logprobs or [], truth.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
        entries = zip((output.prompt_logprobs or [])[1:], (truth.prompt_logprobs or [])[1:], strict=True)
        for mine_or_none, theirs_or_none in entries:
            assert mine_or_none is not None and theirs_or_none is not None
            assert mine_or_none.logprob == pytest.approx(theirs_or_none.logprob, abs=1e-3)


PROGRAM = """
import sys
from torchinfer import LLM, SamplingParams, startup
import torch_xla.debug.metrics as metrics
options = dict(device="xla", dtype="float32", max_num_requests=8, max_num_batched_tokens=16, max_model_len=64)
checkpoint, cache, *dtypes = sys.argv[1:]
for dtype in dtypes:
    if dtype.endswith(" pages"):
        startup.tensor_cores = lambda device: 0
        dtype = dtype.removesuffix(" pages")
    with LLM(checkpoint, compile_cache=cache or None, kv_cache_dtype=dtype, progress=False, **options) as llm:
        ids = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=6, temperature=0))[0].token_ids
        loads = metrics.metric_data("PersistentCacheLoad")
        print(llm.stats().num_compilations, loads[0] if loads else 0, ids)
"""
CACHES = {"auto": ("f32", 3), "int8": ("s8", 6), "fp8": ("f8e4m3fn", 6)}  # in the program, and buffers in place


def run_program(checkpoint: Path, cache: str, *kv_cache_dtypes: str, **environment: str) -> str:
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), cache, *kv_cache_dtypes]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Programs of engines with each kind of cache, the last with the kernel's pages."""
    folder = tmp_path_factory.mktemp("compiled")
    flags = f"{os.environ['XLA_FLAGS']} --xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=none"
    run_program(checkpoint, "", *CACHES, "int8 pages", XLA_FLAGS=flags)
    return [path.read_text() for path in folder.glob("*after_optimizations.txt")]


def forwards_with(cache: str, compiled: list[str], num_buffers: int) -> list[str]:
    """Programs that have such a parameter; each writes its cache in place."""
    found = [text for text in compiled if re.search(cache + r"(\{[^}]*\})? parameter\(", text)]
    assert found, "no program with a cache was dumped"
    for text in found:
        aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text, re.S)
        assert aliases is not None and aliases.group(1).count("may-alias") == num_buffers, text[:500]
    return found


@pytest.mark.parametrize("kv_cache_dtype", CACHES)
def test_the_compiled_forward_writes_every_cache_in_place(compiled: list[str], kv_cache_dtype: str) -> None:
    # 1 + 8 requests * 4 pages, 16 tokens, 2 heads of 16: 33,792 values.
    name, num_buffers = CACHES[kv_cache_dtype]
    for text in forwards_with(name + r"\[2,33,16,2,16\]", compiled, num_buffers):
        # XLA:CPU scatters no float8: it does that in float16, in memory of its own.
        if kv_cache_dtype != "fp8":
            assert not copies_of_a_cache(text), "the compiled program copies a cache"


def test_the_compiled_forward_writes_the_kernels_pages_in_place(compiled: list[str]) -> None:
    # 1 + 8 requests * 1 page; 2 heads of 16: 4 groups of tokens * 2 tiles * 8 rows, and 8 rows of scales.
    forwards_with(r"s32\[9,72,128\]", compiled, 3)


def copies_of_a_cache(text: str) -> list[str]:
    """Shapes of what holds all of a cache's values once more, in whatever order or dtype."""
    moved = re.findall(r"^.* = \w+\[([\d,]+)\]\S* (?:copy|transpose|convert)\(.*$", text, re.M)
    return [shape for shape in moved if math.prod(int(size) for size in shape.split(",")) == 2 * 33 * 16 * 2 * 16]


def test_the_next_start_finds_every_program_in_the_compile_cache(checkpoint: Path, tmp_path: Path) -> None:
    # Found and read: that is all XLA:CPU can do. Its client has no way to load a program; those of TPU and GPU have.
    folder = tmp_path / "programs"
    num_compiled, num_loaded, *ids = run_program(checkpoint, str(folder), "auto").split(maxsplit=2)
    assert int(num_compiled) == len(list(folder.iterdir())) > 0 and num_loaded == "0"
    assert run_program(checkpoint, str(folder), "auto").split(maxsplit=2)[1:] == [num_compiled, *ids]
