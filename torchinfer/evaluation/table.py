"""An evaluation as text, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchinfer.evaluation.evaluate import Evaluation, Result

HEADINGS = (
    "weights",
    "KV cache",
    "perplexity",
    "± (ln)",
    "change",
    "KL",
    "± KL",
    "same top-1",
    "weight MB",
    "KV MB/1k",
    "prefill t/s",
    "decode t/s",
)


def to_text(evaluation: Evaluation) -> str:
    """What was measured, the table, and KL by length of context if there is something to compare."""
    facts = evaluation.facts
    lines = [
        f"{facts['model']}: {facts['architecture']}, {facts['dtype']} on {facts['device']}",
        f"{facts['text']}: {facts['num_scored_tokens']:,} of {facts['num_text_tokens']:,} tokens scored in "
        f"{facts['num_windows']:,} windows of {facts['context']:,}",
        "",
        *columns([HEADINGS, *map(cells, evaluation.results)]),
    ]
    compared = [result for result in evaluation.results if not result.is_reference]
    if compared:
        lines += ["", "KL by tokens of context", *columns(by_context(compared))]
    return "\n".join(lines)


def cells(result: Result) -> tuple[str, ...]:
    """The values under HEADINGS."""
    overall = result.overall
    return (
        result.scheme,
        result.kv,
        f"{overall.perplexity:.4f}",
        f"{overall.ln_perplexity.error:.4f}",
        "reference" if result.is_reference else f"{math.expm1(overall.change.mean):+.3%}",
        "" if result.is_reference else f"{overall.kl.mean:.3g}",
        "" if result.is_reference else f"{overall.kl.error:.1g}",
        "" if result.is_reference else f"{overall.top1.mean:.2%}",
        f"{result.weight_bytes / 1e6:,.2f}",
        f"{result.kv_bytes_per_1000_tokens / 1e6:,.3f}",
        f"{result.prefill_tokens_per_second:,.0f}",
        f"{result.decode_tokens_per_second:,.0f}",
    )


def by_context(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """A heading with ranges of context lengths, how many tokens each has, then the KL of each pair."""
    buckets = results[0].by_context
    rows = [
        ("weights", "KV cache", *(f"{bucket.first:,}-{bucket.last:,}" for bucket in buckets)),
        ("tokens", "", *(f"{bucket.summary.num_tokens:,}" for bucket in buckets)),
    ]
    for result in results:
        rows.append((result.scheme, result.kv, *(f"{bucket.summary.kl.mean:.3g}" for bucket in result.by_context)))
    return rows


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Two names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
