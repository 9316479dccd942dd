"""Bars as an SVG, for the benchmarks that compare several things at once."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, LABEL, ROW, TOP = 760, 300, 26, 44
COLOURS = {"limit": "#999999", "ours": "#1f77b4", "peer": "#d6a01e"}


def plot_bars(title: str, unit: str, bars: list[tuple[str, str, float]], line: float | None, path: Path) -> None:
    """One bar for each (kind, label, value), and a dashed line at the value `line`."""
    most = max([value for _, _, value in bars] + [line or 0.0])
    scale = (WIDTH - LABEL - 90) / most
    height = TOP + ROW * len(bars) + 16
    lines = [f'<text x="{WIDTH / 2}" y="24" text-anchor="middle">{escape(title)}</text>']
    for index, (kind, label, value) in enumerate(bars):
        y = TOP + index * ROW
        lines += [
            f'<text x="{LABEL - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{value * scale:.1f}" height="{ROW - 6}" fill="{COLOURS[kind]}"/>',
            f'<text x="{LABEL + value * scale + 6:.1f}" y="{y + 14}">{value:.3g} {escape(unit)}</text>',
        ]
    if line is not None:
        x = LABEL + line * scale
        lines.append(f'<path d="M{x:.1f},{TOP - 6} V{height - 12}" stroke="#555" stroke-dasharray="4 3"/>')
    body = "\n".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
