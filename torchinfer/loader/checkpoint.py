"""A checkpoint folder as Hugging Face lays it out: config.json, safetensors shards, an index if they are several.

`scan` reads names, shapes and places and no tensor; `Checkpoint.open` refuses a folder in which anything is wrong.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchinfer.errors import CheckpointError, raise_all
from torchinfer.loader.header import TensorEntry, parse_json, quoted, read_header, shorten
from torchinfer.loader.retry import PersistentReader, Stopped
from torchinfer.loader.source import FileStat, Source, is_inside
from torchinfer.loader.stall import StalledError, Trial, read_file, unless_stalled
from torchinfer.loader.storage import list_source
from torchinfer.tokenizer import VOCABULARY_FILES

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Files of older tools -> the method that they are about.
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 100_000_000
HEADER_READERS = 16


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder's configuration and the places of its tensors."""

    source: Source
    config: dict[str, Any]
    generation_config: dict[str, Any]  # empty when the folder has none
    tensors: dict[str, TensorEntry]
    stats: dict[str, FileStat]  # of the files that hold tensors: what is read must be of this version
    has_tokenizer: bool
    quantization: Any = None  # what config.json, or a file beside it, says of tensors that come quantized

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the configuration and all headers.

        Raises:
            CheckpointError: with everything that is missing, damaged or contradictory.
        """
        checkpoint, problems = scan(path)
        raise_all(problems, CheckpointError, f"cannot open checkpoint {path}")
        return checkpoint

    @property
    def address(self) -> str:
        """The folder, or gs://bucket/prefix."""
        return self.source.address

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, in the dtypes of the files."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def shards(self) -> list[str]:
        """Names of the files that hold tensors, sorted."""
        return sorted({entry.shard for entry in self.tensors.values()})

    def read(self, name: str, stop: threading.Event | None = None) -> Tensor:
        """One tensor on the host, in the file's dtype, in memory of its own.

        Raises:
            CheckpointError: there is none, or it cannot be read.
            Stopped: `stop` is set.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.address} has no tensor {quoted(name)}; `torchinfer inspect` lists what it has"
            )
        entry = self.tensors[name]
        end = entry.offset + entry.num_bytes

        def read(trial: Trial) -> Tensor:
            memory = torch.empty(entry.num_bytes, dtype=torch.uint8)
            stat = self.stats[entry.shard]
            with PersistentReader(self.source, entry.shard, stat, trial.attempts, end=end) as reader:
                reader.read_into(entry.offset, memory.numpy().data, trial.count)
                reader.check()
            return memory

        memory = unless_stalled(f"read {quoted(name)} of {self.address}/{entry.shard}", read, stop)
        return memory.view(entry.dtype).reshape(entry.shape)


def scan(path: str | Path) -> tuple[Checkpoint, list[str]]:
    """What can be read of a checkpoint, and all that is wrong with it.

    Raises:
        CheckpointError: the path is no folder that can be listed; nothing can be said about what is in it.
    """
    source, names = list_source(path)
    problems: list[str] = []
    config = _read_json(source, CONFIG, problems) if CONFIG in names else {}
    if CONFIG not in names:
        problems.append(f"there is no {CONFIG}; pass the folder of a Hugging Face checkpoint ({_listing(names)})")
    generation = _read_json(source, GENERATION_CONFIG, problems) if GENERATION_CONFIG in names else {}
    headers = _scan_tensors(source, names, problems)
    tensors = {entry.name: entry for header in headers for entry in header.entries}
    stats = {header.shard: header.stat for header in headers}
    has_tokenizer = any(name in names for name in VOCABULARY_FILES)
    quantization = _read_quantization(source, names, config, problems)
    return Checkpoint(source, config, generation, tensors, stats, has_tokenizer, quantization), problems


@dataclass(frozen=True, slots=True)
class _Header:
    shard: str
    stat: FileStat
    entries: list[TensorEntry]


def _read_json(source: Source, name: str, problems: list[str]) -> dict[str, Any]:
    try:
        return parse_json(read_file(source, name, MAX_JSON_BYTES), name)
    except StalledError:
        raise
    except CheckpointError as error:
        problems.append(str(error))
        return {}


def _read_quantization(source: Source, names: list[str], config: dict[str, Any], problems: list[str]) -> Any:
    for key in QUANTIZATION_KEYS:
        if config.get(key) is not None:
            return config[key]
    for name, method in QUANTIZATION_FILES.items():
        if name in names:
            return {"quant_method": method, **_read_json(source, name, problems)}
    return None


def _scan_tensors(source: Source, names: list[str], problems: list[str]) -> list[_Header]:
    if INDEX in names:
        return _scan_shards(source, names, problems)
    if SINGLE in names:
        return _read_headers(source, [SINGLE], problems)
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        problems.append(
            f"the weights are pickle files ({', '.join(shorten(pickles, 3))}), which can run code when they are read "
            "and are never read here; load them once with transformers' AutoModelForCausalLM.from_pretrained and "
            "write safetensors with save_pretrained(folder, safe_serialization=True)"
        )
    else:
        problems.append(f"there is neither {SINGLE} nor {INDEX} ({_listing(names)})")
    return []


def _scan_shards(source: Source, names: list[str], problems: list[str]) -> list[_Header]:
    weight_map = _weight_map(source, problems)
    shards = sorted(set(weight_map.values()))
    if SINGLE in names and shards and SINGLE not in shards:
        problems.append(
            f"there is {SINGLE} and an {INDEX} that does not use it; it is unclear which of them is meant: remove one"
        )
    outside = [quoted(shard) for shard in shards if not is_inside(shard)]
    if outside:
        problems.append(
            f"{INDEX} names files outside the folder: {', '.join(shorten(outside))}; names must be relative, without "
            "'.' and '..' parts"
        )
    inside = [shard for shard in shards if is_inside(shard)]
    missing = [shard for shard in inside if shard not in names and not _is_deeper(source, shard)]
    if missing:
        problems.append(
            f"{len(missing)} of {len(shards)} shards that {INDEX} names are not there: {', '.join(shorten(missing))}; "
            "download them"
        )
    headers = _read_headers(source, [shard for shard in inside if shard not in missing], problems)
    readable = {header.shard for header in headers}
    _compare(weight_map, [entry for header in headers for entry in header.entries], readable, problems)
    return headers


def _weight_map(source: Source, problems: list[str]) -> dict[str, str]:
    num_problems = len(problems)
    index = _read_json(source, INDEX, problems)
    if len(problems) > num_problems:
        return {}
    weight_map = index.get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        problems.append(f"weight_map of {INDEX} must map tensor names to file names; download {INDEX} again")
        return {}
    if not weight_map:
        problems.append(f"{INDEX} has no weight_map with tensors in it; download it again")
    return weight_map


def _compare(weight_map: dict[str, str], entries: list[TensorEntry], readable: set[str], problems: list[str]) -> None:
    """Both ways: each tensor of the index is in its shard, and each tensor of a shard is in the index."""
    found = {(entry.name, entry.shard) for entry in entries}
    absent = [
        f"{quoted(name)} in {shard}"
        for name, shard in weight_map.items()
        if shard in readable and (name, shard) not in found
    ]
    unlisted = [
        f"{quoted(entry.name)} in {entry.shard}" for entry in entries if weight_map.get(entry.name) != entry.shard
    ]
    if absent:
        problems.append(
            f"{len(absent)} tensors of {INDEX} are not in their shard: {', '.join(shorten(absent))}; the index and "
            "the shards are of different versions: download both again"
        )
    if unlisted:
        problems.append(
            f"{len(unlisted)} tensors of the shards are not in {INDEX}, or it names another shard for them: "
            f"{', '.join(shorten(unlisted))}; the index and the shards are of different versions: download both again"
        )


def _is_deeper(source: Source, shard: str) -> bool:
    """Whether a shard that the list of the folder does not show is in a subfolder."""
    return "/" in shard and unless_stalled(f"look at {source.address}/{shard}", lambda trial: source.has(shard))


def _read_headers(source: Source, shards: list[str], problems: list[str]) -> list[_Header]:
    """Those that can be read. Over a network side by side: a header is two or three round trips there. Of a disk one
    after the other: threads that parse them would only wait for each other."""
    stop = threading.Event()

    def read(shard: str) -> _Header | CheckpointError | Stopped:
        def try_it(trial: Trial) -> _Header:
            stat = source.stat(shard)
            return _Header(shard, stat, read_header(source, shard, stat, trial))

        try:
            return unless_stalled(f"read the header of {source.address}/{shard}", try_it, stop)
        except StalledError as error:
            stop.set()  # or each of the others would be waited for as long
            return error
        except (CheckpointError, Stopped) as error:
            return error

    with ThreadPoolExecutor(HEADER_READERS, "header") as pool:
        try:
            found = list((pool.map if source.is_network else map)(read, shards))
        finally:
            stop.set()  # after Ctrl-C nobody waits for what is left
    for stalled in (each for each in found if isinstance(each, StalledError)):
        raise stalled
    problems += [str(each) for each in found if isinstance(each, CheckpointError)]
    return [each for each in found if isinstance(each, _Header)]


def _listing(names: list[str]) -> str:
    return f"the folder has {', '.join(shorten(names, 8))}" if names else "the folder has no files"
