"""The header of a safetensors file: parsed strictly, before anything is allocated from what it says.

    bytes    0        8            8 + n                     file size
             | n: u64 | JSON of n  | data of all tensors     |
                                     offsets count from here, tensors adjoin, the last one ends the file

Source: https://github.com/huggingface/safetensors (README, section Format).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from torchinfer.errors import CheckpointError, raise_all
from torchinfer.loader.retry import PersistentReader
from torchinfer.loader.source import FileStat, Source
from torchinfer.loader.stall import Trial

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_SIGNED = 2**63 - 1
SHOWN_PROBLEMS = 20
LENGTH_BYTES = 8
FIRST_BYTES = 256 << 10  # read at once: almost every header is shorter
LFS_POINTER = b"version https://git-lfs"
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` bytes of file `shard` from `offset`, row-major, little-endian."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shard: str
    offset: int  # bytes from the start of the file
    num_bytes: int


def read_header(source: Source, shard: str, stat: FileStat, trial: Trial | None = None) -> list[TensorEntry]:
    """All tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: with what the header says, the rule it breaks, and what to do; several where there are.
    """
    text = _header_text(source, shard, stat, trial or Trial())
    fields = _parse(text, shard)
    _check_metadata(fields.pop("__metadata__", {}), shard)
    data = LENGTH_BYTES + len(text)
    entries: list[TensorEntry] = []
    problems: list[str] = []
    for name, value in fields.items():
        found = _entry(name, value, shard, data)
        if isinstance(found, str):
            problems.append(found)
        else:
            entries.append(found)
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    problems = problems or _layout_problems(entries, data, stat.size)
    raise_all(shorten(problems), CheckpointError, f"{shard} is damaged; download it again")
    return entries


def shorten(items: list[str], limit: int = SHOWN_PROBLEMS) -> list[str]:
    """The first items and a count of the others."""
    return items if len(items) <= limit else [*items[:limit], f"... and {len(items) - limit} more"]


def quoted(name: str) -> str:
    """A name from a file as it appears in a message: escaped, and cut when it is absurdly long."""
    return repr(name) if len(name) <= 200 else f"{name[:200]!r}..."


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice, at any level; `what` is the file's name in messages."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise CheckpointError(f"{what} is nested too deeply to be the JSON that it should be") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}; an object ({{...}}) is expected")
    return value


def _header_text(source: Source, shard: str, stat: FileStat, trial: Trial) -> bytes:
    start = bytearray(min(stat.size, FIRST_BYTES))
    with PersistentReader(source, shard, stat, trial.attempts, end=len(start)) as reader:
        reader.read_into(0, memoryview(start), trial.count)
    length = _header_length(bytes(start), shard, stat.size)
    text = bytearray(length)
    known = start[LENGTH_BYTES : LENGTH_BYTES + length]
    text[: len(known)] = known
    if len(known) < length:
        with PersistentReader(source, shard, stat, trial.attempts, end=LENGTH_BYTES + length) as reader:
            reader.read_into(len(start), memoryview(text)[len(known) :], trial.count)
    return bytes(text)


def _header_length(start: bytes, shard: str, size: int) -> int:
    if size < LENGTH_BYTES:
        raise CheckpointError(f"{shard} has {size} bytes; a safetensors file has at least 8: download it again")
    if start.startswith(LFS_POINTER):
        raise CheckpointError(f"{shard} is a git-lfs pointer of {size} bytes, not the file itself; run 'git lfs pull'")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{shard} says that its header has {length} bytes; at most {MAX_HEADER_BYTES} are allowed: it is damaged "
            "or no safetensors file, download it again"
        )
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{shard} says that its header has {length} bytes, but the file ends after {size - LENGTH_BYTES}: it is "
            "truncated, download it again"
        )
    return length


def _parse(text: bytes, shard: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"the header of {shard} begins with {text[:8]!r}; it must begin with '{{'")
    return parse_json(text, f"the header of {shard}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {quoted(name)} stands twice in one object")
        found[name] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_metadata(value: object, shard: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{shard} is damaged: __metadata__ must map strings to strings; download it again")


def _entry(name: str, value: object, shard: str, start: int) -> TensorEntry | str:
    """One tensor of the header, or what is wrong with it."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return f"tensor {quoted(name)} must have exactly dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"tensor {quoted(name)} has dtype {dtype!r:.40}; known are {', '.join(DTYPES)}"
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return f"tensor {quoted(name)} has shape {shape!r:.80}; at most {MAX_DIMENSIONS} sizes in [0, 2^63) are allowed"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"tensor {quoted(name)} has data_offsets {offsets!r:.80}; [begin, end] with begin <= end is expected"
    begin, end = offsets
    num_bytes = _num_bytes(shape, DTYPES[dtype].itemsize)
    if num_bytes is None:
        return f"tensor {quoted(name)} has shape {shape!r:.80}, more than 2^63 bytes of {dtype}"
    if num_bytes != end - begin:
        return (
            f"tensor {quoted(name)} has {end - begin} bytes (data_offsets [{begin}, {end}]), but {dtype} of shape "
            f"{shape!r:.80} needs {num_bytes}"
        )
    return TensorEntry(name, DTYPES[dtype], tuple(shape), shard, start + begin, num_bytes)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_SIGNED for size in value)


def _num_bytes(shape: list[int], itemsize: int) -> int | None:
    """Bytes of a tensor; None where a 64-bit computation overflows, also on the way to a product of 0."""
    product = itemsize
    for size in shape:
        product *= max(size, 1)
        if product > MAX_SIGNED:
            return None
    return 0 if 0 in shape else product


def _layout_problems(entries: list[TensorEntry], start: int, size: int) -> list[str]:
    """Where tensors, sorted by offset, overlap, leave a hole, or do not end where the file ends."""
    problems = []
    expected = start
    for entry in entries:
        if entry.offset != expected:
            what = "overlaps the tensor before it" if entry.offset < expected else "leaves a hole before it"
            problems.append(
                f"tensor {quoted(entry.name)} begins at data byte {entry.offset - start} and {what}; "
                f"it must begin at {expected - start}"
            )
        expected = max(expected, entry.offset + entry.num_bytes)
    if expected > size:
        problems.append(f"the file has {size} bytes, but its header describes {expected}: it is truncated")
    elif expected < size:
        problems.append(f"the file has {size} bytes, but its header describes {expected}: {size - expected} are extra")
    return problems
