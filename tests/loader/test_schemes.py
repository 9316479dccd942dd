"""Weights that are quantized while they are loaded: which of them, their values, the memory that it takes."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.loader import Checkpoint, LoadOptions, load_model
from torchinfer.loader.weights import build_empty
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import divide
from torchinfer.quantization import SCHEMES, QuantizedMatrix
from torchinfer.testing import SIZES, TINY, PagedDriver, assert_close, save_random_checkpoint, tiny_config
from torchinfer.writer.quantize import quantize_checkpoint

CPU = torch.device("cpu")
QKV = "layers.1.attention.qkv.weight"


def load(
    folder: Path,
    quantization: str | Mapping[str, str] | None,
    dtype: torch.dtype = torch.float32,
    memory: int = 1 << 30,
) -> Decoder:
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    return load_model(checkpoint, config, dtype, CPU, options=LoadOptions(memory), quantization=quantization)


def build(folder: Path, quantization: Mapping[str, str]) -> Decoder:
    """On meta."""
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    return build_empty(checkpoint, config, CPU, quantization, "dropless", 1.25)[0]


def schemes_of(model: Decoder) -> dict[str, str]:
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}
    return {name: matrix.scheme.name for name, matrix in matrices.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with an untied head and sizes that all schemes can hold."""
    path = tmp_path_factory.mktemp("llama")
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 384, 64
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    save_random_checkpoint(config, path)
    return path


