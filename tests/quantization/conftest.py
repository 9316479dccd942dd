"""Small checkpoints that every scheme fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchinfer.testing import save_random_checkpoint, tiny_config

# Two groups of 128 inputs, and q, k and v of whole blocks of 128 outputs.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}


def fitting_config(case: str) -> Any:
    """The transformers config of a tiny model, with sizes that every scheme fits."""
    config = tiny_config(case)
    for name, size in SIZES.items():
        setattr(config, name, size)
    if hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = 128
    return config


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in one file, float32."""
    folder = tmp_path_factory.mktemp("llama")
    save_random_checkpoint(fitting_config("llama"), folder)
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files, with a tokenizer's files and some that must not be copied."""
    folder = tmp_path_factory.mktemp("sharded")
    model = save_random_checkpoint(fitting_config("llama"), folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    (folder / "tokenizer.json").write_text('{"some": "vocabulary"}')
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_llama.py").write_text("print('run')")
    return folder
