"""Where every tensor of a quantized checkpoint lies, computed before anything is read.

A file's tensors are ordered by the size of their numbers, the largest first, so that each is aligned: readers view
bytes as numbers in place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from torchinfer.loader.checkpoint import SINGLE, Checkpoint
from torchinfer.loader.header import DTYPES, LENGTH_BYTES, TensorEntry
from torchinfer.loader.placement import Placement
from torchinfer.writer.compressed_tensors import Stored, stored_as

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_FILE_BYTES = 5_000_000_000  # of those that a checkpoint of one file is divided into: what is done again at most
ALIGNMENT = 8  # of the data in a file: int64


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor in its file."""

    stored: Stored
    offset: int  # bytes from the start of the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.stored.shape[1:]) * self.stored.dtype.itemsize

    def offset_of(self, row: int) -> int:
        """Where the numbers of a row of the checkpoint's tensor, and of those after it, begin."""
        return self.offset + row // self.stored.row_block * self.row_bytes


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file that is written. `slots`: checkpoint tensor -> what it becomes, in the order of `encode`."""

    name: str
    header: bytes
    num_bytes: int  # of the whole file
    slots: Mapping[str, tuple[Slot, ...]]

    @property
    def tensor_names(self) -> list[str]:
        """Of all tensors in it."""
        return [slot.stored.name for slots in self.slots.values() for slot in slots]


def plan_files(
    checkpoint: Checkpoint, placements: Mapping[str, Placement], largest_bytes: int = LARGEST_FILE_BYTES
) -> list[FilePlan]:
    """The files of the checkpoint under their names; one file alone is divided where it becomes too large."""
    stored = {name: _stored(checkpoint.tensors[name], placement) for name, placement in placements.items()}
    if checkpoint.shards != [SINGLE]:
        return [plan_file(shard, _of_shard(checkpoint, shard, stored)) for shard in checkpoint.shards]
    parts = _divided(_of_shard(checkpoint, SINGLE, stored), largest_bytes)
    if len(parts) == 1:
        return [plan_file(SINGLE, parts[0])]
    return [
        plan_file(f"model-{number:05}-of-{len(parts):05}.safetensors", part) for number, part in enumerate(parts, 1)
    ]


def plan_file(name: str, tensors: Mapping[str, list[Stored]]) -> FilePlan:
    """The header and the places of these tensors."""
    flat = [stored for group in tensors.values() for stored in group]
    order = sorted(flat, key=lambda stored: -stored.dtype.itemsize)  # stable: else as in the checkpoint
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for stored in order:
        end = at + _num_bytes(stored)
        header[stored.name] = {
            "dtype": DTYPE_NAMES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [at, end],
        }
        starts[stored.name], at = at, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    data = LENGTH_BYTES + len(text)
    slots = {
        source: tuple(Slot(stored, data + starts[stored.name]) for stored in group) for source, group in tensors.items()
    }
    return FilePlan(name, len(text).to_bytes(LENGTH_BYTES, "little") + text, data + at, slots)


def _stored(entry: TensorEntry, placement: Placement) -> list[Stored]:
    if placement.matrix is None:
        return [Stored(entry.name, entry.dtype, entry.shape)]
    return stored_as(entry.name, entry.shape, placement.matrix.scheme)


def _of_shard(checkpoint: Checkpoint, shard: str, stored: Mapping[str, list[Stored]]) -> dict[str, list[Stored]]:
    entries: Iterable[TensorEntry] = (entry for entry in checkpoint.tensors.values() if entry.shard == shard)
    return {entry.name: stored[entry.name] for entry in sorted(entries, key=lambda entry: entry.offset)}


def _divided(tensors: Mapping[str, list[Stored]], largest_bytes: int) -> list[dict[str, list[Stored]]]:
    """Neighbours together, up to about so many bytes."""
    parts: list[dict[str, list[Stored]]] = [{}]
    size = 0
    for name, group in tensors.items():
        own = sum(map(_num_bytes, group))
        if parts[-1] and size + own > largest_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = group
        size += own
    return parts


def _num_bytes(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize
