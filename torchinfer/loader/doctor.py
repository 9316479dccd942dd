"""Where a checkpoint lies, how fast that storage is, and what to change: the report of `torchinfer doctor`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from torchinfer.device import free_memory_bytes
from torchinfer.errors import ConfigError
from torchinfer.loader.advice import Facts, Settings, advise, choose_settings, notes
from torchinfer.loader.folder import FolderSource
from torchinfer.loader.mount import read_ahead_kib
from torchinfer.loader.speed import SpeedTest, readers_text
from torchinfer.loader.stall import unless_stalled
from torchinfer.loader.storage import open_source

MAX_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The facts and what follows from them."""

    facts: Facts
    notes: tuple[str, ...]  # on how far to trust the measurements
    advice: tuple[str, ...]  # empty when there is nothing to change
    settings: Settings

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        for one, measurement in zip(
            found["facts"]["speed"]["measurements"], self.facts.speed.measurements, strict=True
        ):
            one["rate"] = measurement.rate
        return found

    def to_text(self) -> str:
        """For people: facts, a table, and what follows from them."""
        lines = [f"{name + ':':<16}{value}" for name, value in _facts(self.facts).items()]
        lines += ["", *_table(self.facts), ""]
        lines += ["notes:", *_list(self.notes)] if self.notes else []
        lines += ["advice:", *_list(self.advice)] if self.advice else ["advice: nothing to change"]
        return "\n".join([*lines, f"loader settings: {self.settings.flags}", *_list(self.settings.reasons)])


def diagnose(address: str, seconds: float = 3.0) -> Diagnosis:
    """Measure a folder or a gs:// prefix, at most `seconds` for each kind of read.

    The measured parts of local files are dropped from the page cache before.

    Raises:
        ConfigError: `seconds` is out of range.
        CheckpointError: there is nothing to measure, or it cannot be read.
        StalledError: the storage hangs; the message has what was measured until then.
    """
    if not (math.isfinite(seconds) and 0 < seconds <= MAX_SECONDS):
        raise ConfigError(f"seconds={seconds:g} must be more than 0 and at most {MAX_SECONDS:g}")
    source = unless_stalled(f"open {address}", lambda trial: open_source(address), max_stalls=1)
    mount = source.mount if isinstance(source, FolderSource) else None
    facts = Facts(
        address=source.address,
        kind=source.kind,
        is_network=source.is_network,
        mount=mount,
        read_ahead_kib=read_ahead_kib(mount.device) if mount else None,
        free_memory_bytes=free_memory_bytes(torch.device("cpu")),
        speed=SpeedTest(source, seconds).run(),
    )
    return Diagnosis(facts, tuple(notes(facts)), tuple(advise(facts)), choose_settings(facts))


def _facts(facts: Facts) -> dict[str, str]:
    speed, mount = facts.speed, facts.mount
    found = {"path": facts.address, "storage": f"{facts.kind}{', network' if facts.is_network else ''}"}
    if facts.kind == "fuse":
        found["storage"] += " (as GKE's driver mounts Cloud Storage FUSE)"
    if mount:
        found["mounted"] = f"{mount.source!r} at {mount.point!r}"
        found["mount options"] = ", ".join(mount.options)
        found["read-ahead"] = "unknown" if facts.read_ahead_kib is None else f"{facts.read_ahead_kib} KiB"
    found["files"] = f"{speed.num_bytes / 1e9:.2f} GB in {speed.num_files} file(s) of at least 1 MiB"
    found["free memory"] = f"{facts.free_memory_bytes / 1e9:.2f} GB"
    found["first byte"] = f"{speed.first_byte_seconds * 1e3:.1f} ms"
    return found


def _table(facts: Facts) -> list[str]:
    """GB/s by number of readers."""
    headings = ["GB/s", "buffered"] + (["O_DIRECT"] if facts.mount else [])
    rows = [headings]
    for count in facts.counts:
        cells = [facts.rate(count, direct) for direct in (False, True)[: len(headings) - 1]]
        rows.append([readers_text(count), *("not supported" if cell is None else f"{cell:.3f}" for cell in cells)])
    if facts.speed.again_rate is not None:
        rows.append(["read again", f"{facts.speed.again_rate:.3f}"])
    return ["".join([f"{row[0]:<12}", *(f"{cell:>15}" for cell in row[1:])]) for row in rows]


def _list(texts: tuple[str, ...]) -> list[str]:
    return [f"  - {text}" for text in texts]
