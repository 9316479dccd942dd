"""The limit of a load's memory: what tensors become on the way is counted before it is made, and never more is held."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from tqdm import tqdm

from torchinfer.errors import ConfigError
from torchinfer.loader import Checkpoint, LoadOptions, assembly, load_weights, weights
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.header import TensorEntry, read_header
from torchinfer.loader.memory import Staging
from torchinfer.loader.placement import PACKED_AT_ONCE_BYTES, SOURCE_COPIES, Placement
from torchinfer.loader.plan import Piece, plan_extents
from torchinfer.loader.readers import Readers
from torchinfer.loader.tuning import DirectChoice, ReaderCount
from torchinfer.models.falcon import ungroup
from torchinfer.quantization import SCHEMES, QuantizedMatrix
from torchinfer.quantization.formats.awq import Awq
from torchinfer.quantization.formats.compressed_layer import CompressedLayer
from torchinfer.quantization.formats.fp8 import Fp8
from torchinfer.quantization.formats.gptq import Gptq
from torchinfer.quantization.formats.layout import Recipe
from torchinfer.weight_map import Target

CPU = torch.device("cpu")
ROWS, COLUMNS = 512, 256
RECIPES: list[Recipe] = [
    *(Gptq(bits, 64, has_order, is_v2) for bits in (4, 8) for has_order in (True, False) for is_v2 in (True, False)),
    Awq(64),
    Fp8(".weight_scale", ".input_scale"),
    *(CompressedLayer(bits, False, True, "group", (1, 64), True, True, "none", False) for bits in (4, 8)),
    CompressedLayer(4, False, False, "group", (1, 64), True, False, "none", False),
    CompressedLayer(8, True, False, "block", (64, 64), False, False, "none", False),
]


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside of it had at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Iterable[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._live = {key: found for key, found in self._live.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def peak_of(call: Callable[[], object]) -> int:
    with LiveBytes() as live:
        call()
    return live.peak


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], suffix: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if suffix.endswith("g_idx"):
        return torch.arange(prod(shape), dtype=dtype).view(shape) // 64
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator).to(dtype)
    low, high = (-8, 8) if dtype == torch.int8 else (-(2**31), 2**31 - 1)
    return torch.randint(low, high, shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_conversions_of_published_formats_make_no_more_copies_than_are_counted(recipe: Recipe) -> None:
    scheme, sources = recipe.layout((ROWS,), COLUMNS)
    num_checked = 0
    for source in sources:
        shape = scheme.tensors(ROWS, COLUMNS)[source.tensor].shape
        for dtype in source.dtypes if source.convert is not None and source.shapes is not None else ():
            for stored in source.shapes(ROWS) if source.shapes is not None else ():
                if source.tensor == "zero" and (dtype == torch.int32) != (stored[0] < ROWS):
                    continue  # either packed in words, or a number each
                tensor = random_tensor(dtype, stored, source.suffix)
                result = prod(shape) * scheme.tensors(ROWS, COLUMNS)[source.tensor].dtype.itemsize
                assert source.convert is not None
                peak = peak_of(partial(source.convert, tensor, shape))
                # 64: single numbers, of which bounds are made.
                assert peak <= SOURCE_COPIES * max(tensor.nbytes, result) + 64, source.suffix
                num_checked += 1
    assert num_checked


def test_falcons_order_is_made_in_one_copy() -> None:
    merged = torch.randn(4 * (3 + 2) * 8, 16)
    heads = merged.view(4, 5, 8, 16)
    expected = torch.cat([heads[:, :3].reshape(-1, 16), heads[:, 3].reshape(-1, 16), heads[:, 4].reshape(-1, 16)])
    assert torch.equal(ungroup(merged, 4, 3), expected)
    assert peak_of(lambda: ungroup(merged, 4, 3)) == merged.nbytes


@pytest.mark.parametrize("scheme", ["int8", "fp8_block", "int4_g32"])
@pytest.mark.parametrize("has_places", [True, False])
@pytest.mark.parametrize(
    ("dtype", "is_smoothed"), [(torch.bfloat16, True), (torch.float32, True), (torch.float64, False)]
)
def test_what_must_become_float32_is_packed_a_few_rows_at_a_time(
    scheme: str, has_places: bool, dtype: torch.dtype, is_smoothed: bool
) -> None:
    num_rows, num_columns = 3000, 1024
    rows = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    columns = torch.rand(num_columns, generator=torch.Generator().manual_seed(1)) + 0.5
    with torch.device("meta"):
        matrix = QuantizedMatrix((num_rows, num_columns), SCHEMES[scheme])
    placement = Placement("p", matrix=matrix, columns=columns if is_smoothed else None)
    places = SCHEMES[scheme].empty(num_rows, num_columns, device=CPU) if has_places else None
    before = rows.clone()
    with LiveBytes() as live:
        found = placement.pack(rows, places)
    assert torch.equal(rows, before)
    expected = SCHEMES[scheme].pack(before.float() * columns if is_smoothed else before.float())
    assert all(torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    entry = TensorEntry("w", dtype, (num_rows, num_columns), "s", 0, rows.nbytes)
    new = 0 if has_places else sum(tensor.nbytes for tensor in found.values())
    assert 0 < placement.temporary_bytes(entry) <= PACKED_AT_ONCE_BYTES < rows.nbytes
    assert live.peak <= placement.temporary_bytes(entry) + new


class Turned(nn.Module):
    """One large tensor that is reordered as a whole."""

    CHECKPOINT: ClassVar[Mapping[str, Target]] = {"w": Target("w", transform=lambda tensor: tensor.flip(0))}
    IGNORED: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(num_rows, 1000))


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def load_turned(folder: Path, limit: int) -> tuple[int, int]:
    """Bytes held above the parameter, by the kernel and by the report."""
    num_rows = 15_000  # 60 MB
    save_file(
        {"w": torch.arange(num_rows).float()[:, None].expand(-1, 1000).contiguous()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text('{"architectures": ["Turned"]}')
    with torch.device("meta"):
        model = Turned(num_rows)
    checkpoint = Checkpoint.open(folder)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_bytes("VmRSS")
    report = load_weights(model, checkpoint, torch.float32, CPU, False, LoadOptions(memory=limit))
    assert torch.equal(model.w[:, 0], torch.arange(num_rows).float().flip(0))
    return resident_bytes("VmHWM") - before - model.w.nbytes, report.peak_host_bytes


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not let us reset the peak")
def test_a_tensor_that_is_turned_stays_within_the_limit_with_what_it_becomes(tmp_path: Path) -> None:
    limit = 124_000_000
    held, reported = load_turned(tmp_path, limit)
    assert 120_000_000 <= reported <= limit
    assert held < limit + 10_000_000


def test_after_a_tensor_was_turned_the_heap_is_trimmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(assembly, "trim_heap", lambda: trimmed.append(1))
    load_turned(tmp_path, 124_000_000)
    assert trimmed == [1]


class WatchedStaging(Staging):
    """Notes how many bytes of its buffers are alive at once, whoever holds them."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most_alive = 0

    def take(self, num_bytes: int, stop: threading.Event) -> Tensor:
        buffer = super().take(num_bytes, stop)
        storage = buffer.untyped_storage()
        self.alive = {key: found for key, found in self.alive.items() if not found[0].expired()}
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.most_alive = max(self.most_alive, sum(size for _, size in self.alive.values()))
        return buffer


