"""What `torchinfer inspect` finds out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader.header import FIRST_BYTES
from torchinfer.loader.inspect import inspect

Write = Callable[..., Path]


def test_a_good_checkpoint(write_shards: Write, llama_tensors: dict[str, Tensor]) -> None:
    names = sorted(llama_tensors)
    shards = {
        "a.safetensors": {name: llama_tensors[name] for name in names[:5]},
        "b.safetensors": {name: llama_tensors[name].bfloat16() for name in names[5:]},
    }
    folder = write_shards(shards)
    found = inspect(folder)
    assert found.problems == () and found.is_usable and found.unsupported is None
    assert found.architecture == "LlamaForCausalLM"
    assert found.num_parameters == sum(tensor.numel() for tensor in llama_tensors.values())
    sizes = {name: sum(tensor.nbytes for tensor in tensors.values()) for name, tensors in shards.items()}
    assert found.bytes_by_shard == sizes and found.total_bytes == sum(sizes.values())
    assert found.bytes_by_dtype == {"float32": sizes["a.safetensors"], "bfloat16": sizes["b.safetensors"]}
    assert found.shape == {
        "context_length": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_size": 16,
        "vocab_size": 32,
    }
    assert not found.has_tokenizer


def test_largest_tensors_come_first(write_shards: Write, llama_tensors: dict[str, Tensor]) -> None:
    largest = inspect(write_shards({"model.safetensors": llama_tensors})).largest
    assert [tensor.name for tensor in largest[:2]] == ["lm_head.weight", "model.embed_tokens.weight"]
    assert (largest[0].dtype, largest[0].shape, largest[0].num_bytes) == ("float32", (32, 16), 2048)
    assert len(largest) == 5


def test_an_unsupported_architecture_is_described_all_the_same(write_shards: Write) -> None:
    config = {"architectures": ["NobodyForCausalLM"], "num_hidden_layers": 7, "hidden_size": "wide"}
    found = inspect(write_shards({"model.safetensors": {"x": torch.ones(2, 3)}}, config))
    assert found.architecture == "NobodyForCausalLM" and "NobodyForCausalLM" in str(found.unsupported)
    assert found.shape["num_layers"] == 7 and found.shape["hidden_size"] is None
    assert found.num_parameters == 6 and found.problems == () and not found.is_usable


def test_problems_of_files_and_of_names_come_together(write_shards: Write, llama_tensors: dict[str, Tensor]) -> None:
    del llama_tensors["model.norm.weight"]
    folder = write_shards(
        {"a.safetensors": llama_tensors | {"extra": torch.ones(1)}, "b.safetensors": {"lm": torch.ones(1)}}
    )
    (folder / "b.safetensors").unlink()
    (folder / "generation_config.json").write_text("[]")
    problems = "\n".join(inspect(folder).problems)
    for part in (
        "'model.norm.weight'",
        "'extra'",
        "b.safetensors; download",
        "generation_config.json holds a JSON list",
    ):
        assert part in problems


def test_an_empty_folder_is_reported(tmp_path: Path) -> None:
    found = inspect(tmp_path)
    assert found.architecture is None and found.unsupported == "no config.json says which model it is"
    assert len(found.problems) == 2


def test_text_of_a_folder_without_a_checkpoint_has_the_problems_only(tmp_path: Path) -> None:
    assert [line[:30] for line in inspect(tmp_path).to_text().splitlines()] == [
        f"no checkpoint:  {tmp_path}"[:30],
        "problems:",
        "  - there is no config.json; p",
        "  - there is neither model.saf",
    ]


def test_a_path_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "absent")


def test_no_tensor_data_is_read(
    write_shards: Write, llama_tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"model.embed_tokens.weight": torch.zeros(32, 1 << 14)}
    folder = write_shards({"model.safetensors": llama_tensors | large})
    preadv, ends = os.preadv, []

    def observed(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        ends.append(offset + sum(map(len, buffers)))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", observed)
    inspect(folder)
    assert max(ends) == FIRST_BYTES < (folder / "model.safetensors").stat().st_size


def test_dict_is_json(write_shards: Write, llama_tensors: dict[str, Tensor]) -> None:
    found = inspect(write_shards({"model.safetensors": llama_tensors}))
    loaded = json.loads(json.dumps(found.to_dict()))
    assert loaded["num_parameters"] == found.num_parameters and loaded["is_usable"] is True


def test_text_has_the_facts_and_the_problems(write_shards: Write, llama_tensors: dict[str, Tensor]) -> None:
    folder = write_shards({"model.safetensors": llama_tensors | {"extra": torch.ones(1)}})
    text = inspect(folder).to_text()
    for line in ("LlamaForCausalLM", "context length: 64", "kv heads:       2", "tokenizer:      no", "'extra'"):
        assert line in text


def test_text_of_a_good_checkpoint_says_so(write_shards: Write, llama_tensors: dict[str, Tensor]) -> None:
    text = inspect(write_shards({"model.safetensors": llama_tensors})).to_text()
    assert text.endswith("problems: none") and "supported:      yes" in text
