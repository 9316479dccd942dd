"""What a report says was read is what the storage gave: counted by the server, and by the system's calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from torchinfer.fake_gcs import Behaviour
from torchinfer.loader import Checkpoint, LoadOptions, LoadReport, load_weights
from torchinfer.loader.gcs import MAX_GAP_BYTES
from torchinfer.loader.source import ALIGNMENT
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import Shard

Bed = Any  # that of conftest.py
CPU = torch.device("cpu")


def load(bed: Bed, options: LoadOptions, shard: Shard, before: Callable[[], object] = lambda: None) -> LoadReport:
    """Load a process's part of the Llama; `before` is called when its headers have been read."""
    checkpoint = Checkpoint.open(bed.address)
    config = ModelConfig.from_dict(checkpoint.config)
    sizes = {
        "num_heads": config.num_heads // shard.world,
        "num_kv_heads": config.num_kv_heads // shard.world,
        "intermediate_size": config.intermediate_size // shard.world,
        "vocab_size": config.vocab_size // shard.world,
    }
    with torch.device("meta"):
        model = build_model(replace(config, **sizes))
    before()
    return load_weights(model, checkpoint, torch.float32, CPU, False, options, shard)


@pytest.mark.parametrize("storage", ["gs"])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("fault", ["", "truncate"])
def test_over_gs_it_is_what_the_server_sent(bed: Bed, world: int, fault: str) -> None:
    server = bed.gcs
    assert server is not None

    def start() -> None:
        server.stats(reset=True)
        server.set(Behaviour(fault=fault, every=2 if fault else 1))

    report = load(bed, LoadOptions(readers=4), Shard(world - 1, world), start)
    assert report.read_bytes == server.stats().num_bytes
    assert report.read_bytes >= report.num_bytes > 0
    assert (report.num_retries > 0) == bool(fault)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each read of a file has given."""
    found: list[int] = []
    whole = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        count = whole(descriptor, buffers, offset, flags)
        if not flags:  # with flags it is a question to the page cache
            found.append(count)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def share_bytes(tensors: Mapping[str, Tensor], world: int) -> int:
    """What a process must read: its rows; all of what is cut in columns, and of norms."""
    whole = ("norm.weight", "layernorm.weight", "o_proj.weight", "down_proj.weight")
    return sum(tensor.nbytes // (1 if name.endswith(whole) else world) for name, tensor in tensors.items())


@pytest.mark.parametrize("storage", ["folder"])
@pytest.mark.parametrize("world", [1, 2])
def test_of_files_it_is_what_the_reads_gave_and_no_more_than_a_process_needs(
    bed: Bed, given: list[int], world: int
) -> None:
    report = load(bed, LoadOptions(readers=4, direct=False), Shard(world - 1, world), given.clear)
    assert report.read_bytes == sum(given) == report.num_bytes == share_bytes(bed.tensors, world)


@pytest.mark.parametrize("storage", ["folder"])
def test_what_alignment_adds_is_counted(bed: Bed, given: list[int]) -> None:
    report = load(bed, LoadOptions(readers=1, direct=True), Shard(0, 1), given.clear)
    assert report.read_bytes == sum(given)
    assert report.num_bytes < report.read_bytes <= report.num_bytes + 4 * 2 * ALIGNMENT
    assert f"({report.read_bytes / 1e9:.3f} GB read)" in str(report)


@pytest.mark.parametrize("storage", ["gs"])
def test_rows_far_from_each_other_are_not_asked_for_in_one_request(bed: Bed) -> None:
    """The server would send what lies between them until it hears that nobody reads it."""
    num_rows = 4 * MAX_GAP_BYTES // 64  # of 16 numbers in float32; a process of two has the first half of each
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        bed.tensors[name] = torch.ones(num_rows, 16)
    bed.config["vocab_size"] = num_rows
    bed.write(bed.tensors)
    report = load(bed, LoadOptions(readers=2), Shard(0, 2), lambda: bed.gcs.stats(reset=True))
    assert bed.gcs.stats().num_bytes == report.read_bytes
    assert report.read_bytes - report.num_bytes < MAX_GAP_BYTES // 4