class Placed:
    """An assembly whose memory is elsewhere."""

    def put(self, piece: Piece, content: Tensor) -> None: ...

    def complete(self, pieces: Iterable[Piece]) -> None: ...

    def release(self, buffer: Tensor, give_back: Callable[[Tensor], None]) -> None:
        give_back(buffer)

    def collect(self) -> None: ...


def test_buffers_that_make_room_for_others_are_held_by_nobody(tmp_path: Path) -> None:
    sizes = [4 << 20, 10 << 20, 24 << 20]  # none fits into another one's buffer, nor all of them into the limit
    save_file({str(i): torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}, tmp_path / "s")
    source = FolderSource(tmp_path)
    stat = source.stat("s")
    entries = {entry.name: entry for entry in read_header(source, "s", stat)}
    extents = [plan_extents({name: Placement(name)}, entries, 64 << 20)[0] for name in sorted(entries)]
    staging = WatchedStaging(26 << 20)
    count, direct = ReaderCount(1, 1), DirectChoice(False)
    readers = Readers(source, {"s": stat}, deque(extents), staging, lambda piece: None, count, direct)
    weights._fill(readers, Placed(), None, tqdm(disable=True))
    readers.close()
    assert 24 << 20 <= staging.most_alive <= staging.limit


def test_a_limit_that_it_does_not_fit_in_is_refused_with_the_one_that_will_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tensor 'w' needs \d+ bytes of it at once, 60000000 of them for what"
    ) as caught:
        load_turned(tmp_path, 119_000_000)
    load_turned(tmp_path, int(str(caught.value).rpartition("load_memory=")[2].split()[0]))
