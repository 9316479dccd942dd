"""Writers of checkpoints: by hand, so that they can lie, and by the safetensors library."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchinfer.loader.folder import FileReader, FolderSource
from torchinfer.loader.source import FileStat

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
WriteRaw = Callable[..., Path]
WriteShards = Callable[..., Path]


@pytest.fixture
def write_raw() -> WriteRaw:
    """write(file, header, data, length): a safetensors file in which nothing has to be true."""

    def write(file: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        return file

    return write


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """write(shards, config): a folder with these files; several get an index."""

    def write(shards: dict[str, dict[str, Tensor]], config: dict[str, object] = CONFIG) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name, tensors in shards.items():
            save_file(tensors, tmp_path / name)
        if list(shards) != ["model.safetensors"]:
            weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
            index = {"metadata": {}, "weight_map": weight_map}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return write


@pytest.fixture
def config() -> dict[str, object]:
    """config.json of a small Llama."""
    return dict(CONFIG)


@pytest.fixture
def llama_tensors() -> dict[str, Tensor]:
    """The tensors of that Llama, with random values."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (16,)
        for name, rows in (("q", 16), ("k", 8), ("v", 8), ("o", 16)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, 16)
        for name, shape in (("gate", (24, 16)), ("up", (24, 16)), ("down", (16, 24))):
            shapes[f"{prefix}mlp.{name}_proj.weight"] = shape
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class FaultySource(FolderSource):
    """A folder whose reads do what `fault` says: raise, hang, or give fewer bytes. Counts handles and reads."""

    def __init__(self, path: Path, fault: Callable[[int, int], int | None] = lambda count, offset: None) -> None:
        super().__init__(path)
        self.fault = fault  # (number of the read, offset) -> at most so many bytes, or None for all
        self.num_reads = 0
        self.open_handles = 0
        self.opened: list[tuple[str, bool]] = []
        self._lock = threading.Lock()

    def open(self, name: str, stat: FileStat, *, end: int | None = None, direct: bool = False) -> FileReader:
        return _FaultyReader(self, name, stat, direct)

    def next_read(self) -> int:
        with self._lock:
            self.num_reads += 1
            return self.num_reads


class _FaultyReader(FileReader):
    def __init__(self, source: FaultySource, name: str, stat: FileStat, direct: bool) -> None:
        self._source = source
        source.opened.append((name, direct))
        source.open_handles += 1
        super().__init__(source.path / name, stat, direct=direct)

    def read_some(self, offset: int, buffer: memoryview) -> int:
        most = self._source.fault(self._source.next_read(), offset)
        return super().read_some(offset, buffer if most is None else buffer[:most])

    def close(self) -> None:
        super().close()
        self._source.open_handles -= 1


@pytest.fixture
def faulty() -> type[FaultySource]:
    """FaultySource(folder, fault)."""
    return FaultySource
