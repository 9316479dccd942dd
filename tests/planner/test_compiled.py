"""`--compile`: small models through the real TPU compiler, and what is said where it cannot be."""

import importlib.metadata
import importlib.util
import re
import subprocess

import pytest
import torch

from torchinfer import aot
from torchinfer.errors import ConfigError, DeviceError
from torchinfer.planner import compiled
from torchinfer.planner.compiled import compile_steps, explain
from torchinfer.planner.options import PlanOptions
from torchinfer.planner.planner import plan
from torchinfer.planner.source import read_source
from torchinfer.planner.table import to_dict, to_text
from torchinfer.step_input import StepShape

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
# Model -> what makes it small. One of each kind of block.
FAMILIES = {
    "falcon-7b": {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 4096},
    "gemma-2-9b": {**SMALL, "head_dim": 128, "sliding_window": 64},
    "gpt-j-6b": {"n_embd": 512, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "vocab_size": 4096},
    "llama-3-8b": SMALL,
    "mixtral-8x7b": SMALL,
    "qwen3-30b-a3b": {**SMALL, "moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2},
}
WIDE = {"num_attention_heads": 16, "num_key_value_heads": 16}  # for as many chips
# Inputs are bounded, which no kernel does: matrices stay as they are.
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
KERNELS_OF_A_LAYER = 5  # attention and four products, of gate and up together
HBM = (
    "the compiler for v5e:1x1 refuses the program: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of "
    "memory in memory space hbm. Used 17.66G of 15.75G hbm. Exceeded hbm capacity by 1.91G."
)
VMEM = "Ran out of memory in memory space vmem. Used 140.00M of 128.00M vmem."


@pytest.fixture
def installed(monkeypatch):
    """All that the compiler needs, as far as is looked for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: aot.LIBTPU_VERSION)


def planned(models, name, accelerator="v5e", topology="1x1", changes=None, **more):
    options = PlanOptions(
        model=models.path(name, **FAMILIES[name] | (changes or {})),
        dtype="bfloat16",
        accelerator=accelerator,
        topology=topology,
        **{"context": 128, "max_num_batched_tokens": 32, "batch": (8,), "kv_cache_dtype": "int8", **more},
    )
    return plan(options), options


@pytest.mark.xla
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_block_is_traced(models, name):
    """All caches may be written in place."""
    from torchinfer.planner.trace import trace_step

    source = read_source(models.path(name, **FAMILIES[name]), "bfloat16", "int8")
    traced = trace_step(source, 1, StepShape(16, 8, 8), torch.int8, num_pages=65, page_size=16, num_cores=None)
    assert len(traced.donated) == 2 * 2
    assert "stablehlo.all_" not in traced.text
    with_kernel = trace_step(source, 1, StepShape(16, 8, 8), torch.int8, num_pages=65, page_size=128, num_cores=2)
    assert len(with_kernel.donated) == 2
    assert with_kernel.text.count("@tpu_custom_call") == 2 * KERNELS_OF_A_LAYER


@pytest.mark.xla
@pytest.mark.parametrize("name", ["gpt-j-6b", "mixtral-8x7b"])
def test_chips_that_divide_a_model_run_the_engines_program(models, monkeypatch, installed, name):
    """Two all-reduces a layer and one for the embeddings; caches and packed matrices of all chips, one behind the
    other, of which the kernels see a share. A step that does not compile is a result with its reason."""
    seen = []

    def record(text, topology, **options):
        seen.append((text, topology, options))
        raise ConfigError(HBM)

    monkeypatch.setattr(compiled.aot, "compile_hlo", record)
    found, options = planned(models, name, "v5e", "2x2", quantization="int8")
    decode, _ = compile_steps(found, options)
    text, topology, given = seen[0]
    header = next(line for line in text.splitlines() if "func.func @main(" in line)
    assert text.count("stablehlo.all_reduce") == 5
    assert header.count('tensor<36x72x128xi32> {mhlo.sharding = "{devices=[4,1,1]0,1,2,3}"}') == 2  # 4 * 9 pages
    assert header.count('tensor<4x128x384xi32> {mhlo.sharding = "{devices=[4,1,1]0,1,2,3}"}') == 2  # q, k and v
    assert text.count("@tpu_custom_call") == 2 * KERNELS_OF_A_LAYER
    assert (topology, given["num_devices"], len(given["donate"])) == ("v5e:2x2", 4, 2)
    assert (decode.program, decode.error) == (None, explain(HBM))
    text = to_text(found, [decode])
    assert "does not compile" in text
    assert f"v5e 2x2, decode of 8 requests: {decode.error}" in text
    assert to_dict(found, [decode])["compiled"][0]["error"] == decode.error


@pytest.mark.xla
@pytest.mark.libtpu
def test_no_cache_is_copied_on_one_chip(models):
    """Without collectives nothing but the order of the results decides in which order the caches come in."""
    from torchinfer.planner.trace import trace_step

    source = read_source(models.path("llama-3-8b", **FAMILIES["llama-3-8b"]), "bfloat16", None)
    traced = trace_step(source, 1, StepShape(16, 8, 1), torch.int8, num_pages=9, page_size=128, num_cores=1)
    program = compiled.aot.compile_hlo(traced.text, "v5e:1x1", donate=traced.donated)
    assert program.hlo.count("s32[9,264,128]{2,1,0:T(8,128)} parameter(") == 2
    assert "s32[9,264,128]{2,1,0:T(8,128)} copy(" not in program.hlo


@pytest.mark.xla
@pytest.mark.libtpu
def test_matrices_of_e4m3_that_no_kernel_takes_compile_beside_a_cache_of_e4m3(models):
    """What needs four matrices of a layer is in their own dtype among the arguments."""
    from torchinfer.planner.trace import trace_step

    changes = {**FAMILIES["llama-3-8b"], "quantization_config": FBGEMM}
    source = read_source(models.path("llama-3-8b", **changes), "bfloat16", None)
    traced = trace_step(source, 1, StepShape(16, 8, 1), torch.float8_e4m3fn, num_pages=9, page_size=128, num_cores=1)
    header = next(line for line in traced.text.splitlines() if "func.func @main(" in line)
    assert header.count("xf8E4M3FN>") == 2 * 4
    assert traced.text.count("@tpu_custom_call") == 2
    program = compiled.aot.compile_hlo(traced.text, "v5e:1x1", donate=traced.donated)
    assert program.alias_bytes == 2 * 9 * 264 * 128 * 4


@pytest.mark.slow
@pytest.mark.xla
@pytest.mark.libtpu
@pytest.mark.parametrize(
    ("name", "accelerator", "topology"), [("llama-3-8b", "v5e", "2x2"), ("mixtral-8x7b", "v5p", "2x2x1")]
)
def test_the_compiler_agrees_with_the_arithmetic(models, name, accelerator, topology):
    """Arguments are weights and cache, which is written in place, the step's integers, and what pads tiles. A layer
    has two all-reduces, the embeddings one; an all-to-all brings each chip the logits of its rows."""
    found, options = planned(models, name, accelerator, topology, quantization="int8")
    decode, prefill = compile_steps(found, options)
    part, capacity = found.placements[0].footprint, found.placements[0].capacity
    for step in (decode, prefill):
        assert step.error is None
        known = part.weight_bytes + step.num_pages * part.page_bytes
        assert known <= step.program.argument_bytes < 1.2 * known
        assert step.cache_bytes == step.num_pages * part.page_bytes
        assert step.num_kernels == 2 * KERNELS_OF_A_LAYER
        check_kernels(step)
        assert step.collectives == {"all-reduce": 5, "all-to-all": 1}
        assert step.program.flops > 0 < step.estimated_seconds
        left = step.num_tokens_left * part.kv_bytes_per_token
        assert 0.8 * capacity.memory_bytes < left < capacity.memory_bytes - part.weight_bytes
    assert (decode.shape.num_tokens, decode.shape.num_requests, decode.num_pages) == (16, 8, 8 + 1)
    assert (prefill.shape.num_tokens, prefill.shape.num_requests) == (32, 8)
    data = to_dict(found, [decode])["compiled"][0]
    assert (data["collectives"], data["error"]) == (decode.collectives, None)
    text = to_text(found, [decode])
    assert "5 all-reduce, 1 all-to-all" in text
    assert "attention's kernel counts the pages" in text
    assert data["kernels"] == [kernel.to_dict() for kernel in decode.kernels]
    assert f"{accelerator} {topology}, decode of 8 requests: Pallas kernels" in text


def check_kernels(step):
    """Each is called once a layer or more; products and attention say what they move, and the time is at least that of
    the memory and of the bundles."""
    attention, *others = sorted(step.kernels, key=lambda kernel: kernel.name)
    assert attention.name == "ragged_paged_attention"
    assert {kernel.name for kernel in others} == {"streamed_matmul"}
    for kernel in step.kernels:
        assert kernel.call.count % 2 == 0
        assert kernel.num_bundles > 20
        assert kernel.num_bytes > 0
    chip = aot.CHIPS[step.placement.accelerator.name]
    for cycles in ("hbm_cycles", "num_bundles"):
        least = sum(kernel.call.count * getattr(kernel, cycles) for kernel in step.kernels)
        assert 0 < least / chip.clock_hz < step.estimated_seconds


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (HBM, "take 17.66GiB of 15.75GiB on each chip; use more chips, fewer bits"),
        (VMEM, "a kernel needs 140.00MiB of the 128.00MiB of vmem: its blocks are too large"),
        ("the compiler for v5e:1x1 did not end in 5 s; allow more", "5 s; allow more: give a larger --compile-seconds"),
        ("the compiler for v5e:1x1 ended with code -9: ", "this machine's memory ran out; use a larger machine"),
        ("the compiler for v5e:1x1 ended with code 1: no rule", "the compiler refuses it: .*no rule"),
    ],
)
def test_what_the_compiler_says_is_put_into_plain_words(error, meaning):
    assert re.search(meaning, explain(error))


def test_gpus_are_not_compiled_for(models):
    found, options = planned(models, "llama-3-8b", "l4", "1")
    with pytest.raises(ConfigError, match="fits no TPU that was asked for \\(accelerator='l4'\\); use v5e or v5p"):
        compile_steps(found, options)


@pytest.mark.parametrize("missing", [("torch_xla",), ("libtpu",), ("torchax",), ("jax", "torchax")])
def test_all_that_is_missing_is_named(models, monkeypatch, missing):
    found, options = planned(models, "llama-3-8b")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    with pytest.raises(DeviceError, match=f"--compile needs {', '.join(missing)}: not installed; pip install"):
        compile_steps(found, options)


def test_a_compiler_of_another_version_is_refused_before_anything_is_traced(models, monkeypatch, installed):
    def trace(*args, **options):
        raise AssertionError("nothing is traced")

    monkeypatch.setattr(subprocess, "run", trace)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.22")
    found, options = planned(models, "llama-3-8b")
    with pytest.raises(DeviceError, match=r"libtpu is 0\.0\.22, but .* need 0\.0\.21; pip install libtpu==0\.0\.21"):
        compile_steps(found, options)


def test_a_machine_without_memory_is_told_so(models, monkeypatch, installed):
    found, options = planned(models, "llama-3-8b")
    monkeypatch.setattr(compiled, "free_memory_bytes", lambda device: 2**30)
    with pytest.raises(DeviceError, match=r"about 2 GiB of this machine's memory and 1.0 GiB are free"):
        compile_steps(found, options)


def test_a_batch_that_does_not_fit_is_refused(models):
    found, options = planned(models, "llama-3-8b", batch=(8, 10**6))
    most = found.placements[0].capacity.num_requests
    with pytest.raises(ConfigError, match=f"batch=1000000 does not fit v5e 1x1, which holds {most} requests"):
        compile_steps(found, options)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (
            {"batch": (8, 33)},
            "batch=33 must not be more than max_num_batched_tokens=32, .*: lower the one or raise the other",
        ),
        (
            {"max_num_batched_tokens": 1025},
            "max_num_batched_tokens=1025 is more than .* context=128 .* at most 1024, or",
        ),
    ],
)
def test_a_step_that_no_engine_runs_is_refused_before_anything_is_compiled(models, monkeypatch, given, rule):
    def compiler(*args, **options):
        raise AssertionError("nothing is compiled")

    monkeypatch.setattr(compiled.aot, "compile_hlo", compiler)
    found, options = planned(models, "llama-3-8b", changes=WIDE, **given)
    with pytest.raises(ConfigError, match=rule):
        compile_steps(found, options)


def test_all_problems_of_a_step_are_told_at_once(models):
    found, options = planned(
        models, "llama-3-8b", topology="4x4", changes=WIDE, batch=(10**6,), max_num_batched_tokens=3000
    )
    with pytest.raises(ConfigError) as error:
        compile_steps(found, options)
    assert str(error.value).count("\n  - ") == 3


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"batch": (8, 0)}, "batch=0 must be at least 1"),
        ({"batch": (8, 16, 8)}, "batch has 8 more than once: name each decode step once"),
        ({"context": 8193}, "context=8193 must be from 2 to the model's 8192 tokens"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0 must be at least 1"),
        ({"compile_seconds": float("inf")}, "compile_seconds=inf must be a positive number"),
        ({"topology": "3x3"}, "topology='3x3' does not exist; use one of v5e: 1x1, 2x2, "),
    ],
)
def test_options_out_of_range_are_refused_with_the_rule(models, given, rule):
    with pytest.raises(ConfigError, match=rule):
        planned(models, "llama-3-8b", **given)


def test_a_step_that_cannot_be_traced_in_time_says_so(models, installed):
    found, options = planned(models, "llama-3-8b", compile_seconds=0.01)
    steps = compile_steps(found, options)
    assert [step.error for step in steps] == [
        "the step could not be traced within compile_seconds=0.01; allow more",
    ] * 2


def test_each_batch_has_a_decode_step_of_its_own(models, monkeypatch, installed):
    """In its bucket, with the cache of its requests; and all have one prefill step."""
    found, options = planned(models, "llama-3-8b", context=256, batch=(2, 8, 20), compile_seconds=0.01)
    steps = compile_steps(found, options)
    seen = [(step.kind, step.num_requests, step.shape.num_requests, step.shape.num_tokens) for step in steps]
    assert seen == [("decode", 2, 8, 16), ("decode", 8, 8, 16), ("decode", 20, 32, 32), ("prefill", 8, 8, 32)]
    assert [step.num_pages for step in steps] == [1 + 2 * 2, 1 + 8 * 2, 1 + 20 * 2, 1 + 8 * 2]
    cache = found.placements[0].footprint.request_bytes(256)
    assert steps[2].needed_bytes - steps[0].needed_bytes == 18 * cache
    rows = [line for line in to_text(found, steps).splitlines() if line.startswith("v5e 1x1  ") and "compile" in line]
    assert [line.split()[2:5] for line in rows] == [
        ["decode", "16", "8"],
        ["decode", "16", "8"],
        ["decode", "32", "32"],
        ["prefill", "32", "8"],
    ]
    data = to_dict(found, steps)["compiled"]
    assert [(each["kind"], each["batch"]) for each in data] == [
        ("decode", 2),
        ("decode", 8),
        ("decode", 20),
        ("prefill", 8),
    ]
