"""Choosing tokens on the CPU: the library and the reference (torch, which sorts) in turn, over random logits.

    python benchmarks/cpu_sampling.py
    python benchmarks/cpu_sampling.py --rows 32 --vocabularies 128256 --threads 2

The ceiling is one reading of the logits at the machine's read bandwidth. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from cpu_linear import measure_ceilings
from torch import Tensor

from torchinfer.batch import SamplingTensors
from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.greedy import greedy
from torchinfer.kernels.cpu.sample import sample
from torchinfer.kernels.reference.greedy import greedy as reference_greedy
from torchinfer.kernels.reference.sample import sample as reference

ROWS, VOCABULARIES = "1,8,32", "32000,128256"
SPREAD = 3.0  # of the logits, a standard deviation: about 1,000 of 128,256 hold 0.95 of the mass
FILTERS: dict[str, tuple[int, float, float]] = {  # top_k, top_p, min_p
    "no filter": (0, 1.0, 0.0),
    "top_k 40": (40, 1.0, 0.0),
    "top_k 5000": (5000, 1.0, 0.0),
    "top_p 0.95": (0, 0.95, 0.0),
    "min_p 0.05": (0, 1.0, 0.05),
    "all three": (40, 0.95, 0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--vocabularies", default=VOCABULARIES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=library.loaded().torchinfer_cpu_num_threads())
    args = parser.parse_args()
    library.configure(args.threads)
    torch.set_num_threads(args.threads)
    level = library.loaded().torchinfer_cpu_level().decode()
    print(f"{level}, {args.threads} threads, torch {torch.__version__}")
    read = measure_ceilings(args.threads).read
    results = []
    for vocabulary in map(int, args.vocabularies.split(",")):
        for rows in map(int, args.rows.split(",")):
            logits = torch.randn(rows, vocabulary) * SPREAD
            for name, (ours, torchs) in calls(logits).items():
                seconds, others = measure(ours, torchs, args.repeats)
                ceiling = logits.numel() * 4 / read
                print(
                    f"{rows:3} x {vocabulary:7,} {name:10}: {seconds * 1e3:7.3f} ms, reading {ceiling * 1e3:6.3f} ms; "
                    f"torch {others * 1e3:8.2f} ms, {others / seconds:5.0f} times",
                    flush=True,
                )
                key = {"rows": rows, "vocabulary": vocabulary, "filter": name}
                results.append({**key, "seconds": seconds, "torch_seconds": others, "reading_seconds": ceiling})
    print(json.dumps({"level": level, "threads": args.threads, "read": read, "results": results}))


def calls(logits: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Ours and torch's, by name."""
    found: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "greedy": (lambda: greedy(logits), lambda: reference_greedy(logits))
    }
    for name, (top_k, top_p, min_p) in FILTERS.items():
        rows = len(logits)
        reals = [torch.full((rows,), value) for value in (0.8, top_p, min_p)]
        p = SamplingTensors(reals[0], torch.full((rows,), top_k, dtype=torch.int32), *reals[1:], torch.rand(rows))
        is_filtered = name != "no filter"
        found[name] = (
            lambda p=p: sample(logits, p, True),  # type: ignore[misc]
            lambda p=p, is_filtered=is_filtered: reference(logits, p, is_filtered),  # type: ignore[misc]
        )
    return found


def measure(ours: Callable[[], object], others: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both, in turn; the first of each warms up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for call, times in zip((ours, others), seconds, strict=True):
            start = time.perf_counter()
            call()
            if repeat > 0:
                times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
