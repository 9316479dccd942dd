"""Written checkpoints, read back by transformers with compressed-tensors: an implementation that is not ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchinfer.calibration import calibrate, plan_calibration
from torchinfer.loader import Checkpoint, LoadOptions, load_model
from torchinfer.loader.smoothing import Smoothing
from torchinfer.models.config import ModelConfig
from torchinfer.testing import PagedDriver, assert_close, save_random_checkpoint, tiny_config
from torchinfer.tokenizer import Tokenizer
from torchinfer.writer.quantize import quantize_checkpoint

pytest.importorskip("compressed_tensors")
MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"
TOKENS = list(range(5, 25))
WEIGHT_ONLY = ["int8", "fp8", "fp8_block", "int4", "int4_g32"]
MIXED = {"lm_head": "int8", "*.self_attn.*": "int4_g32", "*.layers.1.*": "fp8", "*": "int8"}


def theirs(folder: Path) -> Tensor:
    """[tokens, vocabulary] of transformers."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits


def ours(folder: Path, request: str | Mapping[str, str] | None, smoothing: Smoothing | None = None) -> Tensor:
    """The same of this library, which quantizes while it loads."""
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    cpu = torch.device("cpu")
    model = load_model(checkpoint, config, torch.float32, cpu, quantization=request, smoothing=smoothing)
    return PagedDriver(model).step({"a": TOKENS})["a"]


def without_rounded_inputs(folder: Path) -> None:
    """Tell transformers to leave inputs as they are: its steps are max / 127.5 wide, ours max / 127."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY, MIXED], ids=lambda scheme: str(scheme)[:9])
def test_transformers_computes_the_same_logits(scheme: Any, llama: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama, tmp_path / "out", scheme)
    assert_close(theirs(tmp_path / "out"), ours(llama, scheme))


@pytest.mark.parametrize("scheme", ["int8_w8a8", "fp8_w8a8", "fp8_block_w8a8", "int4_w4a8"])
def test_with_rounded_inputs_the_weights_are_the_same(scheme: str, llama: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama, tmp_path / "out", scheme)
    rounded = theirs(tmp_path / "out")
    without_rounded_inputs(tmp_path / "out")
    assert_close(theirs(tmp_path / "out"), ours(llama, scheme.removesuffix("_w8a8").removesuffix("_w4a8")))
    error, cost = (
        (rounded - ours(llama, scheme)).square().mean(),
        (ours(llama, scheme) - ours(llama, None)).square().mean(),
    )
    assert 0 < error < 2 * cost


@pytest.mark.parametrize("case", ["llama-tied", "qwen3-moe", "mixtral", "gemma3", "gptj"])
def test_transformers_reads_every_family(case: str, tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config(case), tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8")
    assert_close(theirs(tmp_path / "out"), ours(tmp_path / "in", "int8"))


def test_transformers_reads_a_smoothed_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 20)
    quantize_checkpoint(MODEL, tmp_path / "out", "int8_w8a8", calibration=tmp_path / "text.txt")
    without_rounded_inputs(tmp_path / "out")
    checkpoint, tokenizer = Checkpoint.open(MODEL), Tokenizer.from_folder(MODEL)
    config = ModelConfig.from_dict(checkpoint.config)
    plan = plan_calibration(config, "int8_w8a8", tmp_path / "text.txt", tokenizer)
    smoothing = calibrate(checkpoint, config, plan, torch.device("cpu"), LoadOptions())
    assert_close(theirs(tmp_path / "out"), ours(MODEL, "int8", smoothing))


def test_transformers_reads_falcon_where_values_are_not_packed(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("falcon-new"), tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", "fp8")
    assert_close(theirs(tmp_path / "out"), ours(tmp_path / "in", "fp8"))
