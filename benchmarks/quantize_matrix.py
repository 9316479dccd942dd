"""How fast a matrix is quantized while it is loaded, and then brought into the layout of the CPU's kernels.

    python benchmarks/quantize_matrix.py

The ceiling is how fast torch copies the same bfloat16 matrix, which is larger than the caches. Rates are of its bytes;
medians of --repeats, the ways taking turns. "PyTorch" is the reference, with as many threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from torchinfer import kernels
from torchinfer.kernels.reference.quantize_matrix import quantize_matrix as reference
from torchinfer.quantization import SCHEMES, Scheme

NAMES = ("int8", "fp8", "fp8_block", "int4", "int4_g64", "int4_g32")


def measured(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each case, the median."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + 1):  # the first warms up
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def cases_of(scheme: Scheme, weight: Tensor) -> dict[str, Callable[[], object]]:
    tensors = dict(scheme.pack(weight))
    column_block = scheme.column_block or weight.shape[1]
    quantized = scheme.weight({**tensors, "values": tensors["values"].clone()}, weight.shape[1], ())
    return {
        "library": lambda: scheme.pack(weight, tensors),
        "PyTorch": lambda: reference(weight, tensors["values"], tensors["scale"], scheme.row_block, column_block),
        "layout": lambda: kernels.prepare(quantized, may_overwrite=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    weight = (torch.randn(args.rows, args.columns) * 0.02).bfloat16()
    copy = torch.empty_like(weight)
    seconds = measured({"copy": lambda: copy.copy_(weight)}, args.repeats)["copy"]
    ceiling = weight.nbytes / seconds / 1e9
    print(f"ceiling: {ceiling:.2f} GB/s, a copy of the matrix\n\n| {'GB/s':10} | library | PyTorch | layout |")
    rows = []
    for name in NAMES:
        found = measured(cases_of(SCHEMES[name], weight), args.repeats)
        rates = {case: round(weight.nbytes / took / 1e9, 2) for case, took in found.items()}
        print(f"| {name:10} | {rates['library']:7} | {rates['PyTorch']:7} | {rates['layout']:6} |", flush=True)
        rows.append({"scheme": name, **rates})
    print(json.dumps({"benchmark": "quantize_matrix", "ceiling_gb_s": round(ceiling, 2), "rows": rows}))


if __name__ == "__main__":
    main()
