"""Writers of checkpoints: by hand, so that they can lie, and by the safetensors library."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torchinfer.fake_gcs import Behaviour, FakeGcs
from torchinfer.loader import Checkpoint, LoadOptions, load_model
from torchinfer.loader.folder import FileReader, FolderSource
from torchinfer.loader.gcs import GcsSource
from torchinfer.loader.memory import allocate
from torchinfer.loader.mount import Mount
from torchinfer.loader.retry import RetryPolicy
from torchinfer.loader.source import FileStat
from torchinfer.models.config import ModelConfig

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
OnRead = Callable[[Callable[[int], object]], None]
HangIn = Callable[[str, Path], None]


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


@pytest.fixture
def on_read(monkeypatch: pytest.MonkeyPatch) -> OnRead:
    """on_read(action): from now on, before each read of a file, action(number of the read, from 1) is called."""
    whole = os.preadv

    def install(action: Callable[[int], object]) -> None:
        numbers = count(1)

        def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            if not flags:  # with flags it is a question to the page cache
                action(next(numbers))
            return whole(descriptor, buffers, offset, flags)

        monkeypatch.setattr(os, "preadv", preadv)

    return install


@pytest.fixture
def short_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs is given up after 0.2 s."""
    monkeypatch.setattr("torchinfer.loader.stall.STALL_SECONDS", 0.2)


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What hanging calls wait for; set at the end, when all threads must end too."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        # One that Ctrl-C met while it started is neither alive nor may it be joined.
        if thread.name.startswith(("header", "doctor")) and thread.is_alive():
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def hang_in(monkeypatch: pytest.MonkeyPatch, hang: threading.Event) -> HangIn:
    """hang_in(name, path): from now on os.`name` of this path waits for `hang`."""

    def install(name: str, path: Path) -> None:
        whole = getattr(os, name)

        def hanging(first: Any, *arguments: Any, **options: Any) -> Any:
            if str(first) == str(path):
                hang.wait(60)
            return whole(first, *arguments, **options)

        monkeypatch.setattr(os, name, hanging)

    return install


@pytest.fixture
def network_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder is on a mount over a network."""
    mount = Mount("0:0", "/", "fuse.gcsfuse", "bucket", ())
    monkeypatch.setattr("torchinfer.loader.folder.mount_of", lambda path: mount)


@dataclass
class Bed:
    """A Llama of four shards in a folder, which may be served as a bucket, and what the injections can reach."""

    folder: Path
    config: dict[str, object]
    tensors: dict[str, Tensor]
    write_shards: WriteShards
    on_read: OnRead
    patch: pytest.MonkeyPatch
    gcs: FakeGcs | None
    connections: list[HTTPConnection] = field(default_factory=list)
    memory: list[tuple[int, StorageWeakRef]] = field(default_factory=list)  # bytes taken for parameters and staging
    shards: tuple[str, ...] = tuple(f"model-{number}-of-4.safetensors" for number in (1, 2, 3, 4))
    stall_seconds: float = 0.3
    on_retry: Callable[[], object] = lambda: None
    on_end: Callable[[], object] = lambda: None  # of a load

    @property
    def address(self) -> str:
        return "gs://bucket" if self.gcs else str(self.folder)

    @property
    def first(self) -> Path:
        return self.folder / self.shards[0]

    def write(self, tensors: dict[str, Tensor]) -> None:
        names = sorted(tensors)
        shards = {shard: {name: tensors[name] for name in names[i::4]} for i, shard in enumerate(self.shards)}
        self.write_shards(shards, self.config)
        for shard in self.shards:
            os.utime(self.folder / shard, ns=(1, 1))  # clocks of filesystems are coarse: a change now must show

    def behave(self, **behaviour: Any) -> None:
        assert self.gcs is not None
        self.gcs.set(Behaviour(**behaviour))

    def load(self, inject: Callable[[Bed], object], dtype: torch.dtype, options: LoadOptions) -> dict[str, Tensor]:
        """Open the checkpoint, then `inject`, then load."""
        checkpoint = Checkpoint.open(self.address)
        inject(self)
        try:
            model = load_model(
                checkpoint, ModelConfig.from_dict(checkpoint.config), dtype, torch.device("cpu"), options=options
            )
        finally:
            self.on_end()
        return dict(model.state_dict())

    def reader_threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith(("reader", "header"))]

    def left(self, kept: Iterable[Tensor] = ()) -> list[object]:
        """What a load should not leave behind: threads, open files, connections that bring bytes, and memory, but for
        that of the tensors that were loaded."""
        found: list[object] = [*self.reader_threads()]
        if self.gcs is None:  # the server has its own open files
            links = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
            found += [link for link in links if link.startswith(str(self.folder))]
        found += [connection for connection in self.connections if connection.sock is not None]
        return found + self.live_memory(kept)

    def live_memory(self, kept: Iterable[Tensor] = ()) -> list[int]:
        """The sizes of what loads have taken and not freed, in bytes."""
        gc.collect()  # an error's traceback holds the frames of the load
        places = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in kept}
        return [size for size, memory in self.memory if not memory.expired() and memory.cdata not in places]


@pytest.fixture(params=["folder", "gs"])
def storage(request: pytest.FixtureRequest) -> str:
    """Where the checkpoint lies: all of them, or what the test is parametrized with."""
    found: str = request.param
    return found


@pytest.fixture
def bed(
    storage: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    config: dict[str, object],
    llama_tensors: dict[str, Tensor],
    write_shards: WriteShards,
    on_read: OnRead,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Bed]:
    found = Bed(tmp_path, config, llama_tensors, write_shards, on_read, monkeypatch, None)
    found.write(llama_tensors)
    record_memory(found)

    def delay(policy: RetryPolicy, failures: int) -> float:
        found.on_retry()
        return 0.001

    monkeypatch.setattr(RetryPolicy, "delay", delay)
    if storage == "folder":
        yield found
        return
    root = tmp_path_factory.mktemp("root")
    (root / "bucket").symlink_to(tmp_path)
    record_connections(found)
    monkeypatch.setitem(GcsSource.__init__.__kwdefaults__, "stall_timeout", found.stall_seconds)
    with FakeGcs(root) as found.gcs:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", found.gcs.endpoint)
        yield found


def record_connections(bed: Bed) -> None:
    class Recorded(HTTPConnection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            bed.connections.append(self)

    bed.patch.setattr("torchinfer.loader.gcs_stream.HTTPConnection", Recorded)


def record_memory(bed: Bed) -> None:
    def recorded(num_bytes: int) -> Tensor:
        memory = allocate(num_bytes)
        bed.memory.append((num_bytes, StorageWeakRef(memory.untyped_storage())))
        return memory

    bed.patch.setattr("torchinfer.loader.memory.allocate", recorded)
