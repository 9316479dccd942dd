"""Tensors that leave the host when they are whole: the order of extents, and that nobody waits for ever."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchinfer.errors import ConfigError
from torchinfer.loader import Checkpoint, LoadOptions, LoadReport, load_weights
from torchinfer.loader.assembly import parameter_bytes
from torchinfer.loader.header import TensorEntry
from torchinfer.loader.load_plan import plan_load
from torchinfer.loader.opening import Deliver, OpeningPlan, OpenTensors, plan_opening
from torchinfer.loader.placement import place
from torchinfer.loader.plan import ROOM_BYTES, Extent, Piece
from torchinfer.loader.readers import Readers
from torchinfer.loader.retry import Stopped
from torchinfer.parallel import WHOLE
from torchinfer.weight_map import Target

OnRead = Callable[[Callable[[int], object]], None]
MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # mallopt(3): what is larger is mapped, and unmapped when it is freed
NUM_LAYERS, LAYER_BYTES = 24, 8 * MIB


def extent(number: int, *names: str) -> Extent:
    """Of 10 bytes of each of these tensors."""
    pieces = []
    for position, name in enumerate(names):
        offset = 100 * number + 10 * position
        pieces.append(Piece(TensorEntry(name, torch.uint8, (10,), "s", offset, 10), 0, 10, offset, 10))
    return Extent("s", tuple(pieces))


def plan(groups: Sequence[Sequence[str]], num_bytes: Mapping[str, int] | None = None) -> OpeningPlan:
    """Of extents with pieces of these parameters."""
    names = {name for group in groups for name in group}
    extents = [extent(number, *group) for number, group in enumerate(groups)]
    return plan_opening(extents, {name: name for name in names}, num_bytes or dict.fromkeys(names, 1))


def order(found: OpeningPlan) -> list[int]:
    return [extent.begin // 100 for extent in found.extents]


def test_what_is_open_is_completed_before_another_is_opened() -> None:
    found = plan([["a"], ["b"], ["c"], ["a"], ["b"], ["c"]])
    assert order(found) == [0, 3, 1, 4, 2, 5]
    assert found.most_bytes == 1


def test_extents_in_a_good_order_stay_in_it() -> None:
    found = plan([["a"], ["a", "b"], ["b", "c"], ["c"]])
    assert order(found) == [0, 1, 2, 3]
    assert found.most_bytes == 2


def test_the_extent_that_opens_the_fewest_bytes_is_next() -> None:
    found = plan([["a"], ["a", "large"], ["a", "small"], ["large"], ["small"]], {"a": 1, "large": 9, "small": 2})
    assert order(found) == [0, 2, 4, 1, 3]
    assert found.most_bytes == 10


def random_groups(rng: random.Random) -> list[list[str]]:
    names = [f"p{number}" for number in range(12)]
    return [rng.sample(names, rng.randrange(1, 4)) for _ in range(rng.randrange(1, 40))]


def test_every_piece_has_its_turn_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        groups = random_groups(rng)
        found = plan(groups, {f"p{number}": rng.randrange(1, 50) for number in range(12)})
        offsets = [piece.offset for extent in found.extents for piece in extent.pieces]
        expected = [100 * number + 10 * place for number, group in enumerate(groups) for place in range(len(group))]
        assert sorted(offsets) == expected


def begin_all(found: OpeningPlan, tensors: OpenTensors, num_threads: int, seed: int) -> None:
    """Readers that begin extents in the order, hold them for a while, and close what is complete."""
    left, lock, rng = deque(found.extents), threading.Lock(), random.Random(seed)
    remaining = Counter(name for names in found.parameters for name in names)

    def read() -> None:
        while True:
            with lock:
                if not left:
                    return
                extent = left.popleft()
            for piece in extent.pieces:
                tensors.enter(piece)
            threading.Event().wait(rng.random() * 0.002)
            with lock:
                for name in {piece.entry.name for piece in extent.pieces}:
                    remaining[name] -= 1
                    if not remaining[name]:
                        tensors.close(name)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "it waits for ever"


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_with_the_least_limit_all_extents_begin_and_no_more_is_open(num_threads: int) -> None:
    rng = random.Random(num_threads)
    for seed in range(20):
        found = plan(random_groups(rng), {f"p{number}": rng.randrange(1, 50) for number in range(12)})
        tensors = OpenTensors(found, found.most_bytes, threading.Event())
        begin_all(found, tensors, num_threads, seed)
        assert 0 < tensors.peak <= found.most_bytes


def exchange_all(found: OpeningPlan, ranks: list[OpenTensors], rng: random.Random) -> None:
    """Each process begins, in a thread, what it reads; in each round it sends the first extent that it has to all."""
    owner = [rng.randrange(len(ranks)) for _ in found.extents]
    ready = [queue.SimpleQueue[int]() for _ in ranks]

    def read(rank: int) -> None:
        for index, extent in enumerate(found.extents):
            if owner[index] == rank:
                ranks[rank].enter(extent.pieces[0])
                ready[rank].put(index)

    threads = [threading.Thread(target=read, args=(rank,), daemon=True) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    remaining = Counter(name for names in found.parameters for name in names)
    num_left, deadline = len(found.extents), time.monotonic() + 10
    while num_left:
        assert time.monotonic() < deadline, "they wait for ever"
        for source in rng.sample(ready, len(ready)):
            with contextlib.suppress(queue.Empty):
                index = source.get(timeout=rng.random() * 0.001)
                num_left -= 1
                remaining.subtract(found.parameters[index])
                for rank, tensors in enumerate(ranks):
                    if rank != owner[index]:
                        tensors.receive(found.extents[index])
                    for name in found.parameters[index]:
                        if not remaining[name]:
                            tensors.close(name)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_that_exchange_begin_all_extents_with_the_least_limit(world: int) -> None:
    rng = random.Random(world)
    for _ in range(20):
        found = plan(random_groups(rng), {f"p{number}": rng.randrange(1, 50) for number in range(12)})
        ranks = [OpenTensors(found, found.most_bytes, threading.Event()) for _ in range(world)]
        exchange_all(found, ranks, rng)
        assert all(0 < tensors.peak <= found.most_bytes for tensors in ranks)


def test_what_is_read_once_more_does_not_wait() -> None:
    found = plan([["a"], ["b"]])
    tensors = OpenTensors(found, 2, threading.Event())
    for each in (0, 1, 0):
        tensors.enter(found.extents[each].pieces[0])
    assert tensors.peak == 2


def test_a_stop_ends_the_wait() -> None:
    found, stop = plan([["a"], ["b"]]), threading.Event()
    tensors = OpenTensors(found, 1, stop)
    tensors.enter(found.extents[0].pieces[0])
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        tensors.enter(found.extents[1].pieces[0])


class Merged(nn.Module):
    """Layers of two tensors each."""

    CHECKPOINT: ClassVar[Mapping[str, Target]] = {
        f"{part}.{{layer}}": Target("layers.{layer}.w", part) for part in "qk"
    }
    IGNORED: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(num_rows) for _ in range(NUM_LAYERS))


class Layer(nn.Module):
    """q above k."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.slots = {"q": slice(0, num_rows // 2), "k": slice(num_rows // 2, num_rows)}
        self.w = nn.Parameter(torch.empty(num_rows, 1024))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """All of q in one file, all of k in another."""
    num_rows = LAYER_BYTES // 4096 // 2
    for part in "qk":
        tensors = {f"{part}.{layer}": torch.full((num_rows, 1024), float(layer)) for layer in range(NUM_LAYERS)}
        save_file(tensors, tmp_path / f"{part}.safetensors")
    names = [f"{part}.{layer}" for part in "qk" for layer in range(NUM_LAYERS)]
    index = ", ".join(f'"{name}": "{name[0]}.safetensors"' for name in names)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{index}}}}}')
    (tmp_path / "config.json").write_text('{"architectures": ["Merged"]}')
    return Checkpoint.open(tmp_path)


