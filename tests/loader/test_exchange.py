"""Processes that exchange what several need: the same parameters, each byte read once, and nobody waits for ever."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from torchinfer.errors import ConfigError
from torchinfer.fake_gcs import FakeGcs
from torchinfer.loader import Checkpoint, LoadOptions, load_weights
from torchinfer.loader.placement import Placement, place
from torchinfer.loader.rounds import Peers, find_peers
from torchinfer.loader.sharing import NARROW_BYTES, SharedPlan, choose_exchange, plan_shared
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import Cut, Shard
from torchinfer.quantization import SCHEMES, QuantizedMatrix
from torchinfer.testing import TINY, save_random_checkpoint

SCRIPT = Path(__file__).with_name("load_shard.py")
# Two key-value heads: of four processes, two share one. 768 rows and 256 columns: blocks of 100,000 bytes divide all.
LARGE = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
SMALL = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
BLOCK, LIMIT = 100_000, 8 << 20
Outcome = dict[str, list[dict[str, Any]]]  # case -> of each rank


def save(folder: Path, name: str, sizes: dict[str, Any]) -> Path:
    kind, options = TINY[name]
    save_random_checkpoint(getattr(transformers, kind)(**{**options, **sizes}), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in float32; that of `overflow` has a value beyond float16 in the last column of a cut tensor."""
    base = tmp_path_factory.mktemp("checkpoints")
    found = {"llama": save(base / "llama", "llama", LARGE), "mixtral": save(base / "mixtral", "mixtral", SMALL)}
    found["falcon"] = save(base / "falcon", "falcon-7b", {})
    found["overflow"] = save(base / "overflow", "llama", SMALL)
    (file,) = found["overflow"].glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][5, -1] = 1e6
    save_file(tensors, file)
    return found


def run(folder: Path, cases: dict[str, dict[str, Any]], world: int) -> Outcome:
    """Load in `world` processes; what those that end by themselves report."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    processes = [subprocess.Popen([sys.executable, SCRIPT, folder, str(rank), str(world)]) for rank in range(world)]
    try:
        for process in processes:
            process.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    files = [folder / f"{rank}.pt" for rank in range(world)]
    found = [torch.load(file, weights_only=False) for file in files if file.exists()]
    return {name: [outcome[name] for outcome in found] for name in cases}


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All cases in processes that are started once."""
    llama, mixtral, falcon, overflow = (str(folders[name]) for name in ("llama", "mixtral", "falcon", "overflow"))
    together = {"exchange": True, "block_bytes": BLOCK}
    cases: dict[str, dict[str, Any]] = {
        "llama": {"folder": llama, **together},
        "llama alone": {"folder": llama, "exchange": False},
        "mixtral": {"folder": mixtral, "exchange": True, "block_bytes": 10_000},
        "mixtral alone": {"folder": mixtral, "exchange": False},
        "bfloat16": {"folder": llama, **together, "dtype": "bfloat16", "memory": LIMIT},
        "bfloat16 alone": {"folder": llama, "exchange": False, "dtype": "bfloat16"},
        "narrow": {"folder": llama, **together, "narrow_bytes": 1 << 20},
        "narrow alone": {"folder": llama, "exchange": False},
        "narrow experts": {"folder": mixtral, "exchange": True, "block_bytes": 10_000, "narrow_bytes": 1 << 20},
        "narrow experts alone": {"folder": mixtral, "exchange": False},
        "narrow on device": {"folder": mixtral, "exchange": True, "narrow_bytes": 1 << 20, "is_on_device": True},
        "narrow on device alone": {"folder": mixtral, "exchange": False},
        "whole": {"folder": llama, **together, "is_whole": True},
        "whole alone": {"folder": llama, "exchange": False, "is_whole": True},
        "whole tight": {"folder": llama, **together, "is_whole": True, "is_tight": True},
        "whole tight alone": {"folder": llama, "exchange": False, "is_whole": True, "is_tight": True},
        "whole falcon": {"folder": falcon, "exchange": True, "block_bytes": 1000, "is_whole": True, "is_tight": True},
        "whole falcon alone": {"folder": falcon, "exchange": False, "is_whole": True},
        "whole late": {"folder": llama, **together, "is_whole": True, "fault": "late error"},
        "broken": {"folder": llama, **together, "fault": "error"},
        "late": {"folder": llama, **together, "fault": "late error"},
        "missing tensor": {"folder": llama, **together, "fault": "missing tensor"},
        "no memory": {"folder": llama, **together, "fault": "no memory"},
        "no connection": {"folder": llama, **together, "fault": "no connection", "is_on_device": True},
        "on device": {"folder": llama, **together, "is_on_device": True},
        "on device alone": {"folder": llama, "exchange": False},
        "overflow": {"folder": overflow, "exchange": True, "block_bytes": 1000, "dtype": "float16"},
        "after errors": {"folder": llama, **together},
        "local": {"folder": llama},
        "network": {"folder": llama, "is_network": True},
    }
    world = request.param
    return run(tmp_path_factory.mktemp(f"world{world}") / "run", cases, world)


