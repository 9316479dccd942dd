"""Command-line flags from the fields of a dataclass: one flag a field, so that no option is forgotten.

Only flags that were given end up among the values: the defaults stay where they are, in the dataclass.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from torchinfer.errors import ConfigError, raise_all

EVERYTHING = "*"  # the pattern that a scheme without one has
UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class FlagSet:
    """How the fields of one dataclass look on the command line."""

    kind: type
    title: str
    help: Mapping[str, str]  # of every field
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of fields whose flag is not --field-name

    def add_to(self, parser: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
        """Add the flags of all fields, or of some of them."""
        group = parser.add_argument_group(self.title)
        for option in fields(self.kind):
            if only is not None and option.name not in only:
                continue
            names = self.names.get(option.name, (f"--{option.name.replace('_', '-')}",))
            arguments = dict(_ARGUMENTS[str(option.type)])
            if option.name in self.choices:
                arguments |= {"choices": self.choices[option.name], "metavar": None}
            group.add_argument(
                *names,
                dest=self._destination(option.name),
                default=argparse.SUPPRESS,
                required=_is_required(option),
                help=self.help[option.name] + _default_text(option),
                **arguments,
            )

    def values(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """The fields whose flags were given."""
        given = vars(arguments)
        found = {
            option.name: given[name]
            for option in fields(self.kind)
            if (name := self._destination(option.name)) in given
        }
        return {name: JOINED[name](value) if name in JOINED else value for name, value in found.items()}

    def _destination(self, name: str) -> str:
        """Fields of two dataclasses may have the same name in one command."""
        return f"{self.kind.__name__}.{name}"


def memory(text: str) -> float | int:
    """A share such as 0.8 or a size such as 8GiB, 500MB or 123456, in bytes."""
    try:
        value = float(text)
    except ValueError:
        return size(text)
    return value if value <= 1 else int(value)


def size(text: str) -> int:
    """A size such as 8GiB, 500MB or 123456, in bytes."""
    for unit, factor in UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def bias(text: str) -> tuple[int, float]:
    """ID=BIAS."""
    token_id, _, number = text.partition("=")
    return int(token_id), float(number)


def quantization(values: Sequence[str]) -> str | dict[str, str]:
    """SCHEME, or PATTERN=SCHEME several times; a SCHEME among them is for all that no pattern fits.

    Raises:
        ConfigError: with what is neither, and patterns that have several schemes.
    """
    found: dict[str, list[str]] = {}
    problems = []
    for value in sorted(values, key=lambda value: "=" not in value):  # stable: patterns first
        pattern, _, scheme = value.rpartition("=") if "=" in value else (EVERYTHING, "", value)
        if not pattern or not scheme:
            problems.append(f"{value!r} is not SCHEME or PATTERN=SCHEME, such as int8 or '*.mlp.*=int4'")
        found.setdefault(pattern, []).append(scheme)
    problems += [
        f"{pattern!r} has several schemes, {' and '.join(schemes)}: give one"
        for pattern, schemes in found.items()
        if len(schemes) > 1 and pattern
    ]
    raise_all(problems, ConfigError, "schemes")
    return (
        found[EVERYTHING][0]
        if list(found) == [EVERYTHING]
        else {pattern: schemes[0] for pattern, schemes in found.items()}
    )


# What makes one value of those that were given one by one.
JOINED: Mapping[str, Callable[[Any], object]] = {"logit_bias": dict, "quantization": quantization}


def names(text: str) -> tuple[str, ...]:
    """A,B,C."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """N,N,..."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between, as 8,64,256") from None


def _argument(convert: Callable[[str], object], metavar: str, **more: object) -> dict[str, Any]:
    return {"type": convert, "metavar": metavar, **more}


# By the annotation of the field. A new kind of annotation fails in the test that builds the parser.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "int": _argument(int, "N"),
    "int | None": _argument(int, "N"),
    "Names": _argument(names, "A,B,..."),
    "Size | None": _argument(size, "SIZE"),
    "Numbers": _argument(numbers, "N,N,..."),
    "float": _argument(float, "X"),
    "float | None": _argument(float, "X"),
    "float | int | None": _argument(memory, "SHARE|SIZE"),
    "str": _argument(str, "TEXT"),
    "str | None": _argument(str, "TEXT"),
    "str | Path": _argument(str, "PATH"),
    "str | Path | None": _argument(str, "PATH"),
    "bool": {"action": argparse.BooleanOptionalAction},
    "bool | None": {"action": argparse.BooleanOptionalAction},
    "tuple[str, ...]": _argument(str, "TEXT", action="append"),
    "tuple[int, ...]": _argument(int, "ID", action="append"),
    "Quantization | None": _argument(str, "[PATTERN=]SCHEME", action="append"),
    "Mapping[int, float]": _argument(bias, "ID=BIAS", action="append"),
}


def _is_required(option: Field[Any]) -> bool:
    return option.default is MISSING and option.default_factory is MISSING


def _default_text(option: Field[Any]) -> str:
    if option.default is MISSING or option.default is None or option.default == ():
        return ""
    if isinstance(option.default, bool):
        return " (default: on)" if option.default else " (default: off)"
    if option.type == "Names":
        return f" (default: {','.join(option.default)})"
    return f" (default: {option.default})"