def deliver_all(checkpoint: Checkpoint, limit: int, seconds: float = 0) -> LoadReport:
    """Load into nothing; each tensor must come whole, and the second takes so long."""
    with torch.device("meta"):
        model = Merged(LAYER_BYTES // 4096)

    def send(name: str, tensor: Tensor) -> Tensor:
        assert tensor.aminmax() == (float(name.split(".")[1]),) * 2
        time.sleep(seconds if name == "layers.1.w" else 0)
        return torch.zeros(())

    options = LoadOptions(memory=limit, readers=8)
    return load_weights(model, checkpoint, torch.float32, torch.device("cpu"), False, options, deliver=Deliver(send))


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not let us reset the peak")
def test_the_host_holds_no_more_than_the_limit_of_what_is_put_together(checkpoint: Checkpoint) -> None:
    limit = 64 * MIB
    deliver_all(checkpoint, limit)  # what is allocated once
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_bytes("VmRSS")
    report = deliver_all(checkpoint, limit)
    assert 2 * LAYER_BYTES <= report.peak_host_bytes <= limit < NUM_LAYERS * LAYER_BYTES // 2
    assert resident_bytes("VmHWM") - before < limit + 10_000_000


@pytest.mark.xla
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not let us reset the peak")
def test_a_load_onto_xla_holds_the_model_once_and_the_limit_beside_it(checkpoint: Checkpoint) -> None:
    """XLA's CPU has the device's memory in the host's; what it frees must leave the process not to count."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    device, limit = pytest.importorskip("torch_xla").device(), 64 * MIB
    deliver_all(checkpoint, limit)  # what is allocated once
    torch.zeros(1, device=device).cpu()
    with torch.device("meta"):
        model = Merged(LAYER_BYTES // 4096)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = resident_bytes("VmRSS")
    report = load_weights(model, checkpoint, torch.float32, device, False, LoadOptions(memory=limit, readers=8))
    held = resident_bytes("VmHWM") - before - NUM_LAYERS * LAYER_BYTES
    assert all(parameter.device.type == "xla" for parameter in model.parameters())
    assert 2 * LAYER_BYTES <= report.peak_host_bytes <= limit
    assert held < limit + 10_000_000


def least_limit(checkpoint: Checkpoint) -> int:
    """With which one tensor is open at a time."""
    with pytest.raises(
        ConfigError, match=r"load_memory=8388608 bytes is too little: .* of them for what tensors"
    ) as caught:
        deliver_all(checkpoint, LAYER_BYTES)
    return int(str(caught.value).rpartition("load_memory=")[2].split()[0])


def test_a_tensor_that_does_not_fit_is_refused_with_the_limit_that_will_do(checkpoint: Checkpoint) -> None:
    deliver_all(checkpoint, least_limit(checkpoint))


def test_what_is_put_together_on_a_gpu_is_not_within_the_hosts_limit(checkpoint: Checkpoint) -> None:
    """It is few at once all the same: the whole model does not fit a GPU of several."""
    with torch.device("meta"):
        model = Merged(LAYER_BYTES // 4096)
    placements, _ = place(model, checkpoint.tensors)
    device, options, sizes = torch.device("cuda"), LoadOptions(memory=64 * MIB), parameter_bytes(model, torch.float32)
    deliver = Deliver(lambda name, tensor: tensor)
    found = plan_load(checkpoint, placements, device, WHOLE, options, None, deliver, sizes)
    assert found.staging == 64 * MIB
    assert found.opening is not None
    assert found.open_bytes == found.opening.most_bytes + ROOM_BYTES


def test_readers_that_wait_for_room_are_not_taken_for_hanging(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = least_limit(checkpoint)
    monkeypatch.setattr("torchinfer.loader.weights.Readers", partial(Readers, stall_seconds=0.5))
    assert deliver_all(checkpoint, limit, seconds=1.2).num_retries == 0


@pytest.fixture
def hang(on_read: OnRead, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What the next read waits for; it is given to another reader after 0.3 s."""
    event = threading.Event()
    monkeypatch.setattr("torchinfer.loader.weights.Readers", partial(Readers, stall_seconds=0.3))
    monkeypatch.setattr("torchinfer.loader.readers.JOIN_SECONDS", 0.1)
    on_read(lambda number: event.wait(60) if number == 1 else None)
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name == "reader":
            thread.join(10)


def test_a_read_that_hangs_while_all_others_wait_for_its_tensor_is_read_again(
    checkpoint: Checkpoint, hang: threading.Event
) -> None:
    assert deliver_all(checkpoint, least_limit(checkpoint)).num_retries > 0
    assert not hang.is_set()


def test_a_read_that_comes_back_while_all_others_wait_for_its_tensor_is_read_again(
    checkpoint: Checkpoint, hang: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchinfer.loader.readers.GRACE", 100)
    threading.Timer(0.6, hang.set).start()
    assert deliver_all(checkpoint, least_limit(checkpoint)).num_retries > 0
    assert hang.is_set()


def test_extents_are_cut_where_a_parameter_begins_that_is_larger_than_they_are() -> None:
    groups = [["a", "b"], ["a", "small"], ["a", "c", "d"], ["c", "d"], ["d", "c"]]
    found = plan(groups, {"a": 100, "b": 100, "small": 3, "c": 100, "d": 100})
    pieces = [[piece.entry.name for piece in extent.pieces] for extent in found.extents]
    assert pieces == [["a"], ["a", "small"], ["a"], ["b"], ["c"], ["c", "d"], ["d", "c"], ["d"]]
    assert found.most_bytes == 200
    assert sum(extent.num_bytes for extent in found.extents) == sum(10 * len(group) for group in groups)