def total_bytes(folder: Path) -> int:
    return Checkpoint.open(folder).total_bytes


def bytes_read(ranks: list[dict[str, Any]]) -> int:
    return sum(rank["report"].read_bytes for rank in ranks)


SHARED = {  # case -> checkpoint
    "llama": "llama",
    "mixtral": "mixtral",
    "narrow": "llama",
    "narrow experts": "mixtral",
    "narrow on device": "mixtral",
    "whole": "llama",
    "whole tight": "llama",
    "whole falcon": "falcon",
}


@pytest.mark.parametrize("name", [*SHARED, "bfloat16", "on device"])
def test_parameters_are_those_of_a_load_without_an_exchange(outcome: Outcome, name: str) -> None:
    for found, expected in zip(outcome[name], outcome[f"{name} alone"], strict=True):
        assert "error" not in found, found["error"]
        assert found["state"].keys() == expected["state"].keys()
        for parameter, tensor in expected["state"].items():
            assert torch.equal(found["state"][parameter], tensor), parameter


@pytest.mark.parametrize("name", SHARED)
def test_each_byte_leaves_the_storage_once(outcome: Outcome, folders: dict[str, Path], name: str) -> None:
    assert bytes_read(outcome[name]) == total_bytes(folders[SHARED[name]])


@pytest.mark.parametrize("name", ["llama", "narrow", "whole"])
def test_reading_is_divided_evenly(outcome: Outcome, name: str) -> None:
    read = [rank["report"].num_bytes for rank in outcome[name]]
    assert max(read) - min(read) <= BLOCK + BLOCK // 32, "as long as extents may be"


def test_the_report_says_what_came_from_others(outcome: Outcome) -> None:
    for rank in outcome["llama"]:
        held = sum(tensor.numel() * 4 for name, tensor in rank["state"].items() if "rotary" not in name)
        assert rank["report"].exchanged_bytes > 0
        assert rank["report"].exchanged_bytes <= held
        assert str(rank["report"]).endswith("GB from other processes")


def test_staging_memory_stays_within_its_limit(outcome: Outcome) -> None:
    for rank in outcome["bfloat16"]:
        assert rank["report"].peak_host_bytes <= LIMIT


def test_with_the_least_limit_whole_tensors_are_exchanged_few_at_once(
    outcome: Outcome, folders: dict[str, Path]
) -> None:
    for rank in outcome["whole tight"]:
        assert rank["report"].peak_host_bytes <= rank["memory"] < total_bytes(folders["llama"])


