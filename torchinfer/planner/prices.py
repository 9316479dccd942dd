"""What a chip costs for an hour: prices.toml, or the price that was given."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from datetime import date
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Price:
    """USD for a chip and hour, and where that comes from."""

    usd: float
    source: str


def price_of(accelerator: str, given: float | None) -> Price:
    """The price of an accelerator's chip."""
    if given is not None:
        return Price(given, "--price")
    entry = list_prices()[accelerator]
    day = entry["date"]
    assert isinstance(day, date) and isinstance(entry["usd"], float), f"prices.toml: {accelerator}"
    return Price(entry["usd"], f"list price on demand, {entry['region']}, {day.isoformat()}: {entry['source']}")


def list_prices() -> dict[str, dict[str, object]]:
    """The content of prices.toml: accelerator -> usd, region, date, source."""
    return tomllib.loads(files("torchinfer.planner").joinpath("prices.toml").read_text(encoding="utf-8"))