@pytest.mark.parametrize("name", SCHEMES)
def test_a_matrix_holds_what_its_parts_are_packed_to(name: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    expected = SCHEMES[name].pack(torch.cat(parts))
    matrix = load(folder, name).get_submodule(QKV)
    for tensor, value in expected.items():
        assert torch.equal(matrix.get_buffer(tensor).view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("name", SCHEMES)
def test_neither_files_nor_memory_change_what_is_packed(name: str, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for index, key in enumerate(sorted(tensors)):
        save_file({key: tensors[key]}, tmp_path / f"model-{index + 1:05}-of-{len(tensors):05}.safetensors")
    files = {key: f"model-{i + 1:05}-of-{len(tensors):05}.safetensors" for i, key in enumerate(sorted(tensors))}
    write_index(tmp_path, files)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = load(folder, name).state_dict()
    pieces = load(tmp_path, name, memory=32 << 20).state_dict()
    assert whole.keys() == pieces.keys()
    for key, value in whole.items():
        assert torch.equal(pieces[key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(files)}))


def test_a_tensor_larger_than_the_memory_is_packed_in_blocks_of_rows(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 12_000, 1
    save_random_checkpoint(config, tmp_path)  # gate and up have 49 MB each
    tensors = load_file(tmp_path / "model.safetensors")
    gate_up = torch.cat([tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    for name in ("int8", "int4_g32"):
        matrix = load(tmp_path, name, memory=32 << 20).get_submodule("layers.0.mlp.gate_up.weight")
        assert torch.equal(matrix.get_buffer("values"), SCHEMES[name].pack(gate_up)["values"])


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_computes_with_its_rounded_weights(name: str, tmp_path: Path) -> None:
    """transformers' model with the numbers that the int8 matrices stand for, in place of its own."""
    theirs = save_random_checkpoint(tiny_config(name), tmp_path)
    ours = load(tmp_path, "int8")
    kept = ("lm_head", "embed", "wte", "router", "mlp.gate.", "block_sparse_moe.gate.", "shared_expert_gate")
    for key, parameter in theirs.named_parameters():
        if parameter.ndim >= 2 and not any(word in key for word in kept):
            rows = parameter.data.reshape(-1, parameter.shape[-1])
            packed = SCHEMES["int8"].pack(rows)
            parameter.data.copy_((packed["values"].float() * packed["scale"]).view(parameter.shape))
    prompt = torch.randint(3, 160, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    assert schemes_of(ours)
    assert_close(PagedDriver(ours).step({"a": prompt})["a"], expected)


def test_head_embeddings_and_routers_stay_as_they_are(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("qwen2-moe"), tmp_path)
    names = schemes_of(load(tmp_path, "int8"))
    assert {name.rpartition("layers.0.")[2] for name in names if "layers.0." in name} == {
        "attention.qkv.weight",
        "attention.output.weight",
        "mlp.experts.gate_up",
        "mlp.experts.down",
        "mlp.shared_expert.gate_up.weight",
        "mlp.shared_expert.down.weight",
    }
    assert not any(name.startswith(("head", "embedding")) for name in names)


def test_the_first_pattern_that_fits_counts(folder: Path) -> None:
    request = {"lm_head": "int8", "*.layers.0.*": "none", "*.mlp.*": "int4", "*": "fp8"}
    names = schemes_of(load(folder, request))
    assert names["head.weight"] == "int8"
    assert not any(name.startswith("layers.0.") for name in names)
    assert names["layers.1.mlp.down.weight"] == "int4"
    assert names["layers.1.attention.output.weight"] == "fp8"


def test_how_much_is_held_in_which_scheme_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchinfer")
    load(folder, {"*.mlp.*": "int8", "*": "fp8"})
    assert "fp8 6 matrices, 0.6 MB, int8 6 matrices, 0.9 MB" in caplog.text


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ("int9", "scheme 'int9' of '*' is unknown; use one of: none, int8,"),
        ({"*.q_proj": "int8"}, "are one matrix here and must have one scheme, not int8 and none"),
        ({"*.wqkv": "int8", "*": "int8"}, "no layer's name fits pattern '*.wqkv'"),
        (
            "int4",
            "'model.layers.0.self_attn.q_proj' and 8 more as int4: 64 inputs are not a multiple of the group",
        ),
        ("fp8_block", "parts of 64, 32, 32 outputs are merged"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    request_: str | dict[str, str], words: str, tmp_path: Path
) -> None:
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, request_)
    assert words in str(caught.value)


def test_a_pattern_that_earlier_ones_leave_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'\*.gate_proj' has no effect: .* are taken by '\*.mlp.\*'.*put it ahead"):
        load(folder, {"*.mlp.*": "int4", "*.gate_proj": "int8", "*": "int8"})


def test_the_rest_may_be_nothing(folder: Path) -> None:
    assert schemes_of(load(folder, {"*.mlp.*": "int8", "*.self_attn.*": "fp8", "*": "int4"}))


def test_a_pattern_that_only_fits_the_head_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'lm_h\*' has no effect: the head is quantized only where 'lm_head' names it"
    ):
        load(folder, {"lm_h*": "int8"})


@pytest.mark.parametrize("scheme", ["int8", "fp8_block", "int4_g32"])
def test_a_tied_head_is_a_quantized_copy_of_the_table(scheme: str, tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama-tied"), tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    (tmp_path / "untied").mkdir()
    (tmp_path / "untied" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, tmp_path / "untied" / "model.safetensors")
    request = {"lm_head": scheme, "*": "int8"}
    tied, untied, plain = (
        load(tmp_path / "tied", request),
        load(tmp_path / "untied", request),
        load(tmp_path / "tied", None),
    )
    tokens = {"a": list(range(5, 25))}
    assert torch.equal(PagedDriver(tied).step(tokens)["a"], PagedDriver(untied).step(tokens)["a"])
    assert torch.equal(tied.embedding.weight, plain.embedding.weight)
    assert tied.num_parameters() == plain.num_parameters()
    tied.prepare()
    assert tied.is_prepared() and tied.num_parameters() == plain.num_parameters()


def test_a_tied_head_is_left_alone_without_its_name(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama-tied"), tmp_path)
    assert load(tmp_path, "int8").head is None
    with pytest.raises(ConfigError, match=r"lm_head=int8 of a model whose head is its table.*one chip"):
        divide(build(tmp_path, {"lm_head": "int8"}), 2)
    with pytest.raises(ConfigError, match=r"lm_head=int8: the head is the table of embeddings.*leave the"):
        quantize_checkpoint(tmp_path, tmp_path / "out", {"lm_head": "int8"})


def test_a_table_that_is_not_finite_is_refused_as_a_head(tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config("llama-tied"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'lm_head' has scales from .*nan"):
        load(tmp_path, {"lm_head": "int8"})


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(wrong: float, folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = wrong
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down\.weight\.scale' has scales from .*(nan|inf)"):
        load(tmp_path, "int8")


def test_parameters_are_counted_in_numbers_not_in_bytes(folder: Path) -> None:
    assert load(folder, "int4").num_parameters() == load(folder, None).num_parameters()


def test_the_sizes_of_the_tiny_models_do_not_divide_by_groups() -> None:
    assert SIZES["hidden_size"] % 128
