"""Extents: every wanted byte once, forward, in pieces that fit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchinfer.errors import ConfigError
from torchinfer.loader import Checkpoint, LoadOptions
from torchinfer.loader.header import TensorEntry
from torchinfer.loader.load_plan import plan_load
from torchinfer.loader.placement import Placement
from torchinfer.loader.plan import (
    DEFAULT_MEMORY,
    ROOM_BYTES,
    SMALLEST_EXTENT_BYTES,
    Extent,
    choose_memory,
    extent_bytes,
    needed_memory,
    plan_extents,
    temporary_bytes,
    with_short_tail,
)
from torchinfer.loader.source import MAX_GAP_BYTES
from torchinfer.parallel import WHOLE, Cut

MIB = 1 << 20
WriteShards = Callable[..., Path]


def entries(*shapes: tuple[int, ...], shard: str = "s") -> dict[str, TensorEntry]:
    """float32 tensors one behind the other."""
    found, offset = {}, 100
    for index, shape in enumerate(shapes):
        num_bytes = 4 * int(torch.Size(shape).numel())
        found[f"{shard}{index}"] = TensorEntry(f"{shard}{index}", torch.float32, shape, shard, offset, num_bytes)
        offset += num_bytes
    return found


def whole(tensors: dict[str, TensorEntry], cut: Cut | None = None) -> dict[str, Placement]:
    return {name: Placement(name, cut=cut) for name in tensors}


def test_neighbours_share_an_extent_and_large_tensors_have_several() -> None:
    tensors = entries((10,), (1000, 1000), (10,), shard="a") | entries((5, 5), shard="b")
    extents = plan_extents(whole(tensors), tensors, MIB)
    assert [extent.shard for extent in extents] == ["a"] * 4 + ["b"]
    assert all(extent.end - extent.begin <= 1.02 * MIB for extent in extents)
    lengths = [extent.num_bytes for extent in extents[:4]]
    assert max(lengths) < 1.1 * min(lengths)  # so that readers end together
    assert [piece.entry.name for piece in extents[0].pieces][:1] == ["a0"]
    assert sum(extent.num_bytes for extent in extents) == sum(entry.num_bytes for entry in tensors.values())


def test_random_checkpoints_are_covered_once_and_in_order() -> None:
    rng = random.Random(0)
    for _ in range(50):
        shapes = [(rng.randrange(0, 300), rng.randrange(1, 300)) for _ in range(rng.randrange(1, 30))]
        tensors = entries(*shapes, (), (7,))
        extents = plan_extents(whole(tensors), tensors, rng.choice([1 << 12, 1 << 16, 1 << 20]))
        ends = [(piece.offset, piece.end) for extent in extents for piece in extent.pieces]
        assert ends[0][0] == min(entry.offset for entry in tensors.values() if entry.num_bytes)
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ends))
        rows = dict.fromkeys(tensors, 0)
        for extent in extents:
            for piece in extent.pieces:
                assert piece.first_row == rows[piece.entry.name]
                rows[piece.entry.name] = piece.last_row
        assert all(rows[name] == (entry.shape or (1,))[0] for name, entry in tensors.items() if entry.num_bytes)


def test_a_row_cut_reads_its_rows_only() -> None:
    tensors = entries((8, 100), (8, 100))
    (extent,) = plan_extents(whole(tensors, Cut(0, 2, 4)), tensors, MIB)
    assert [(piece.offset, piece.num_bytes) for piece in extent.pieces] == [(900, 800), (4100, 800)]
    assert extent.num_bytes == 1600


def test_a_column_cut_reads_all_rows() -> None:
    tensors = entries((8, 100))
    (extent,) = plan_extents(whole(tensors, Cut(1, 0, 25)), tensors, MIB)
    assert extent.num_bytes == 3200


def test_far_pieces_are_not_in_one_extent() -> None:
    tensors = entries((1, 10), (MAX_GAP_BYTES // 4 + 1,), (1, 10))
    placements = whole(tensors)
    del placements["s1"]
    assert len(plan_extents(placements, tensors, 1 << 30)) == 2


def test_a_tensor_with_a_transform_is_one_piece() -> None:
    tensors = entries((1000, 1100))
    placements = {"s0": Placement("p", convert=torch.neg)}
    (extent,) = plan_extents(placements, tensors, MIB)
    assert len(extent.pieces) == 1
    choose_memory([extent], 6 * MIB)
    with pytest.raises(ConfigError, match=r"load_memory=4194304 bytes is too little: tensor 's0' needs 6291456 bytes"):
        choose_memory([extent], 4 * MIB)


@pytest.mark.parametrize(("num_bytes", "expected"), [(256 * MIB, 64), (512 * MIB, 128), (768 * MIB, 96), (1, 4)])
def test_readers_have_equally_much_to_read(num_bytes: int, expected: int) -> None:
    assert extent_bytes(True, 2048 * MIB, 4, num_bytes) == expected * MIB


@pytest.mark.parametrize("limit", [32 * MIB, 100 * MIB, 2048 * MIB])
@pytest.mark.parametrize("num_readers", [1, 4, 64])
def test_all_readers_find_room(limit: int, num_readers: int) -> None:
    length = extent_bytes(True, limit, num_readers, 100_000 * MIB)
    assert length == SMALLEST_EXTENT_BYTES or (num_readers + 1) * (length + 2 * MIB) <= limit


def test_what_a_tensor_becomes_is_in_the_limit_too() -> None:
    tensors = entries((1000, 1100))
    placements = {"s0": Placement("p", convert=torch.neg)}
    extents = plan_extents(placements, tensors, MIB)
    other = temporary_bytes(placements, tensors)
    assert other == tensors["s0"].num_bytes
    choose_memory(extents, 6 * MIB + other, other)
    with pytest.raises(ConfigError, match=f"needs {6 * MIB + other} bytes of it at once, {other} of them for what"):
        choose_memory(extents, 6 * MIB + other - 1, other)


def test_without_a_limit_it_is_the_usual_one_or_as_much_as_is_needed() -> None:
    tensors = entries((1000, 1100))
    extents = plan_extents(whole(tensors), tensors, MIB)
    assert choose_memory(extents, None) == DEFAULT_MEMORY
    needed = needed_memory(extents, 3 * DEFAULT_MEMORY)
    assert choose_memory(extents, None, 3 * DEFAULT_MEMORY) == needed + ROOM_BYTES > 3 * DEFAULT_MEMORY


def test_a_source_may_allow_less_between_two_pieces() -> None:
    tensors = entries((1, 10), (100,), (1, 10))
    placements = whole(tensors)
    del placements["s1"]
    assert len(plan_extents(placements, tensors, MIB, max_gap_bytes=400)) == 1
    assert len(plan_extents(placements, tensors, MIB, max_gap_bytes=399)) == 2


def ranges(extents: list[Extent]) -> list[tuple[str, int, int]]:
    """Shard, begin and end of the bytes of neighbouring extents together."""
    found: list[tuple[str, int, int]] = []
    for extent in extents:
        if found and found[-1][::2] == (extent.shard, extent.begin):
            found[-1] = (extent.shard, found[-1][1], extent.end)
        else:
            found.append((extent.shard, extent.begin, extent.end))
    return found


def test_the_last_extents_are_in_quarters() -> None:
    tensors = entries(*[(1000, 1000)] * 40)  # 160 MB
    extents = plan_extents(whole(tensors), tensors, 32 * MIB)
    found = with_short_tail(extents, 2, MAX_GAP_BYTES)
    assert found[:-8] == extents[:-2]
    assert max(extent.num_bytes for extent in found[-8:]) < 0.3 * extents[-1].num_bytes
    assert ranges(found) == ranges(extents) == [("s", 100, 100 + 40 * 4_000_000)]


def test_no_extent_is_cut_below_the_smallest() -> None:
    tensors = entries((1000, 1000), (1000, 1000), (10, 10))
    extents = plan_extents(whole(tensors), tensors, SMALLEST_EXTENT_BYTES)
    assert with_short_tail(extents, 4, MAX_GAP_BYTES) == extents


@pytest.mark.parametrize(("is_network", "is_cut"), [(False, True), (True, False)])
def test_local_files_have_a_short_tail(
    write_shards: WriteShards,
    llama_tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    is_network: bool,
    is_cut: bool,
) -> None:
    for name in ("EXTENT_BYTES", "NETWORK_EXTENT_BYTES", "SMALLEST_EXTENT_BYTES"):
        monkeypatch.setattr(f"torchinfer.loader.plan.{name}", 512 if "SMALLEST" in name else 4096)
    if is_network:
        request.getfixturevalue("network_mounts")
    checkpoint = Checkpoint.open(write_shards({"model.safetensors": llama_tensors}))
    placements = whole(checkpoint.tensors)
    plan = plan_load(checkpoint, placements, torch.device("cpu"), WHOLE, LoadOptions(readers=2), None, None, {})
    sizes = [extent.num_bytes for extent in plan.extents]
    assert sum(sizes) == checkpoint.total_bytes
    assert (max(sizes[-8:]) < 0.5 * sizes[0]) == is_cut


def test_a_limit_holds_pinned_buffers_as_they_are_made() -> None:
    tensors = entries((1000, 1100))
    extents = plan_extents({"s0": Placement("p", convert=torch.neg)}, tensors, MIB)
    assert choose_memory(extents, 6 * MIB) == 6 * MIB
    with pytest.raises(ConfigError, match=f"needs {8 * MIB} bytes"):
        choose_memory(extents, 8 * MIB - 1, is_pinned=True)
