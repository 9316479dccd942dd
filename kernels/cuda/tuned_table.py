"""The table of launches that were measured: by card and matrix, in `tuned.json`, which ships with the package.

    {"NVIDIA H200": [{"format": "int4-g128", "outputs": 4096, "inputs": 4096, "matrices": 1, "splits": 4,
                      "library_rows": 0,
                      "launches": {"8": {"outputs": 64, "warps": 2, "stages": 4, "per_processor": 0}, ...}}]}

`launches` has those of tiles of 8, 16, 32, 64 and 128 rows; what is missing is the rule's (`tiles.py`). `splits` is for
all tiles of up to 64 rows. `per_processor` is how many programs of a multiprocessor walk over the tiles of 128 rows of
one matrix (`persistent_kernel.py`); with 0 each tile has its own. From `library_rows` on, above 64 and 0 for never,
torch's own product is the faster one (`library_matmul.py`). `benchmarks/cuda_tune.py` writes it, on a card.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuned.json")
ROWS = (8, 16, 32, 64, 128)  # of tiles
CHOICES = {
    "outputs": (16, 32, 64, 128, 256),
    "warps": (1, 2, 4, 8),
    "stages": tuple(range(1, 9)),
    "per_processor": (0, 1, 2),
}
SPLITS = (1, 2, 4, 8, 16)
MANY_ROWS = ROWS[-1]  # of a tile, where there are more than MOST_FEW_ROWS
MOST_FEW_ROWS = 64  # up to which the bits of a row do not depend on the others

Key = tuple[str, str, int, int, int]  # card, format, outputs, inputs, matrices


@dataclass(frozen=True, slots=True)
class Launch:
    """What is measured for a number of rows."""

    outputs: int  # of a program
    warps: int
    stages: int  # steps that are loaded ahead, plus one
    per_processor: int = 0  # programs of a multiprocessor that walk over tiles; 0: a program for each tile


@dataclass(frozen=True, slots=True)
class Tuned:
    """What is measured for a matrix."""

    splits: int
    launches: dict[int, Launch]  # by rows of a tile
    library_rows: int = 0  # from so many on the library's product is faster; 0: never


@functools.cache
def load_table(path: Path = TABLE) -> dict[Key, Tuned]:
    """The table, read once.

    Raises:
        ValueError: it is not such a table.
    """
    try:
        cards = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _refuse(path, "it", str(error), "JSON") from error
    if not isinstance(cards, dict) or not all(isinstance(entries, list) for entries in cards.values()):
        raise _refuse(path, "it", type(cards).__name__, "a list of entries for each card's name")
    return dict(_entry(path, card, found) for card, entries in cards.items() for found in entries)


def save_entry(path: Path, key: Key, tuned: Tuned) -> None:
    """Put an entry into the table, in place of one for the same matrix."""
    table = dict(load_table.__wrapped__(path)) if path.exists() else {}
    table[key] = tuned
    cards: dict[str, list[dict[str, Any]]] = {}
    for (card, *matrix), entry in sorted(table.items(), key=lambda item: item[0]):
        launches = {str(rows): asdict(launch) for rows, launch in sorted(entry.launches.items())}
        named = dict(zip(("format", "outputs", "inputs", "matrices"), matrix, strict=True))
        found = {"splits": entry.splits, "library_rows": entry.library_rows, "launches": launches}
        cards.setdefault(card, []).append(named | found)
    path.write_text(json.dumps(cards, indent=1) + "\n", encoding="utf-8")


def _entry(path: Path, card: str, found: Any) -> tuple[Key, Tuned]:
    names = {"format", "outputs", "inputs", "matrices", "splits", "library_rows", "launches"}
    if not isinstance(found, dict) or found.keys() != names or not isinstance(found["launches"], dict):
        raise _refuse(path, f"an entry of {card}", found, f"an object of {', '.join(sorted(names))}")
    place = f"the {found['format']} matrix [{found['outputs']}, {found['inputs']}] of {card}"
    if not isinstance(found["format"], str):
        raise _refuse(path, f"format of {place}", found["format"], "a string")
    for name in ("outputs", "inputs", "matrices"):
        if type(found[name]) is not int or found[name] < 1:
            raise _refuse(path, f"{name} of {place}", found[name], "a whole number above 0")
    if type(found["splits"]) is not int or found["splits"] not in SPLITS:
        raise _refuse(path, f"splits of {place}", found["splits"], f"one of {SPLITS}")
    library_rows = found["library_rows"]
    if type(library_rows) is not int or (library_rows <= MOST_FEW_ROWS and library_rows != 0):
        rule = f"a whole number above {MOST_FEW_ROWS}, or 0 for never"
        raise _refuse(path, f"library_rows of {place}", library_rows, rule)
    launches = dict(_launch(path, place, rows, launch) for rows, launch in found["launches"].items())
    for rows, launch in launches.items():
        if launch.per_processor and (rows < MANY_ROWS or found["matrices"] > 1):
            rule = f"0 but for {MANY_ROWS} rows of one matrix"
            raise _refuse(path, f"per_processor for {rows} rows of {place}", launch.per_processor, rule)
    key = card, found["format"], found["outputs"], found["inputs"], found["matrices"]
    return key, Tuned(found["splits"], launches, library_rows)


def _launch(path: Path, place: str, rows: str, found: Any) -> tuple[int, Launch]:
    if rows not in map(str, ROWS):
        raise _refuse(path, f"rows of {place}", rows, f"one of {ROWS}")
    if not isinstance(found, dict) or found.keys() != CHOICES.keys():
        raise _refuse(path, f"{rows} rows of {place}", found, f"an object of {', '.join(CHOICES)}")
    for name, choices in CHOICES.items():
        if type(found[name]) is not int or found[name] not in choices:
            raise _refuse(path, f"{name} for {rows} rows of {place}", found[name], f"one of {choices}")
    return int(rows), Launch(**found)


def _refuse(path: Path, what: str, found: Any, rule: str) -> ValueError:
    way_out = "tune again with benchmarks/cuda_tune.py, or write {} into the file to go without a table"
    return ValueError(f"{path}: {what} is {found!r}, but must be {rule}; {way_out}")
