"""Plots as inline SVG. Colours are the page's: classes c0, c1, ... of its style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 14, 48
NUM_COLOURS = 8
DASHES = ("", "7 4", "2 3", "9 3 2 3")
RADIUS = 5.0


@dataclass(frozen=True, slots=True)
class Point:
    """A value and its standard error; `name` is shown when the pointer rests on it."""

    x: float
    y: float
    error: float
    name: str


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one look: a colour and a shape, both numbers from 0."""

    colour: int
    shape: int
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to pixels, and where the ticks are."""

    scale: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]
    label: str


def scatter(series: Sequence[Series], x_label: str, y_label: str, unit: float) -> str:
    """Points over a linear axis from 0, in `unit`, on a logarithmic one; empty when no value is positive."""
    y_axis = _log_axis([point.y for each in series for point in each.points], y_label)
    most = max((point.x for each in series for point in each.points), default=0.0)
    if y_axis is None or most <= 0:
        return ""
    step = _step(most / unit) * unit
    ticks = tuple((k * step, f"{k * step / unit:g}") for k in range(int(most * 1.08 / step) + 1))
    x_axis = Axis(lambda x: LEFT + x / (most * 1.08) * (WIDTH - LEFT - RIGHT), ticks, x_label)
    body = [_error_bar(each, point, x_axis, y_axis) for each in series for point in each.points]
    return _figure(x_axis, y_axis, body + [_marks(each, x_axis, y_axis) for each in series])


def lines(
    series: Sequence[Series], categories: Sequence[str], x_label: str, y_label: str, *, is_linear: bool = False
) -> str:
    """Lines over categories, whose index is a point's x, on a logarithmic axis, or a linear one from 0; empty when no
    value is positive."""
    values = [point.y for each in series for point in each.points]
    y_axis = _linear_axis(values, y_label) if is_linear else _log_axis(values, y_label)
    if y_axis is None:
        return ""
    width = (WIDTH - LEFT - RIGHT) / len(categories)
    x_axis = Axis(lambda x: LEFT + (x + 0.5) * width, tuple(enumerate(categories)), x_label)
    body = []
    for each in series:
        path = " ".join(f"{x_axis.scale(p.x):.1f},{y_axis.scale(p.y):.1f}" for p in each.points)
        dash = DASHES[each.shape % len(DASHES)]
        body.append(f'<polyline class="line c{each.colour % NUM_COLOURS}" stroke-dasharray="{dash}" points="{path}"/>')
        body.append(_marks(each, x_axis, y_axis))
    return _figure(x_axis, y_axis, body)


def key(colour: int, shape: int) -> str:
    """A series' line and mark, for a legend."""
    dash = DASHES[shape % len(DASHES)]
    return (
        f'<svg class="key" width="34" height="14" aria-hidden="true"><path class="line c{colour % NUM_COLOURS}" '
        f'stroke-dasharray="{dash}" d="M1,7 H33"/>{_mark(colour, shape, 17, 7, "")}</svg>'
    )


def _log_axis(values: Sequence[float], label: str) -> Axis | None:
    """Whole powers of ten around the values; what is not positive lies on the lowest."""
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    low = math.floor(math.log10(min(positive)))
    high = max(math.ceil(math.log10(max(positive))), low + 1)
    height = HEIGHT - TOP - BOTTOM

    def scale(value: float) -> float:
        at = math.log10(value) if value > 0 else low
        return TOP + height * (1 - (min(max(at, low), high) - low) / (high - low))

    every = max(1, (high - low) // 6)
    return Axis(scale, tuple((10.0**k, f"{10.0**k:g}") for k in range(low, high + 1, every)), label)


def _linear_axis(values: Sequence[float], label: str) -> Axis | None:
    """From 0 to a round number above the values."""
    most = max(values, default=0.0)
    if most <= 0:
        return None
    step = _step(most)
    num_steps = math.ceil(most / step)
    height = HEIGHT - TOP - BOTTOM
    ticks = tuple((k * step, f"{k * step:g}") for k in range(num_steps + 1))
    return Axis(lambda value: TOP + height * (1 - value / (num_steps * step)), ticks, label)


def _step(most: float) -> float:
    """A round distance that gives about five ticks."""
    power = 10.0 ** math.floor(math.log10(most / 5))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= most / 5)


def _figure(x_axis: Axis, y_axis: Axis, body: Sequence[str]) -> str:
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    middle = TOP + (base - TOP) / 2
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_axis.label)}">']
    for value, text in y_axis.ticks:
        y = y_axis.scale(value)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f} H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for value, text in x_axis.ticks:
        x = x_axis.scale(value)
        parts.append(f'<path class="axis" d="M{x:.1f},{base} v5"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 19}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{TOP} V{base} H{right}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_axis.label)}</text>')
    turn = f'transform="rotate(-90 16 {middle:.1f})"'
    parts.append(f'<text x="16" y="{middle:.1f}" text-anchor="middle" {turn}>{escape(y_axis.label)}</text>')
    return "\n".join([*parts, *body, "</svg>"])


def _error_bar(series: Series, point: Point, x_axis: Axis, y_axis: Axis) -> str:
    """Two standard errors to each side."""
    top, bottom = (y_axis.scale(point.y + factor * point.error) for factor in (2, -2))
    return (
        f'<path class="line c{series.colour % NUM_COLOURS}" d="M{x_axis.scale(point.x):.1f},{top:.1f} V{bottom:.1f}"/>'
    )


def _marks(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    marks = (_mark(series.colour, series.shape, x_axis.scale(p.x), y_axis.scale(p.y), p.name) for p in series.points)
    return "\n".join(marks)


def _mark(colour: int, shape: int, x: float, y: float, name: str) -> str:
    """A circle, a square, a triangle or a diamond."""
    r = RADIUS
    paths = (
        f"M{x - r:.1f},{y:.1f} a{r},{r} 0 1 0 {2 * r},0 a{r},{r} 0 1 0 {-2 * r},0 z",
        f"M{x - r:.1f},{y - r:.1f} h{2 * r} v{2 * r} h{-2 * r} z",
        f"M{x:.1f},{y - r:.1f} l{r},{2 * r} h{-2 * r} z",
        f"M{x:.1f},{y - r * 1.2:.1f} l{r * 1.2:.1f},{r * 1.2:.1f} l{-r * 1.2:.1f},{r * 1.2:.1f} "
        f"l{-r * 1.2:.1f},{-r * 1.2:.1f} z",
    )
    title = f"<title>{escape(name)}</title>" if name else ""
    return f'<path class="mark c{colour % NUM_COLOURS}" d="{paths[shape % len(paths)]}">{title}</path>'
