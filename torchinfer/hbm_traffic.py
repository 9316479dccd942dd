"""Bytes that a compiled program moves between a TPU's memory and the chip, read from its optimized HLO.

XLA's own figure, `bytes accessed`, adds up what all operations take and give, in on-chip memory too: a matrix that is
fetched ahead of its product counts three times. Here an operation counts what it has in HBM. Of an operand of which
only rows are taken these count, and of one that is written in place what is written. Pallas kernels count what they
state themselves, less what they have on the chip: XLA may have fetched it for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ITEM_BITS = {"pred": 8, "bf16": 16, "token": 0}  # others have their bits in their name
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
VIEWS = ("bitcast", "reshape", "transpose")  # in a fusion
TAKES_ROWS = ("slice", "dynamic-slice", "gather")
UPDATED_BY = {"dynamic-update-slice": 1, "scatter": 2}  # operation -> its operand with what is written
_COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^ *(ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$")
_SHAPE = re.compile(r"\b([a-z]+[\w]*)\[([\d,]*)\](\{[^}]*\})?")
_STATED = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True, slots=True)
class Instruction:
    """A line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


Computation = Mapping[str, Instruction]


def hbm_bytes(hlo: str) -> int:
    """Of one run of a module; loops whose number of rounds is not known count once, of branches the largest."""
    entry, computations = parse(hlo)
    return _moved_by(computations[entry], computations)


