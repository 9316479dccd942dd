"""Smoothing for int8_w8a8: the factors, the same function of the model, and what it is worth."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from torchinfer import LLM, EngineConfig, SamplingParams
from torchinfer.calibration import (
    Calibration,
    calibrate,
    measure,
    plan_calibration,
    read_windows,
    smoothed_groups,
)
from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.loader import Checkpoint, LoadOptions, load_model
from torchinfer.loader.smoothing import Smoothing
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.testing import PagedDriver, assert_close, save_random_checkpoint, tiny_config
from torchinfer.tokenizer import Tokenizer
from torchinfer.writer.quantize import quantize_checkpoint

CPU = torch.device("cpu")
MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"
W8A8 = "int8_w8a8"
OUTLIERS = [3, 17, 40]
WINDOWS = [list(range(5, 25)), list(range(60, 100))]
TOKENS = list(range(100, 140))
RMS_NORM_CASES = ["llama-biases", "gemma", "gemma2", "qwen3-moe-mixed"]
LAYER_NORM_CASES = ["gptj", "falcon-7b", "falcon-new"]


def config_of(folder: Path) -> ModelConfig:
    return ModelConfig.from_dict(Checkpoint.open(folder).config)


def load(folder: Path, request: Any = None, smoothing: Smoothing | None = None) -> Decoder:
    return load_model(
        Checkpoint.open(folder), config_of(folder), torch.float32, CPU, quantization=request, smoothing=smoothing
    )


def logits(model: Decoder) -> Tensor:
    return PagedDriver(model).step({"a": TOKENS})["a"]


def smoothing_of(folder: Path, request: Any = W8A8) -> Smoothing:
    plan = Calibration(smoothed_groups(config_of(folder), request), WINDOWS)
    return calibrate(Checkpoint.open(folder), config_of(folder), plan, CPU, LoadOptions())


def plant(folder: Path, factor: float = 60.0) -> None:
    """A few channels behind each norm become large, and their columns small: the model computes the same."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[OUTLIERS] *= factor
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            tensor[:, OUTLIERS] /= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with outliers."""
    folder = tmp_path_factory.mktemp("planted")
    save_random_checkpoint(tiny_config("llama"), folder)
    plant(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text((Path(__file__).parents[2] / "torchinfer" / "batch.py").read_text())
    return path


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_outliers_cost_much_less_with_calibration(planted: Path) -> None:
    exact = logits(load(planted))
    without = relative_error(logits(load(planted, W8A8)), exact)
    with_it = relative_error(logits(load(planted, W8A8, smoothing_of(planted))), exact)
    assert without > 0.1
    assert with_it < without / 5


@pytest.mark.parametrize("case", [*RMS_NORM_CASES, *LAYER_NORM_CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_smoothed_model_computes_the_same(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config(case), tmp_path, dtype=dtype)
    smoothing = smoothing_of(tmp_path)
    tensors = {name: tensor.float() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {name: tensors[name] * factor for name, factor in smoothing.columns.items()} | dict(smoothing.norms)
    shutil.copytree(tmp_path, tmp_path / "smoothed")
    save_file(tensors, tmp_path / "smoothed" / "model.safetensors", {"format": "pt"})
    # A bias in bfloat16 is rounded again; the norm's weight is too, but the columns make up for it.
    tolerance = dtype if case in LAYER_NORM_CASES else torch.float32
    assert_close(logits(load(tmp_path / "smoothed")), logits(load(tmp_path)), tolerance)


def test_factors_are_those_of_the_formula(planted: Path) -> None:
    model = load(planted)
    groups = smoothed_groups(config_of(planted), W8A8)
    inputs = measure(model, groups, WINDOWS)["layers.1.mlp_norm"]
    weights = model.layers[1].mlp.gate_up.weight.abs().amax(0)
    expected = (inputs / weights).sqrt()
    found = smoothing_of(planted).columns["model.layers.1.mlp.up_proj.weight"]
    assert_close(found / found[0], expected / expected[0])
    assert abs(float(found.log().mean())) < 1e-3


def test_the_largest_inputs_are_those_of_all_windows(planted: Path) -> None:
    model, groups = load(planted), smoothed_groups(config_of(planted), W8A8)
    each = [measure(model, groups, [window])["layers.0.mlp_norm"] for window in WINDOWS]
    assert torch.equal(measure(model, groups, WINDOWS)["layers.0.mlp_norm"], torch.maximum(*each))


def test_parts_of_a_merged_matrix_have_the_same_factors(planted: Path) -> None:
    columns = smoothing_of(planted).columns
    layer = "model.layers.0.self_attn"
    assert torch.equal(columns[f"{layer}.q_proj.weight"], columns[f"{layer}.v_proj.weight"])
    assert not any("o_proj" in name or "down_proj" in name or "lm_head" in name for name in columns)


@pytest.mark.parametrize(
    ("case", "request_", "norms"),
    [
        ("llama", W8A8, ["layers.0.attention_norm", "layers.0.mlp_norm"]),
        ("llama", {"*.self_attn.*": W8A8, "*": "int8"}, ["layers.0.attention_norm", "layers.1.attention_norm"]),
        ("falcon-7b", W8A8, ["layers.0.attention_norm", "layers.1.attention_norm"]),
        ("falcon-7b", {"*.mlp.*": W8A8}, []),
        ("qwen3-moe", W8A8, ["layers.0.attention_norm", "layers.1.attention_norm"]),
        ("llama", "int8", []),
    ],
)
def test_norms_are_smoothed_that_only_int8_w8a8_follows(
    case: str, request_: Any, norms: list[str], tmp_path: Path
) -> None:
    save_random_checkpoint(tiny_config(case), tmp_path)
    assert [group.norm for group in smoothed_groups(config_of(tmp_path), request_)][:2] == norms


def test_a_written_checkpoint_holds_what_a_load_with_the_same_text_holds(text: Path, tmp_path: Path) -> None:
    quantize_checkpoint(MODEL, tmp_path / "out", W8A8, calibration=text)
    plan = plan_calibration(config_of(MODEL), W8A8, text, Tokenizer.from_folder(MODEL))
    model = load(MODEL, W8A8, calibrate(Checkpoint.open(MODEL), config_of(MODEL), plan, CPU, LoadOptions()))
    written: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    layer = model.layers[2].mlp
    gate = layer.gate_up.slots["gate"]
    assert torch.equal(written["model.layers.2.mlp.gate_proj.weight"], layer.gate_up.weight.values[gate])
    assert torch.equal(written["model.layers.2.mlp.gate_proj.weight_scale"], layer.gate_up.weight.scale[gate])
    norm = written["model.layers.2.post_attention_layernorm.weight"]
    assert norm.dtype == torch.bfloat16 and torch.equal(norm.float(), model.layers[2].mlp_norm.weight)
    assert not (tmp_path / "out" / "quantize.calibration").exists()


def test_a_run_that_was_stopped_goes_on_with_what_was_measured(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwrite
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def pwrite(descriptor: int, content: Any, offset: int) -> int:
            calls.append(offset)
            if len(calls) > 5:
                raise OSError(28, "No space left on device")
            return whole(descriptor, content, offset)

        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(CheckpointError):
            quantize_checkpoint(MODEL, tmp_path / "out", W8A8, calibration=text)
    kept = tmp_path / "out.partial" / "quantize.calibration"
    smoothing = Smoothing.from_bytes(kept.read_bytes())
    name = "model.layers.0.input_layernorm.weight"
    kept.write_bytes(Smoothing({**smoothing.norms, name: smoothing.norms[name] * 2}, smoothing.columns).to_bytes())
    quantize_checkpoint(MODEL, tmp_path / "out", W8A8, calibration=text)
    found = Checkpoint.open(tmp_path / "out").read(name)
    assert torch.equal(found, smoothing.norms[name] * 2)


def test_another_text_does_not_go_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(MODEL, tmp_path / "out", W8A8, calibration=text)
    text.write_text("something else")
    with pytest.raises(ConfigError, match="was begun otherwise: calibration was"):
        quantize_checkpoint(MODEL, tmp_path / "out", W8A8, calibration=text)


def test_windows_begin_as_prompts_do_and_are_bounded(text: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    bos = backend.id_to_token(0)
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    text.write_text(text.read_text() * 50)
    windows = read_windows(text, tokenizer, 64)
    assert [(len(window), window[0]) for window in windows] == [(64, 0)] * 64


def test_an_engine_takes_a_text(text: Path) -> None:
    options: Any = {"device": "cpu", "dtype": "float32", "progress": False, "max_model_len": 64}
    with LLM(MODEL, quantization=W8A8, calibration=text, **options) as llm:
        (output,) = llm.generate("def main(", SamplingParams(max_tokens=4, temperature=0))
    assert len(output.token_ids) == 4


@pytest.mark.parametrize("quantization", [None, "int8", {"*": "fp8"}])
def test_calibration_of_other_schemes_is_refused(quantization: Any) -> None:
    with pytest.raises(ConfigError, match="calibration='text' is for quantization int8_w8a8, not for"):
        EngineConfig(model="m", quantization=quantization, calibration="text")


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "cannot read"), (b"", "is empty"), (b"\xff\xfe", "must be a text file in UTF-8")]
)
def test_a_text_that_cannot_be_used_is_refused(content: bytes | None, problem: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(ConfigError, match=problem):
        quantize_checkpoint(MODEL, tmp_path / "out", W8A8, calibration=text)
    assert not (tmp_path / "out.partial").exists()


def test_a_quantized_checkpoint_is_not_measured(planted: Path) -> None:
    checkpoint = Checkpoint.open(planted)
    plan = Calibration(smoothed_groups(config_of(planted), W8A8), WINDOWS)
    checkpoint.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(ConfigError, match="is quantized already, quant_method='gptq'"):
        calibrate(checkpoint, config_of(planted), plan, CPU, LoadOptions())


def test_without_a_tokenizer_it_is_refused(planted: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a checkpoint with a tokenizer"):
        quantize_checkpoint(planted, tmp_path / "out", W8A8, calibration=text)


def test_it_is_refused_where_nothing_is_int8_w8a8(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has nothing to smooth with quantization='int8'"):
        quantize_checkpoint(MODEL, tmp_path / "out", "int8", calibration=text)


def test_the_factors_keep_every_bit_in_a_file(planted: Path) -> None:
    smoothing = smoothing_of(planted)
    again = Smoothing.from_bytes(smoothing.to_bytes())
    for before, after in ((smoothing.norms, again.norms), (smoothing.columns, again.columns)):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
