"""A model divided among processes, over gloo on the CPU: the ids of one process, and all of them end together."""

from __future__ import annotations

import copy
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from torchinfer import LLM, SamplingParams
from torchinfer.errors import ConfigError, DeviceError, EngineError
from torchinfer.fake_gcs import FakeGcs
from torchinfer.loader import Checkpoint
from torchinfer.testing import TINY, save_random_checkpoint

SIZES: dict[str, Any] = {
    "max_num_requests": 8,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "dtype": "float32",
    "device": "cpu",
    "progress": False,
}
PROMPTS = [[5, 6, 7], [9] * 30, list(range(3, 22))]
PARAMS = [
    SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=6, temperature=0.8, top_k=9, seed=3, ignore_eos=True, frequency_penalty=0.5),
    SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logit_bias={7: 2.0}),
]
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096, "num_hidden_layers": 4}
WIDE = {"intermediate_size": 128, "vocab_size": 163}  # which two do not divide


def save(folder: Path, name: str, **changes: Any) -> Path:
    kind, arguments = TINY[name]
    save_random_checkpoint(getattr(transformers, kind)(**copy.deepcopy({**arguments, **changes})), folder)
    return folder


def run(model: Path | str, num_ranks: int, **options: Any) -> tuple[list[list[int]], list[float], int]:
    with LLM(model, tensor_parallel_size=num_ranks, **SIZES | options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        given = [*(outputs[0].logprobs or []), *(each for each in outputs[0].prompt_logprobs or [] if each)]
        return [output.token_ids for output in outputs], [each.logprob for each in given], llm.model_info.num_parameters


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("llama-biases", WIDE, {"quantization": "int8"}),
        ("gemma2", {}, {}),
        ("gptj", {}, {"quantization": "fp8", "kv_cache_dtype": "int8"}),
        ("falcon-7b", {}, {}),
        ("qwen2-moe", {}, {"moe_mode": "capacity", "moe_capacity_factor": 0.8}),
        ("mixtral", {"num_local_experts": 4}, {"expert_parallel": True, "quantization": "int4_g32"}),
    ],
)
def test_two_processes_have_the_ids_of_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    model = save(tmp_path, name, **changes)
    ids, logprobs, num_parameters = run(model, 2, **options)
    options.pop("expert_parallel", None)
    expected_ids, expected_logprobs, expected_parameters = run(model, 1, **options)
    assert ids == expected_ids
    assert logprobs == pytest.approx(expected_logprobs, rel=0, abs=1e-4)
    assert num_parameters == expected_parameters
    assert capfd.readouterr().out == ""
    assert not dist.is_initialized()


def test_over_a_network_each_byte_leaves_the_storage_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole tensors are quantized in each rank, which gets from the other what it does not read: several extents."""
    save(tmp_path / "bucket/model", "llama-biases", **LARGE)
    total = Checkpoint.open(tmp_path / "bucket/model").total_bytes
    with FakeGcs(tmp_path) as server, caplog.at_level(logging.INFO, "torchinfer"):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        ids, _, _ = run("gs://bucket/model", 2, quantization="int8")
        sent = server.stats(reset=True).num_bytes
        expected_ids, _, _ = run("gs://bucket/model", 1, quantization="int8")
        headers = server.stats().num_bytes - total  # and config.json, which each process reads
    assert ids == expected_ids
    assert sent - 2 * headers == total
    assert "processes exchange what several of them need: the storage is behind a network" in caplog.text
    assert f"{total / 2e9:.3f} GB from other processes" in caplog.text


def test_the_death_of_a_rank_ends_requests_and_an_engine_can_be_started_again(tmp_path: Path) -> None:
    model = save(tmp_path, "llama-tied")
    with LLM(model, tensor_parallel_size=2, **SIZES) as llm:
        with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 makes torch\.distributed's default group"):
            LLM(model, tensor_parallel_size=2, **SIZES)
        (rank,) = ranks_of(os.getpid())
        os.kill(rank, signal.SIGKILL)
        with pytest.raises((EngineError, RuntimeError)):
            llm.generate([[1, 2]] * 20, SamplingParams(max_tokens=30, ignore_eos=True))
    ids, _, _ = run(model, 2)
    assert [len(each) for each in ids] == [6, 6, 6]


def test_a_program_that_does_not_close_its_engine_ends_without_an_error(tmp_path: Path) -> None:
    model = save(tmp_path, "llama-tied")
    program = f"""
if __name__ == "__main__":
    from torchinfer import LLM, SamplingParams
    llm = LLM({str(model)!r}, tensor_parallel_size=2, **{SIZES!r})
    print(len(llm.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n")
    # Besides what gloo says of whom it has met, two processes at once.
    assert not [word for word in ("error", "gone", "terminate", "Traceback") if word in done.stderr]


def test_ranks_end_when_the_first_one_is_killed(tmp_path: Path) -> None:
    model = save(tmp_path, "llama-tied")
    program = f"""
if __name__ == "__main__":
    from torchinfer import LLM
    llm = LLM({str(model)!r}, tensor_parallel_size=2, **{SIZES!r})
    print("ready", flush=True)
    input()
"""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen([sys.executable, "-c", program], text=True, **pipes)
    assert first.stdout is not None
    assert first.stderr is not None
    assert first.stdout.readline() == "ready\n"
    (rank,) = ranks_of(first.pid)
    first.kill()
    errors = first.stderr.read()  # until the last process that writes there has ended
    assert "rank 0, which computes with this process, is gone: its log says why" in errors
    status = Path(f"/proc/{rank}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_more_gpus_than_there_are_is_an_error_before_a_process_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save(tmp_path, "llama-tied")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match=r"tensor_parallel_size=2 needs a CUDA device for each .* torch sees 1: use"):
        LLM(model, tensor_parallel_size=2, **SIZES | {"device": "cuda"})
    assert ranks_of(os.getpid()) == []


def ranks_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if "torchinfer.rank_process" in Path(f"/proc/{pid}/cmdline").read_text()]
