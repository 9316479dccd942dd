"""A plan as an SVG file: tokens a second, and the memory that is used, against the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from torchinfer.errors import ConfigError
from torchinfer.evaluation.plot import HEIGHT, WIDTH, Point, Series, key, lines
from torchinfer.planner.planner import Plan, Speed
from torchinfer.planner.roofline import decode_step

HEAD, LEGEND_ROW = 52, 20
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444b54; } .title { font-size: 15px; fill: #1c1f23; }
.grid { stroke: #d9dde2; } .axis { stroke: #5b636d; fill: none; }
.line { stroke: var(--c); fill: none; stroke-width: 1.6; } .mark { fill: var(--c); stroke: #fff; }
.c0 { --c: #0072b2; } .c1 { --c: #d55e00; } .c2 { --c: #00845f; } .c3 { --c: #a3367f; } .c4 { --c: #8a6d00; }
"""


def write_chart(plan: Plan, path: str | Path) -> None:
    """Write the file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        Path(path).write_text(to_svg(plan), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"plot={str(path)!r} cannot be written: {error.strerror}; name a file in a folder") from error


def to_svg(plan: Plan) -> str:
    """Two plots above each other, with a legend."""
    most = max(speed.decode[-1].num_requests for speed in plan.speeds)
    categories = [f"{2**power:,}" for power in range(math.ceil(math.log2(most)) + 1)]
    rates = [Series(index, index % 4, tuple(_rates(plan, speed))) for index, speed in enumerate(plan.speeds)]
    memory = [Series(index, index % 4, tuple(_memory(plan, speed))) for index, speed in enumerate(plan.speeds)]
    label = f"requests of {plan.context:,} tokens that run at once"
    top = HEAD + LEGEND_ROW * len(plan.speeds)
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    plots = (
        lines(rates, categories, label, "tokens a second, at most"),
        lines(memory, categories, label, "memory of each chip that is used, %", is_linear=True),
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top + 2 * HEIGHT}">',
            f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
            f'<text class="title" x="16" y="26">{escape(_title(plan))}</text>',
            *_legend(plan.speeds),
            *(_placed(plot, f'y="{top + index * HEIGHT}" {size}') for index, plot in enumerate(plots)),
            "</svg>\n",
        ]
    )


def _title(plan: Plan) -> str:
    return f"{plan.source.name}: weights {plan.source.scheme}, KV cache {str(plan.cache_dtype).removeprefix('torch.')}"


def _legend(speeds: Sequence[Speed]) -> Iterator[str]:
    for index, speed in enumerate(speeds):
        y = HEAD + index * LEGEND_ROW
        yield _placed(key(index, index % 4), f'x="16" y="{y - 10}"')
        text = f"{speed.placement.name}, ${speed.usd_per_hour:,.2f} an hour"
        yield f'<text x="60" y="{y + 1}">{escape(text)}</text>'


def _placed(plot: str, attributes: str) -> str:
    """An SVG inside of another."""
    return plot.replace("<svg ", f"<svg {attributes} ", 1)


def _batches(speed: Speed) -> list[int]:
    most = speed.decode[-1].num_requests
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def _rates(plan: Plan, speed: Speed) -> Iterator[Point]:
    part, kind = speed.placement.footprint, speed.placement.accelerator
    assert part is not None
    for batch in _batches(speed):
        step = decode_step(part, kind, batch, plan.context)
        rate = batch / step.seconds
        yield Point(math.log2(batch), rate, 0.0, f"{speed.placement.name}, {batch:,}: {rate:,.0f} ({step.limit})")


def _memory(plan: Plan, speed: Speed) -> Iterator[Point]:
    part, found = speed.placement.footprint, speed.placement.capacity
    assert part is not None and found is not None
    for batch in _batches(speed):
        activations = part.activation_bytes(max(plan.chunk, batch), batch)
        used = found.weight_bytes + activations + part.page_bytes + batch * found.request_bytes
        share = 100 * used / found.memory_bytes
        yield Point(math.log2(batch), share, 0.0, f"{speed.placement.name}, {batch:,}: {used / 1e9:.2f} GB")