@pytest.mark.parametrize("name", ["broken", "late", "whole late"])
def test_the_failure_of_one_process_is_an_error_in_all_that_names_it(outcome: Outcome, name: str) -> None:
    ranks = outcome[name]
    assert ranks[1]["error"] == "this disk is broken"
    for rank in (*ranks[:1], *ranks[2:]):
        assert f"process 1 of the {len(ranks)} that load together failed" in rank["error"]
        assert "CheckpointError: this disk is broken" in rank["error"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing tensor", "1 tensor missing: 'model.norm.weight'"),
        ("no memory", "out of memory"),
        ("no connection", "cannot connect cpu with the others': NCCL is broken"),
    ],
)
def test_a_process_that_fails_before_anything_is_read_is_not_waited_for(
    outcome: Outcome, name: str, problem: str
) -> None:
    ranks = outcome[name]
    assert problem in ranks[1]["error"]
    for rank in (*ranks[:1], *ranks[2:]):
        assert f"process 1 of the {len(ranks)} that load together failed" in rank["error"]
        assert problem in rank["error"]
        assert rank["seconds"] < 5, "of a timeout of 20"


def test_a_value_that_one_process_cannot_hold_is_an_error_in_all(outcome: Outcome) -> None:
    last = len(outcome["overflow"]) - 1
    errors = [rank["error"] for rank in outcome["overflow"]]
    assert errors[last].startswith("tensor 'model.layers.0.mlp.down_proj.weight' has values from")
    assert all(f"process {last} of the {last + 1}" in error for error in errors[:last])


def test_a_load_after_a_failed_one_works(outcome: Outcome) -> None:
    for found, expected in zip(outcome["after errors"], outcome["llama"], strict=True):
        assert all(torch.equal(found["state"][name], tensor) for name, tensor in expected["state"].items())


def test_from_a_network_processes_exchange(outcome: Outcome) -> None:
    assert all(rank["report"].exchanged_bytes for rank in outcome["network"])


@pytest.mark.parametrize("world", [2, 4])
def test_over_gs_rows_of_experts_are_sent_by_the_server_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """A process's rows of an expert lie in each of many tensors, with little between them."""
    (tmp_path / "bucket").symlink_to(folders["mixtral"].parent)
    address = "gs://bucket/mixtral"
    with FakeGcs(tmp_path) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        Checkpoint.open(address)
        headers = server.stats(reset=True).num_bytes
        ranks = run(tmp_path / "run", {"gs": {"folder": address, "narrow_bytes": NARROW_BYTES}}, world)["gs"]
        sent = server.stats().num_bytes - world * headers
    assert sent == bytes_read(ranks) == total_bytes(folders["mixtral"])


def test_of_local_files_each_process_reads_its_slices(outcome: Outcome) -> None:
    assert not any(rank["report"].exchanged_bytes for rank in outcome["local"])


def test_the_end_of_a_process_is_an_error_in_the_others(folders: dict[str, Path], tmp_path: Path) -> None:
    case = {"folder": str(folders["llama"]), "exchange": True, "fault": "exit"}
    start = time.monotonic()
    (found,) = run(tmp_path / "run", {"exit": case}, 2)["exit"]
    assert "process 0 of the 2 that load together lost another one" in found["error"]
    assert time.monotonic() - start < 60, "the others did not wait for ever"


SAVED = 3_000_000_000
CHOICES = [
    (True, False, 4, True, SAVED, True, "the storage is behind a network, which is spared 3.000 GB"),
    (False, True, 4, True, SAVED, True, "direct reads leave nothing in the page cache for others; 3.000 GB are saved"),
    (False, False, 4, True, SAVED, False, "the files are local, and the page cache gives the second reader the speed"),
    (True, True, 1, True, SAVED, False, "there is one process"),
    (True, True, 4, False, SAVED, False, "torch.distributed has no group of these 4 processes"),
    (True, True, 4, True, 0, False, "no two processes need the same bytes"),
]


@pytest.mark.parametrize(("is_network", "direct", "world", "has_group", "saved", "choice", "reason"), CHOICES)
def test_the_choice(
    is_network: bool, direct: bool, world: int, has_group: bool, saved: int, choice: bool, reason: str
) -> None:
    found, why = choose_exchange(is_network, direct, world, has_group, saved)
    assert found == choice
    assert reason in why


