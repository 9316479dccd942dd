"""Checkpoint folders: round trips against the safetensors library, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader.checkpoint import Checkpoint, scan

Write = Callable[..., Path]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int64, torch.bool, torch.uint8)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bits = {dtype: torch.randint(0, 2, (3, 8), generator=generator) for dtype in DTYPES}
    return {f"{seed}.{dtype}": value.to(dtype) for dtype, value in bits.items()}


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def sharded(write_shards: Write) -> Path:
    return write_shards({FIRST: tensors(1), SECOND: tensors(2)})


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bool(torch.equal(left, right))


def test_single_file_round_trip(write_shards: Write) -> None:
    folder = write_shards({"model.safetensors": tensors()})
    checkpoint = Checkpoint.open(folder)
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    assert all(same(checkpoint.read(name), expected[name]) for name in expected)


def test_sharded_round_trip(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    expected = load_file(sharded / FIRST) | load_file(sharded / SECOND)
    assert set(checkpoint.tensors) == set(expected)
    assert all(same(checkpoint.read(name), expected[name]) for name in expected)
    assert checkpoint.shards == [FIRST, SECOND]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,)])
def test_scalars_and_empty_tensors_are_read(write_shards: Write, shape: tuple[int, ...]) -> None:
    folder = write_shards({"model.safetensors": {"x": torch.full(shape, 1.5)}})
    assert same(Checkpoint.open(folder).read("x"), torch.full(shape, 1.5))


def test_what_is_read_is_the_callers(write_shards: Write) -> None:
    checkpoint = Checkpoint.open(write_shards({"model.safetensors": {"x": torch.ones(3)}}))
    checkpoint.read("x").zero_()
    assert checkpoint.read("x").tolist() == [1, 1, 1]


def test_total_bytes_and_configs_and_tokenizer(write_shards: Write) -> None:
    folder = write_shards({"model.safetensors": {"x": torch.ones(3, 5)}}, {"model_type": "y"})
    assert not Checkpoint.open(folder).has_tokenizer
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.total_bytes == 60
    assert checkpoint.config == {"model_type": "y"} and checkpoint.generation_config == {"eos_token_id": 2}
    assert checkpoint.has_tokenizer and checkpoint.address == str(folder)


def test_generation_config_may_be_missing(write_shards: Write) -> None:
    assert Checkpoint.open(write_shards({"model.safetensors": tensors()})).generation_config == {}


def test_a_tensor_that_is_not_there_is_named(write_shards: Write) -> None:
    checkpoint = Checkpoint.open(write_shards({"model.safetensors": tensors()}))
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        checkpoint.read("absent")


def test_a_file_cut_after_opening_is_an_error(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-1])
    name = next(entry.name for entry in checkpoint.tensors.values() if entry.shard == SECOND)
    with pytest.raises(CheckpointError, match=f"{SECOND} was replaced or changed while it was read"):
        checkpoint.read(name)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent' does not exist"):
        Checkpoint.open(tmp_path / "absent")


def test_path_of_a_file(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{FIRST} is a file"):
        Checkpoint.open(sharded / FIRST)


def test_empty_folder_says_both_things(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)no config\.json.*has no files.*neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)


def test_other_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"neither .* \(the folder has adapter_model\.safetensors\)"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", r"config\.json is not valid JSON"),
        ("config.json", "[]", r"config\.json holds a JSON list; an object"),
        ("config.json", '{"a": 1, "a": 2}', "key 'a' stands twice"),
        ("generation_config.json", "null", r"generation_config\.json holds a JSON NoneType"),
        (INDEX, "{", r"index\.json is not valid JSON"),
        (INDEX, "{}", "has no weight_map"),
        (INDEX, '{"weight_map": {}}', "has no weight_map"),
        (INDEX, '{"weight_map": {"x": 1}}', "must map tensor names to file names"),
        (INDEX, '{"weight_map": [1]}', "must map tensor names to file names"),
    ],
)
def test_json_files_that_are_not_what_they_should_be(sharded: Path, name: str, text: str, message: str) -> None:
    (sharded / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(sharded)


def test_pickle_is_never_read_and_the_way_out_is_told(write_shards: Write) -> None:
    folder = write_shards({})
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*never read here.*save_pretrained"):
        Checkpoint.open(folder)


def test_all_missing_shards_are_named(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(x="lost-1.safetensors", y="lost-2.safetensors"))
    with pytest.raises(CheckpointError, match=r"2 of 4 shards .* lost-1\.safetensors, lost-2\.safetensors; download"):
        Checkpoint.open(sharded)


def test_a_tensor_of_the_index_that_its_shard_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update(ghost=SECOND))
    with pytest.raises(CheckpointError, match=f"1 tensors of {INDEX} are not in their shard: 'ghost' in {SECOND}"):
        Checkpoint.open(sharded)


def test_a_tensor_of_a_shard_that_the_index_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.pop("1.torch.float32"))
    with pytest.raises(CheckpointError, match=f"not in {INDEX}, .*'1.torch.float32' in {FIRST}"):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file(tensors(1) | tensors(2), sharded / SECOND)
    with pytest.raises(CheckpointError, match=f"names another shard for them: '1.torch.*' in {SECOND}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", ""])
def test_a_shard_outside_the_folder_is_not_opened(sharded: Path, name: str) -> None:
    save_file({"x": torch.ones(1)}, sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update(x=name))
    with pytest.raises(CheckpointError, match=f"outside the folder: {re.escape(repr(name))}"):
        Checkpoint.open(sharded)


def test_a_shard_in_a_subfolder_is_read(sharded: Path) -> None:
    (sharded / "sub").mkdir()
    save_file({"x": torch.ones(1)}, sharded / "sub" / "more.safetensors")
    edit_index(sharded, lambda weight_map: weight_map.update(x="sub/more.safetensors"))
    assert Checkpoint.open(sharded).read("x").tolist() == [1]


def test_single_file_beside_a_foreign_index_is_ambiguous(sharded: Path) -> None:
    save_file(tensors(), sharded / "model.safetensors")
    with pytest.raises(CheckpointError, match="unclear which of them is meant: remove one"):
        Checkpoint.open(sharded)


def test_single_file_with_its_own_index_is_read(write_shards: Write) -> None:
    folder = write_shards({"model.safetensors": tensors()})
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(), "model.safetensors")}))
    assert set(Checkpoint.open(folder).tensors) == set(tensors())


def test_truncated_shard_is_found_before_any_tensor_is_read(sharded: Path) -> None:
    (sharded / FIRST).write_bytes((sharded / FIRST).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{FIRST} is damaged; download it again: the file has .* truncated"):
        Checkpoint.open(sharded)


def test_everything_wrong_is_reported_at_once(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    (sharded / FIRST).write_bytes(b"")
    edit_index(sharded, lambda weight_map: weight_map.update(x="lost.safetensors", y="../z", ghost=SECOND))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(sharded)
    for part in ("no config.json", f"{FIRST} has 0 bytes", "lost.safetensors", "'../z'", "'ghost'"):
        assert part in str(caught.value)


def test_scan_keeps_what_is_well(sharded: Path) -> None:
    (sharded / FIRST).write_bytes(b"")
    checkpoint, problems = scan(sharded)
    assert set(checkpoint.tensors) == set(tensors(2))
    assert len(problems) == 1
