"""One model on several chips of XLA, which XLA's CPU has as many of as it is asked for: the ids of the CPU, nothing but
the collectives that a division needs, nothing compiled after the warm-up, caches in place."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from torchinfer import aot
from torchinfer.device import resolve_device
from torchinfer.errors import DeviceError
from torchinfer.hbm_traffic import hbm_bytes
from torchinfer.testing import TINY, save_random_checkpoint
from torchinfer.writer.quantize import quantize_checkpoint

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")

PROGRAM = Path(__file__).parent / "spmd_program.py"
ONE_PER_ARCHITECTURE = list({kind: name for name, (kind, _) in TINY.items()}.values())
SHALLOW = {"num_hidden_layers": 2, "sliding_window_pattern": 2}  # a layer of each kind
COLLECTIVES = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
RESULTS = rf" = \(?(\w+\[[\d,]+\]).*{COLLECTIVES}"  # the first shape of each
# 128 inner values and 8 heads: groups of 32 inputs and 8 chips divide them.
WIDE: dict[str, Any] = {"intermediate_size": 128, "num_attention_heads": 8, "head_dim": 32, "num_hidden_layers": 2}


def save(folder: Path, name: str, **changes: Any) -> str:
    kind, arguments = TINY[name]
    save_random_checkpoint(getattr(transformers, kind)(**copy.deepcopy({**arguments, **changes})), folder)
    return str(folder)


def run(num_chips: int, is_warm: bool, cases: list[tuple[str, dict[str, Any]]], **environment: str) -> list[Any]:
    command = [sys.executable, str(PROGRAM), str(num_chips), str(int(is_warm)), json.dumps(cases)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"chips"')]


def assert_equal_logprobs(result: dict[str, Any]) -> None:
    for kind in ("logprobs", "prompt_logprobs"):
        pairs = list(zip(result["chips"][kind], result["cpu"][kind], strict=True))
        assert any(values for _, (_, values) in pairs)
        for (ids, values), (expected_ids, expected) in pairs:
            assert ids == expected_ids, "tokens, ranks, and the most probable tokens"
            assert values == pytest.approx(expected, rel=0, abs=1e-4)


@pytest.mark.parametrize(("num_chips", "quantization"), [(4, None), (2, "int8")])
def test_chips_give_the_ids_of_the_cpu_for_every_architecture(
    num_chips: int, quantization: str | None, tmp_path: Path
) -> None:
    """With 2 key heads, or one: neighbours of four have the same."""
    cases: list[tuple[str, dict[str, Any]]] = [
        (save(tmp_path / name, name, **SHALLOW), {"quantization": quantization}) for name in ONE_PER_ARCHITECTURE
    ]
    for name, result in zip(ONE_PER_ARCHITECTURE, run(num_chips, False, cases), strict=True):
        assert result["chips"]["ids"] == result["cpu"]["ids"], name


def test_eight_chips_divide_quantized_matrices_and_a_vocabulary_that_they_do_not_divide(tmp_path: Path) -> None:
    plain = save(tmp_path / "int4", "llama-biases", vocab_size=163, **WIDE)
    quantize_checkpoint(plain, tmp_path / "published", "int4_g32")
    cases: list[tuple[str, dict[str, Any]]] = [
        (str(tmp_path / "published"), {}),
        (save(tmp_path / "int8", "llama-tied", vocab_size=163, **WIDE), {"quantization": "int8"}),
        (
            save(tmp_path / "experts", "qwen2-moe", shared_expert_intermediate_size=64, **WIDE),
            {"quantization": "int8", "moe_mode": "capacity", "moe_capacity_factor": 0.8},
        ),
    ]
    results = run(8, False, cases)
    assert len(results) == len(cases)
    for result in results:
        assert result["chips"]["ids"] == result["cpu"]["ids"]
    assert results[-1]["chips"]["dropped"] > 0


def test_eight_chips_divide_blocks_that_are_not_llamas_quantized(tmp_path: Path) -> None:
    """Attention and mlp side by side, few key heads, caps and windows."""
    heads = {"num_attention_heads": 8, "num_hidden_layers": 2}
    sizes: dict[str, dict[str, Any]] = {
        "falcon-new": heads,
        "gptj": {"n_head": 8, "n_layer": 2},
        "gemma": heads,
        "gemma2": heads | {"sliding_window_pattern": 2},
    }
    cases: list[tuple[str, dict[str, Any]]] = [
        (save(tmp_path / name, name, **changes), {"quantization": "int8"}) for name, changes in sizes.items()
    ]
    for name, result in zip(sizes, run(8, False, cases), strict=True):
        assert result["chips"]["ids"] == result["cpu"]["ids"], name


def test_four_chips_pack_their_parts_of_matrices_for_the_kernels_and_give_the_ids_of_the_cpu(tmp_path: Path) -> None:
    """Inner values of 96 a chip, which are padded, with groups of 32 too; half a group of int4; experts; words beside
    what stays."""
    dense = save(tmp_path / "dense", "llama-tied", vocab_size=163, **WIDE | {"hidden_size": 256, "head_dim": 32})
    odd = save(tmp_path / "odd", "llama-biases", **WIDE | {"intermediate_size": 384})
    moe = save(tmp_path / "moe", "mixtral", num_local_experts=3, **SHALLOW)
    mixed = {"*.down_proj": "int4_g32", "*.mlp.*": "fp8", "*.[qkv]_proj": "int8_w8a8"}
    cases: list[tuple[str, dict[str, Any]]] = [
        (odd, {"quantization": "int8", "kv_cache_dtype": "int8"}),  # a cache in the attention kernel's pages
        (dense, {"quantization": "int4"}),
        (odd, {"quantization": mixed}),
        (moe, {"quantization": "int8"}),
        (moe, {"quantization": None, "dtype": "bfloat16"}),
    ]
    packed = [8, 8, 6, 8, 4]
    results = run(4, True, [(model, options | {"packs": True}) for model, options in cases])
    for (_, options), result, count in zip(cases, results, packed, strict=True):
        assert result["chips"]["ids"] == result["cpu"]["ids"], options
        assert result["chips"]["compiled"] == 0
        assert len(result["chips"]["packed"]) == count


def test_four_chips_have_some_of_the_experts_each_and_give_the_ids_of_the_cpu(tmp_path: Path) -> None:
    """One each, or two; packed for the kernels; beside an expert that sees every token; those that overflow."""
    one = save(tmp_path / "one", "mixtral", num_local_experts=4, **SHALLOW)
    two = save(tmp_path / "two", "qwen2-moe", num_experts=8, shared_expert_intermediate_size=64, **WIDE)
    capacity = {"moe_mode": "capacity", "moe_capacity_factor": 0.8}
    cases: list[tuple[str, dict[str, Any]]] = [
        (one, {}),
        (two, {"quantization": "int8"}),
        (one, {"quantization": "int8", "packs": True}),
        (one, {"dtype": "bfloat16", "packs": True}),
        (two, capacity),
    ]
    results = run(4, False, [(model, options | {"expert_parallel": True}) for model, options in cases])
    for (_, options), result in zip(cases, results, strict=True):
        assert result["chips"]["ids"] == result["cpu"]["ids"], options
    assert results[2]["chips"]["packed"][-1].startswith("layers.1.")
    assert results[-1]["chips"]["dropped"] == results[-1]["cpu"]["dropped"] > 0


@pytest.mark.parametrize(("num_chips", "num_heads"), [(3, 6), (4, 8)])
def test_each_chip_edits_draws_and_tells_log_probabilities_of_its_rows(
    num_chips: int, num_heads: int, tmp_path: Path
) -> None:
    """Of two rows, or of three of nine where eight cannot be divided; nobody draws what pads the vocabulary."""
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_heads // 2}
    folder = save(
        tmp_path / "model", "llama-tied", vocab_size=163, **WIDE | sizes | {"hidden_size": 192, "intermediate_size": 96}
    )
    options = {"max_num_batched_tokens": 64}  # soon all eight requests decode together
    (result,) = run(num_chips, True, [(folder, options)])
    assert result["chips"]["ids"] == result["cpu"]["ids"]
    assert_equal_logprobs(result)
    assert result["chips"]["compiled"] == 0


def test_a_step_has_two_sums_a_layer_writes_caches_in_place_and_is_compiled_once(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "llama")
    dump = tmp_path / "dump"
    flags = f"{os.environ['XLA_FLAGS']} --xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=none"
    options = {"quantization": "int8", "kv_cache_dtype": "int8", "max_num_batched_tokens": 32}  # two buckets
    (result,) = run(2, True, [(folder, options)], XLA_FLAGS=flags)
    assert result["chips"]["ids"] == result["cpu"]["ids"]
    assert_equal_logprobs(result)
    assert result["chips"]["compiled"] == 0
    # 1 + 8 requests * 4 pages, 16 tokens, one of 2 heads of 16.
    texts = [path.read_text() for path in dump.glob("*after_optimizations.txt")]
    steps = [text for text in texts if re.search(r"s8\[2,33,16,1,16\](\{[^}]*\})? parameter\(", text)]
    assert len(steps) == 2, "a program for each bucket"
    exchange = ("f32[1,4,80]", "all-to-all")
    for text in steps:
        # The embeddings' rows are added up too; of the logits a chip gives away half of its columns for half the rows.
        assert sorted(kind for _, kind in re.findall(RESULTS, text)) == ["all-reduce"] * (2 * 3 + 1) + ["all-to-all"]
        assert exchange in re.findall(RESULTS, text)
        aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text, re.S)
        assert aliases is not None and aliases.group(1).count("may-alias") == 6, text[:500]
        assert not re.search(r" = s8\[2,33,16,1,16\]\S* (?:copy|transpose)\(", text), "a cache is copied"
    others = [found for text in texts if text not in steps and (found := re.findall(RESULTS, text))]
    heads = [found for found in others if found[0][1] == "all-to-all"]
    assert heads == [[exchange]] * 2
    gathered = [sorted(shape for shape, _ in found) for found in others if found not in heads]
    ids, logprobs = ["s32[8]"], ["f32[8,20]", "f32[8]", "s64[8,20]", "s64[8]"]
    assert sorted(gathered) == [logprobs, ids, ids], "what a chip finds out about its rows, and no logits"


@pytest.mark.libtpu
def test_each_chip_draws_ids_with_the_kernel(tmp_path: Path) -> None:
    """Of two rows each: the TPU's compiler takes the program. Ids are all that chips send, and nothing is sorted."""
    config = Path(__file__).parents[1] / "benchmarks" / "configs" / "llama-3-8b.json"
    command = [sys.executable, str(PROGRAM.with_name("spmd_trace.py")), str(config), "4", str(tmp_path)]
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    program = aot.compile_hlo((tmp_path / "module.mlir").read_text(), "v5e:2x2", num_devices=4)
    assert program.hlo.count('custom_call_target="tpu_custom_call"') == 1
    assert re.findall(RESULTS, program.hlo) == [("s32[8]", "all-reduce")]  # as which this compiler gathers so few
    assert "sort(" not in program.hlo
    assert hbm_bytes(program.hlo) < 1.01 * 2 * 128256 * 4


