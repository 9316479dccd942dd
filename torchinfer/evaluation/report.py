"""An evaluation as one HTML file: no script, nothing loaded from elsewhere, light and dark."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from torchinfer.evaluation.evaluate import Evaluation, Result
from torchinfer.evaluation.plot import Point, Series, key, lines, scatter
from torchinfer.evaluation.table import HEADINGS, by_context, cells

KL_LABEL = "mean KL divergence, nats a token"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5b636d; --paper: #fff; --rule: #d9dde2; --band: #f5f6f8;
  --k0: #0072b2; --k1: #d55e00; --k2: #00845f; --k3: #a3367f; --k4: #8a6d00; --k5: #3d5a99; --k6: #8c4a2f; --k7: #555; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a2abb5; --paper: #16191d; --rule: #363c44;
  --band: #1f242a; --k0: #56b4e9; --k1: #f28e4b; --k2: #3ecf9f; --k3: #e58cc6; --k4: #e3c64a; --k5: #93aef2;
  --k6: #d99a80; --k7: #bbb; } }
body { margin: 0 auto; max-width: 1040px; padding: 24px 20px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5em; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.1em; margin: 32px 0 6px; }
p { margin: 6px 0; } .soft { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: 0.87em; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; } tbody tr:nth-child(odd) { background: var(--band); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
code, pre { font: 0.9em ui-monospace, monospace; }
pre { background: var(--band); padding: 10px 12px; overflow-x: auto; }
.plot { display: block; width: 100%; max-width: 820px; } .plot text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); fill: none; }
.line { stroke: var(--c); fill: none; stroke-width: 1.6; } .mark { fill: var(--c); stroke: var(--paper); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; list-style: none; } .key { vertical-align: -2px; }
""" + "\n".join(f".c{index} {{ --c: var(--k{index}); }}" for index in range(8))


def write_report(evaluation: Evaluation, command: str, path: str | Path) -> None:
    """Write the file, or leave an older one as it is when that fails."""
    target = Path(path)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, encoding="utf-8", delete=False) as file:
        try:
            file.write(to_html(evaluation, command))
            file.close()
            os.chmod(file.name, 0o644)  # a temporary file is the owner's alone
            os.replace(file.name, target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def to_html(evaluation: Evaluation, command: str) -> str:
    """The page."""
    facts = evaluation.facts
    title = f"Evaluation of {Path(facts['model']).name}"
    compared = [result for result in evaluation.results if not result.is_reference]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    text = (
        f"{facts['architecture']}, {facts['dtype']} on {facts['device']}. Text {facts['text']}: "
        f"{facts['num_scored_tokens']:,} of {facts['num_text_tokens']:,} tokens scored in {facts['num_windows']:,} "
        f"windows of {facts['context']:,} tokens, a new one every {facts['stride']:,}. Logits of the reference in "
        f"{facts['reference_dtype']}."
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="soft">{escape(text)}</p>',
        _table([HEADINGS, *map(cells, evaluation.results)]),
        f'<p class="soft">{NOTES}</p>',
        *_plots(compared),
        f"<h2>Command</h2><pre>{escape(command)}</pre>",
        f'<p class="soft">{escape(versions)}</p></body></html>',
    ]
    return "\n".join(parts) + "\n"


NOTES = (
    "The reference is the model as stored, with a cache of its own dtype. Change: of the perplexity against it. KL: "
    "mean divergence of each token's distribution from the reference's, in nats; 0 is equal. Same top-1: share of "
    "tokens where both find the same token most probable. ±: one standard error, of tokens taken for independent. "
    "MB: a million bytes; KV for 1,000 tokens. Prefill and decode: tokens a second in this evaluation, on a machine "
    "that may have had other work."
)


def _plots(compared: Sequence[Result]) -> Iterable[str]:
    """KL against bytes of weights and of cache, and by context; nothing if only the reference was measured."""
    if not compared:
        yield "<p>Only the reference was measured: there is nothing to plot.</p>"
        return
    looks = _looks(compared)
    yield f'<ul class="legend">{"".join(map(_legend, compared, looks))}</ul>'
    for heading, unit, label, field in (
        ("Accuracy against bytes of weights", 1e6, "weights, MB", "weight_bytes"),
        ("Accuracy against bytes of cache", 1e3, "KV cache of 1,000 tokens, kB", "kv_bytes_per_1000_tokens"),
    ):
        series = [
            Series(
                *look, (Point(getattr(result, field), result.overall.kl.mean, result.overall.kl.error, _tip(result)),)
            )
            for result, look in zip(compared, looks, strict=True)
        ]
        yield _section(heading, scatter(series, label, KL_LABEL, unit))
    ranges = [f"{bucket.first:,}–{bucket.last:,}" for bucket in compared[0].by_context]
    series = [Series(*look, _context_points(result)) for result, look in zip(compared, looks, strict=True)]
    yield _section("By position", lines(series, ranges, "tokens of context before the token", KL_LABEL))
    yield _table(by_context(compared))


def _looks(results: Sequence[Result]) -> list[tuple[int, int]]:
    """A colour for each scheme, a shape for each cache dtype."""
    schemes, cache_dtypes = (
        list(dict.fromkeys(names)) for names in zip(*((r.scheme, r.kv) for r in results), strict=True)
    )
    return [(schemes.index(result.scheme), cache_dtypes.index(result.kv)) for result in results]


def _legend(result: Result, look: tuple[int, int]) -> str:
    return f"<li>{key(*look)} {escape(result.scheme)} / {escape(result.kv)}</li>"


def _tip(result: Result) -> str:
    overall = result.overall
    return f"{result.scheme} / {result.kv}: KL {overall.kl.mean:.3g}, perplexity {overall.perplexity:.4f}"


def _context_points(result: Result) -> tuple[Point, ...]:
    return tuple(
        Point(
            index, bucket.summary.kl.mean, bucket.summary.kl.error, f"{_tip(result)}; here {bucket.summary.kl.mean:.3g}"
        )
        for index, bucket in enumerate(result.by_context)
    )


def _section(heading: str, plot: str) -> str:
    return f"<h2>{escape(heading)}</h2>\n{plot or '<p>Every divergence is 0.</p>'}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in _tagged(rows)]
    lines_of_body = "\n".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{lines_of_body}\n</tbody></table></div>'


def _tagged(rows: Sequence[Sequence[str]]) -> Iterable[tuple[str, Sequence[str]]]:
    return ((("td" if index else "th"), row) for index, row in enumerate(rows))