def shared_of(folder: Path, rank: int, world: int, narrow_bytes: int = 1) -> SharedPlan:
    """The plan of one process for a Llama of which each has all heads."""
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = build_model(replace(config, intermediate_size=config.intermediate_size // world))
    placements, problems = place(model, checkpoint.tensors, Shard(rank, world))
    assert not problems
    return plan_shared(placements, checkpoint.tensors, Shard(rank, world), BLOCK, narrow_bytes)


def test_all_processes_plan_the_same(folders: dict[str, Path]) -> None:
    plans = [shared_of(folders["llama"], rank, 3) for rank in range(3)]
    assert plans[0].items
    assert all(plan.items == plans[0].items for plan in plans)


def test_every_shared_extent_is_read_or_received(folders: dict[str, Path]) -> None:
    for rank in range(3):
        plan = shared_of(folders["llama"], rank, 3)
        assert len(plan.own) + len(plan.received) == len(plan.items)
        assert abs(3 * len(plan.own) - len(plan.items)) <= 3


def test_a_tensor_of_which_each_process_has_many_rows_is_not_shared(folders: dict[str, Path]) -> None:
    names = shared_of(folders["llama"], 0, 3).names
    assert "model.layers.0.mlp.down_proj.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" not in names


def test_a_tensor_of_which_each_process_has_few_rows_is_shared(folders: dict[str, Path]) -> None:
    """As many as come in the time that a request takes."""
    part = LARGE["intermediate_size"] // 3 * LARGE["hidden_size"] * 4
    name = "model.layers.0.mlp.up_proj.weight"
    assert name not in shared_of(folders["llama"], 0, 3, part).names
    plan = shared_of(folders["llama"], 0, 3, part + 1)
    assert name in plan.names
    assert {item.holders for item in plan.items} == {(0, 1, 2)}
    assert plan.bytes_saved == shared_of(folders["llama"], 0, 3, part).bytes_saved, "nobody else reads these rows"


def test_a_tensor_with_a_transform_is_shared_whole(folders: dict[str, Path]) -> None:
    placement = place_transformed(folders["llama"])
    checkpoint = Checkpoint.open(folders["llama"])
    (item,) = plan_shared({"model.embed_tokens.weight": placement}, checkpoint.tensors, Shard(0, 2), BLOCK).items
    assert [piece.num_bytes for piece in item.extent.pieces] == [LARGE["vocab_size"] * LARGE["hidden_size"] * 4]


def test_rows_that_share_a_scale_are_not_torn_apart(folders: dict[str, Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = Checkpoint.open(folders["llama"])
    with torch.device("meta"):
        matrix = QuantizedMatrix((96, 256), SCHEMES["fp8_block"])
    for length, is_shared in ((96, False), (128, True)):
        placement = Placement("p", cut=Cut(0, 0, length), matrix=matrix)
        plan = plan_shared({name: placement}, checkpoint.tensors, Shard(0, 768 // length), BLOCK)
        assert bool(plan.items) == is_shared


def place_transformed(folder: Path) -> Placement:
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        placements, _ = place(build_model(config), checkpoint.tensors)
    placement = placements["model.embed_tokens.weight"]
    return replace(placement, convert=torch.neg)


def test_an_exchange_that_was_asked_for_needs_a_group(folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(folders["mixtral"])
    config = ModelConfig.from_dict(json.loads((folders["mixtral"] / "config.json").read_text()))
    with torch.device("meta"):
        model = build_model(config)
    options = LoadOptions(exchange=True)
    with pytest.raises(ConfigError, match="exchange=True needs a group of these 2 processes"):
        load_weights(model, checkpoint, torch.float32, torch.device("cpu"), False, options, Shard(0, 2))


def test_an_exchange_and_verification_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exchange=True and verify=True exclude each other"):
        LoadOptions(exchange=True, verify=True)


def test_a_group_of_other_ranks_is_refused() -> None:
    group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, datetime.timedelta(seconds=5))
    with pytest.raises(ConfigError, match="rank 0 of 1 in the group, but loads shard 1 of 2"):
        find_peers(Shard(1, 2), Peers(group))