def test_more_chips_than_there_are_and_chips_after_one_are_refused() -> None:
    program = (
        "import torch\nfrom torchinfer.device import resolve_device\nfrom torchinfer.errors import DeviceError\n"
        "for size in (4, 1, 2):\n"
        "    try:\n"
        "        torch.ones(1, device=resolve_device('xla', size)).sum().item()\n"
        "    except DeviceError as error:\n"
        "        print(error)\n"
        "    from torchinfer import spmd\n"
        "    if size == 4:\n"
        "        own, spmd.own_chips = spmd.own_chips, lambda: [0]\n"
        "        try:\n"
        "            spmd.start(2)\n"
        "        except DeviceError as error:\n"
        "            print(error)\n"
        "        spmd.own_chips = own\n"
    )
    environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    of_hosts = (
        "tensor_parallel_size=2, but of 2 chips this process has 1, and TPU_WORKER_HOSTNAMES names 1 host: it must"
    )
    assert lines.pop(1).startswith(of_hosts)
    assert lines[0].startswith("tensor_parallel_size=4, but this process has 2 CPU chips")
    assert "use tensor_parallel_size=2 (CPU_NUM_DEVICES is their number" in lines[0]
    assert lines[1].startswith("tensor_parallel_size=2, but this process has used XLA on one chip")


def test_one_chip_after_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_USE_SPMD", "1")
    with pytest.raises(DeviceError, match="tensor_parallel_size=1, but XLA programs of this process run on several"):
        resolve_device("xla", 1)
