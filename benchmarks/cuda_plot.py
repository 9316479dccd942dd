"""What a run of cuda_first_day.py measured, as bars beside the limits of docs/benchmarks.md.

    python benchmarks/cuda_plot.py --results results --plot docs

Reads the last lines of attention.log, linear.log, linear-70b.log and experts.log, which cuda_kernels.py wrote, and
engine.jsonl of cuda_engine.py; what was not measured is left out. Each bar is a share of a ceiling of the same run:
of copy bandwidth, of the products of torch in the same dtype, or of a copy from pinned memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bars import plot_bars

MANY_ROWS = 1024  # from which a product is compared with the tensor cores, not with the memory
Bar = tuple[str, str, float]  # kind, label, share


def kernel_results(folder: Path) -> list[dict[str, Any]]:
    """Of all logs that end with a line of cuda_kernels.py; one that was cut off has none."""
    found: list[dict[str, Any]] = []
    for name in ("attention", "linear", "linear-70b", "experts"):
        log = folder / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        if lines and lines[-1].startswith("{"):
            found += [each for each in json.loads(lines[-1])["results"] if "of_bandwidth" in each]
    return found


def attention_bars(results: list[dict[str, Any]]) -> list[Bar]:
    """Decode, ours and others'."""
    decode = [each for each in results if each["case"].startswith("attention decode")]
    named = [(each["case"].removeprefix("attention decode "), each["of_bandwidth"]) for each in decode]
    return [("peer" if name.startswith("peer") else "ours", name, share) for name, share in named]


def product_bars(results: list[dict[str, Any]], is_many: bool) -> list[Bar]:
    """Linear layers and experts of few rows, by their bytes, or of many, by their operations."""
    key, bars = "of_products" if is_many else "of_bandwidth", list[Bar]()
    for each in results:
        name = each["case"]
        if name.startswith(("linear", "grouped")) and (int(name.split()[-2]) >= MANY_ROWS) == is_many:
            bars.append(("ours", name, each[key]))
    return bars


def engine_bars(folder: Path) -> list[Bar]:
    """Each part that has a limit, by the last of its lines; transformers by the bytes of our step in bf16."""
    path = folder / "engine.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    parts = {line["part"]: line for line in lines if "error" not in line}
    bars: list[Bar] = []
    for name, part in parts.items():
        if "of_limit" in part or "of_pinned" in part:
            bars.append(("ours", name, part.get("of_limit", part.get("of_pinned"))))
    if "peer" in parts and "decode-bf16" in parts:
        bars.append(("peer", "transformers, compiled", parts["decode-bf16"]["limit_ms"] / parts["peer"]["ms"]))
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="the folder that was --out of cuda_first_day.py")
    parser.add_argument("--plot", type=Path, required=True, help="folder for the SVGs")
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results} is no folder; pass the one that was --out of cuda_first_day.py")
    results = kernel_results(options.results)
    plots: dict[str, tuple[str, list[Bar], float]] = {
        "attention": ("Decode attention, of copy bandwidth", attention_bars(results), 0.85),
        "few_rows": ("Products of few rows, of copy bandwidth", product_bars(results, False), 0.85),
        "many_rows": ("Products of many rows, of torch's", product_bars(results, True), 0.65),
        "engine": ("The engine, of its limits", engine_bars(options.results), 0.8),
    }
    written = {}
    for name, (title, bars, wanted) in plots.items():
        if bars:
            written[name] = str(options.plot / f"cuda_{name}.svg")
            plot_bars(title, "", bars, wanted, Path(written[name]))
    print(
        json.dumps(
            {"benchmark": "cuda_plot", "written": written, "missing": [name for name in plots if name not in written]}
        )
    )


if __name__ == "__main__":
    main()
