"""One matrix on every level of the CPU library that this machine has: what each level of instructions is worth.

python benchmarks/cpu_levels.py                                    # gate and up of a Llama of 1.1 billion parameters
python benchmarks/cpu_levels.py --levels avx512_vnni,avx512 --formats int8_w8a8 --rows 1,512

Levels are measured in turn, round after round, so that a change of the machine's speed meets them all: the best call of
each counts. Weights are spread over more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial

import torch
from cpu_linear import FORMATS, SHAPES, cold_copies, make_packed

from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.linear import linear

ROUNDS = 7


def main() -> None:
    opened = library.loaded()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", default=",".join(library.levels(opened)))
    parser.add_argument("--formats", default="int8,int8_w8a8", help=", ".join(FORMATS))
    parser.add_argument("--rows", default="1,8,512")
    parser.add_argument("--shape", default="gate_up", choices=SHAPES)
    parser.add_argument("--threads", type=int, default=0, help="0: the CPUs of this process")
    args = parser.parse_args()
    library.configure(args.threads)
    levels, rows_list = args.levels.split(","), [int(rows) for rows in args.rows.split(",")]
    results = []
    for name in args.formats.split(","):
        for rows, seconds in measure(name, args.shape, levels, rows_list).items():
            times = "  ".join(f"{level} {value * 1e6:.0f}" for level, value in seconds.items())
            print(f"{args.shape} {name} {rows} rows, us: {times}", flush=True)
            results.append({"format": name, "rows": rows, "seconds": seconds})
    print(json.dumps({"shape": args.shape, "results": results}))


def measure(name: str, shape: str, levels: list[str], rows_list: list[int]) -> dict[int, dict[str, float]]:
    """Seconds of a product: of each number of rows, on each level."""
    columns, outputs = SHAPES[shape]
    weight = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    calls = [partial(linear, weight=copy, bias=None) for copy in cold_copies(make_packed(weight, name))]
    seconds = {}
    for rows in rows_list:
        x = torch.randn(rows, columns).bfloat16()
        best = dict.fromkeys(levels, float("inf"))
        for _ in range(ROUNDS):
            for level in levels:
                library.choose_level(library.loaded(), level)
                for call in calls if rows < 64 else calls[:1]:
                    start = time.perf_counter()
                    call(x)
                    best[level] = min(best[level], time.perf_counter() - start)
        seconds[rows] = best
    return seconds


if __name__ == "__main__":
    main()
