"""Whole tiny models through the kernels for CUDA: what layers hand to the door is what the kernels take."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torchinfer import LLM, SamplingParams, kernels, startup
from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.runner import EagerRunner
from torchinfer.testing import PagedDriver, assert_close, save_random_checkpoint, tiny_config

# A prompt, a decode beside another prompt, and a chunk.
STEPS = ({"a": [2, 3, 4, 5]}, {"a": [7], "b": [3, 1, 4]}, {"b": [2, 6]})


def ports(backend: str) -> dict[str, Any]:
    """Of all ops, the reference where there is none."""
    folders = {op: backend if backend in backends else "reference" for op, backends in kernels.PORTS.items()}
    return {op: getattr(import_module(f"torchinfer.kernels.{folder}.{op}"), op) for op, folder in folders.items()}


def logits_of(folder: Path, device: str, backend: str, scheme: str | None, cache: torch.dtype | None) -> list[Tensor]:
    """Of all steps, with a backend's ports on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels._loaded, device, ports(backend))
        checkpoint = Checkpoint.open(folder)
        config = ModelConfig.from_dict(checkpoint.config)
        model = load_model(checkpoint, config, torch.float32, torch.device(device), quantization=scheme)
        driver = PagedDriver(model, kv_cache_dtype=cache)
        return [logits.cpu() for step in STEPS for logits in driver.step(step).values()]


@pytest.mark.parametrize(
    ("name", "scheme", "cache"),
    [("gemma2", None, None), ("qwen3-moe", "int8", torch.int8), ("llama", "int8_w8a8", None)],
)
def test_logits_equal_those_of_the_reference(
    gpu: str, name: str, scheme: str | None, cache: torch.dtype | None, tmp_path: Path
) -> None:
    save_random_checkpoint(tiny_config(name), tmp_path)
    actual = logits_of(tmp_path, gpu, "cuda", scheme, cache)
    expected = logits_of(tmp_path, "cpu", "reference", scheme, cache)
    # Between two whole numbers of 8 bits the last bit of float32 decides: then results differ by a step.
    tolerance = torch.float32 if scheme is None else torch.bfloat16
    assert len(actual) == len(expected) == 4
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, tolerance)


class BucketRunner(EagerRunner):
    """As on CUDA: padded steps, whose ids are fed on the device."""

    def __init__(self, *arguments: Any, **sizes: Any) -> None:
        super().__init__(*arguments, **(sizes | {"has_buckets": True}))
        self.overlaps = True


def test_an_engine_that_pads_its_decode_steps_gives_the_ids_of_the_reference(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    options: dict[str, Any] = {"device": gpu, "max_num_requests": 4, "max_model_len": 64, "kv_cache_dtype": "int8"}
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 20, [11, 3]]
    found = []
    monkeypatch.setitem(kernels._folders, gpu, "reference")  # no layout of the CPU's own
    for backend, runner in (("reference", EagerRunner), ("cuda", BucketRunner)):
        monkeypatch.setitem(kernels._loaded, gpu, ports(backend))
        monkeypatch.setattr(startup, "EagerRunner", runner)
        with LLM(tmp_path, **options, max_num_batched_tokens=32, progress=False) as llm:
            found.append([output.token_ids for output in llm.generate(prompts, params)])
    assert found[0] == found[1]
