"""On a GPU: greedy ids of tiny models in float32 are those of the CPU, for every family and for weights in fewer bits.

The CPU computes in plain PyTorch, whose numbers are what the kernels of both devices are tested against.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchinfer import LLM, SamplingParams, kernels
from torchinfer.testing import TINY, save_random_checkpoint, tiny_config

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_num_requests": 4, "max_model_len": 96, "progress": False}
PROMPTS = [[3 + (7 * i + 5 * k) % 150 for k in range(2 + 9 * i)] for i in range(6)]


def ids_of(folder: Path, device: str, quantization: str | None) -> list[list[int]]:
    """Of requests that come and go; their prompts are cut into chunks."""
    params = [SamplingParams(max_tokens=6 + i, temperature=0, ignore_eos=True) for i in range(len(PROMPTS))]
    options = OPTIONS | {"device": device, "quantization": quantization, "max_num_batched_tokens": 24}
    with LLM(folder, **options) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, params)]


@pytest.fixture
def reference_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_folders", {"cpu": "reference"})
    monkeypatch.setattr(kernels, "_loaded", {})


@pytest.mark.cuda
@pytest.mark.parametrize("name", TINY)
def test_ids_of_a_family_are_those_of_the_cpu(name: str, reference_on_cpu: None, tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config(name), tmp_path)
    assert ids_of(tmp_path, "cuda", None) == ids_of(tmp_path, "cpu", None)


@pytest.mark.cuda
@pytest.mark.parametrize("quantization", ["int8", "fp8", "int4_g32"])
@pytest.mark.parametrize("name", ["llama-dynamic", "gemma2"])
def test_ids_of_quantized_models_are_those_of_the_cpu(
    name: str, quantization: str, reference_on_cpu: None, tmp_path: Path
) -> None:
    save_random_checkpoint(tiny_config(name), tmp_path)
    assert ids_of(tmp_path, "cuda", quantization) == ids_of(tmp_path, "cpu", quantization)
