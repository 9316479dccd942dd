"""Reading quantization_config field by field: all problems are collected, and fields that nobody read are refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


class Settings:
    """The fields of one object and what is wrong with them. A method that finds a problem returns a stand-in."""

    def __init__(self, raw: Mapping[str, Any], problems: list[str], path: str = "") -> None:
        self.raw, self.problems, self.path = raw, problems, path
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value as it stands; None when it is missing."""
        self._read.add(name)
        return self.raw.get(name)

    def skip(self, names: str) -> None:
        """Fields that change nothing of what is computed, separated by spaces."""
        self._read |= set(names.split())

    def choice(self, name: str, known: Collection[Any], default: Any = None) -> Any:
        """One of the known values, in small letters where they are text; the default is what a missing field means."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        value = value.lower() if isinstance(value, str) else value
        if not any(value == each and type(value) is type(each) for each in known):
            self.problems.append(
                f"{self.path}{name}={self.raw.get(name)!r} is not supported; use {' or '.join(map(repr, known))}"
            )
            return next(iter(known))
        return value

    def must_be(self, name: str, *expected: Any) -> None:
        """Refuse what is not one of these, and not missing."""
        value = self.get(name)
        if value is not None and value not in expected:
            self.problems.append(
                f"{self.path}{name}={value!r} is not supported; only {' or '.join(map(repr, expected))} is"
            )

    def group_size(self, name: str, default: int | None = None) -> int | None:
        """Inputs that share a scale, an even number; None where that is all of them, -1 in the file."""
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not int or (value != -1 and (value < 2 or value % 2)):
            self.problems.append(f"{self.path}{name}={value!r} must be a positive even number, or -1 for all inputs")
            return None
        return None if value == -1 else value

    def pair(self, name: str) -> tuple[int, int] | None:
        """Two positive integers, or None when the field is missing or null."""
        value = self.get(name)
        if value is None:
            return None
        fits = isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
        if not fits:
            self.problems.append(f"{self.path}{name}={value!r} must be two positive integers")
            return None
        return (value[0], value[1])

    def names(self, name: str) -> tuple[str, ...]:
        """A list of text; empty when the field is missing or null."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            self.problems.append(f"{self.path}{name}={value!r} must be a list of names")
            return ()
        return tuple(value)

    def section(self, name: str) -> Settings | None:
        """An object in the object; None when the field is missing or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.problems.append(f"{self.path}{name}={value!r} must be an object")
            return None
        return Settings(value, self.problems, f"{self.path}{name}.")

    def finish(self) -> None:
        """Refuse the fields that nobody read; null says no more than a missing field."""
        unread = sorted(name for name in set(self.raw) - self._read if self.raw[name] is not None)
        self.problems += [
            f"{self.path}{name}={self.raw[name]!r} is unknown here, and may change the weights: if it does not, remove "
            "it from quantization_config"
            for name in unread
        ]