def parse(hlo: str) -> tuple[str, dict[str, Computation]]:
    """The entry's name, and all computations by name."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", ""
    for line in re.sub(r'"body":"[^"]*"', "", hlo).splitlines():
        start = _COMPUTATION.match(line)
        if start:
            current = start[2]
            computations[current] = {}
            entry = current if start[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            root, name, kind, opcode, operands, attributes = found.groups()
            names = (operands,) if opcode == "parameter" else tuple(re.findall(r"%[\w.\-]+", operands))
            computations[current][name] = Instruction(name, kind, opcode, names, attributes, bool(root))
    return entry, dict(computations)


def _sizes(kind: str) -> Iterator[tuple[int, bool]]:
    """Of each tensor of a type: its bytes, without padding, and whether it is in HBM."""
    for name, dimensions, layout in _SHAPE.findall(kind):
        bits = ITEM_BITS.get(name) if name in ITEM_BITS else int(re.findall(r"\d+", name)[0])
        count = math.prod(int(size) for size in dimensions.split(",") if size)
        yield count * (bits or 0) // 8, not re.search(r"S\([1-9]", layout)


def _in_hbm(kind: str) -> int:
    return sum(size for size, is_in_hbm in _sizes(kind) if is_in_hbm)


def _moved_by(computation: Computation, all_of_them: Mapping[str, Computation]) -> int:
    return sum(_moved(each, computation, all_of_them) for each in computation.values())


def _moved(each: Instruction, around: Computation, all_of_them: Mapping[str, Computation]) -> int:
    if each.opcode in FREE or each.opcode.endswith("-done"):
        return 0
    if each.opcode in ("while", "call", "conditional"):
        return _moved_inside(each, all_of_them)
    operands = [around[name].type for name in each.operands if name in around]
    stated = _STATED.search(each.attributes)
    if stated:
        return _moved_by_kernel(int(stated[1]), each, operands)
    if each.opcode in ("copy-start", "slice-start"):
        return _copied(each, operands)
    if each.opcode == "fusion":
        return _moved_by_fusion(each, operands, all_of_them)
    if each.opcode in TAKES_ROWS:
        (size, is_in_hbm), *_ = _sizes(each.type)
        return size * (is_in_hbm + (_in_hbm(operands[0]) > 0))
    if each.opcode in UPDATED_BY:
        return 2 * _in_hbm(operands[UPDATED_BY[each.opcode]])
    return _in_hbm(each.type) + sum(map(_in_hbm, operands))


def _moved_by_kernel(stated: int, each: Instruction, operands: list[str]) -> int:
    """One that writes an operand in place, as attention does its pages, reads it in parts, as often as it states; any
    other counts nothing that it has in HBM more than once."""
    tensors = [tensor for kind in (each.type, *operands) for tensor in _sizes(kind)]
    moved = max(stated - sum(size for size, is_in_hbm in tensors if not is_in_hbm), 0)
    if "output_to_operand_aliasing" in each.attributes:
        return moved
    return min(moved, sum(size for size, is_in_hbm in tensors if is_in_hbm))


def _copied(each: Instruction, operands: list[str]) -> int:
    """A copy that others overlap: its type is (destination, source, context), or ((source), destination, context)."""
    tensors = list(_sizes(each.type))
    size, is_in_hbm = tensors[0] if each.opcode == "copy-start" else tensors[-2]
    return size * (is_in_hbm + (_in_hbm(operands[0]) > 0))


def _moved_inside(each: Instruction, all_of_them: Mapping[str, Computation]) -> int:
    branches = _BRANCHES.search(each.attributes)
    names = re.findall(r"%[\w.\-]+", branches[1]) if branches else _CALLED.findall(each.attributes)
    moved = [_moved_by(all_of_them[name], all_of_them) for name in names]
    if each.opcode == "conditional":
        return max(moved)
    trips = _TRIPS.search(each.attributes)
    return sum(moved) * (int(trips[1]) if trips else 1)


def _moved_by_fusion(each: Instruction, operands: list[str], all_of_them: Mapping[str, Computation]) -> int:
    fused = _fused(each, all_of_them)
    read = 0
    for index, kind in enumerate(operands):
        if _in_hbm(kind):
            read += _taken(_parameter(fused, index), fused, all_of_them)
    root = next(inner for inner in fused.values() if inner.is_root)
    return read + min(_in_hbm(each.type), _written(root, fused))


def _fused(each: Instruction, all_of_them: Mapping[str, Computation]) -> Computation:
    return all_of_them[_CALLED.findall(each.attributes)[0]]


def _is_view(each: Instruction, all_of_them: Mapping[str, Computation]) -> bool:
    """Whether a fusion only gives its operand another shape."""
    return each.opcode == "fusion" and all(
        inner.opcode in ("parameter", *VIEWS) for inner in _fused(each, all_of_them).values()
    )


def _parameter(fused: Computation, index: int) -> str:
    return next(each.name for each in fused.values() if each.opcode == "parameter" and each.operands == (str(index),))


def _size(each: Instruction) -> int:
    return sum(size for size, _ in _sizes(each.type))


def _taken(name: str, fused: Computation, all_of_them: Mapping[str, Computation]) -> int:
    """Bytes of a value in a fusion that are looked at."""
    whole, taken = _size(fused[name]), 0
    if fused[name].is_root:
        return whole
    for user in (each for each in fused.values() if name in each.operands):
        if user.opcode in VIEWS or _is_view(user, all_of_them):
            taken += _taken(user.name, fused, all_of_them)
        elif user.opcode in TAKES_ROWS and user.operands[0] == name:
            taken += _size(user)
        elif user.opcode == "fusion":
            inner = _fused(user, all_of_them)
            taken += _taken(_parameter(inner, user.operands.index(name)), inner, all_of_them)
        elif not (user.opcode in UPDATED_BY and user.operands[0] == name):
            return whole
    return min(taken, whole)


def _written(each: Instruction, fused: Computation) -> int:
    """Bytes of a fusion's result that are new."""
    if each.opcode == "tuple":
        return sum(_written(fused[name], fused) for name in each.operands)
    if each.opcode in VIEWS:
        return _written(fused[each.operands[0]], fused)
    if each.opcode in UPDATED_BY:
        return _size(fused[each.operands[UPDATED_BY[each.opcode]]])
    return _size(each)
