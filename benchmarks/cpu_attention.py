"""Attention of the CPU library against what the machine allows: bytes of the cache that it reads per second beside the
read bandwidth, and products per second beside their peak.

    python benchmarks/cpu_attention.py                              # decode and prefill, all shapes
    python benchmarks/cpu_attention.py --shapes 32x4x64 --rows 1 --contexts 8192 --prefills ""

First the ceilings, as benchmarks/cpu_linear.py measures them. Then each case over bf16 and int8 caches in turn, and the
reference (torch's attention) beside it. Caches lie in large pages, as the engine's do; those of many layers are read
one after the other, as in a model, so that none is left in the processor's cache. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cpu_linear import Ceilings, fresh_memory, measure_ceilings
from torch import Tensor

from torchinfer.batch import Batch, KVCache
from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.paged_attention import paged_attention
from torchinfer.kernels.reference.paged_attention import paged_attention as reference
from torchinfer.testing import Row, make_batch

PAGE_SIZE = 16
SHAPES = "32x4x64,32x8x128,14x2x64"  # query heads, KV heads, head size: Llama 1.1B, Llama 3 8B, Qwen2 0.5B
CONTEXTS, ROWS, PREFILLS = "128,512,2048,8192,16384", "1,8,32", "512,4096"
READ_BYTES = 2**28  # that a measurement reads at least
MOST_BYTES = 2**31  # of a case's cache: larger ones are passed over
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
PRODUCTS, PLANES = {"bf16": 1, "int8": 2}, {"bf16": 1, "int8": 2}  # unit of products, passes over a bfloat16 query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--contexts", default=CONTEXTS)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--prefills", default=PREFILLS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-reference", action="store_true", help="leave out torch's attention, which takes long")
    args = parser.parse_args()
    threads = library.loaded().torchinfer_cpu_num_threads()
    level = library.loaded().torchinfer_cpu_level().decode()
    print(f"{level}, {threads} threads, torch {torch.__version__}")
    ceilings = measure_ceilings(threads)
    ports = {"ours": paged_attention} if args.no_reference else {"ours": paged_attention, "reference": reference}
    results: list[dict[str, Any]] = []
    for name in args.shapes.split(","):
        shape = tuple(int(size) for size in name.split("x"))
        for rows in numbers(args.rows):
            for context in numbers(args.contexts):
                results += decode(shape, rows, context, args.repeats, ceilings, ports)
        for tokens in numbers(args.prefills):
            results += prefill(shape, tokens, args.repeats, ceilings, ports)
    print(json.dumps({"level": level, "threads": threads, "read": ceilings.read, "results": results}))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def decode(
    shape: tuple[int, ...],
    num_rows: int,
    context: int,
    repeats: int,
    ceilings: Ceilings,
    ports: dict[str, Callable[..., Tensor]],
) -> list[dict[str, Any]]:
    """Rows of one token each."""
    if 4 * num_rows * context * shape[1] * shape[2] > MOST_BYTES:
        return []
    cases = {name: Case(shape, [(1, context - 1)] * num_rows, dtype) for name, dtype in DTYPES.items()}
    seconds = measure(cases, repeats, ports)
    found: list[dict[str, Any]] = []
    for name, case in cases.items():
        ours, num_products = seconds[name, "ours"], 2 * num_rows * context * shape[0] * shape[2]
        of_read = case.num_bytes / ours / ceilings.read
        of_peak = 2 * num_products * PLANES[name] / ours / ceilings.products[PRODUCTS[name]]
        text = f"{ours * 1e6:9.1f} us, {of_read:4.2f} of reading, {of_peak:4.2f} of the peak"
        key = {"shape": shape, "rows": num_rows, "context": context, "cache": name, "seconds": ours}
        found.append({**key, "of_read": round(of_read, 3), "of_peak": round(of_peak, 3)})
        report(f"{shape} {num_rows:2} x {context:5} {name}: {text}", found[-1], name, seconds)
    return found


def prefill(
    shape: tuple[int, ...], num_tokens: int, repeats: int, ceilings: Ceilings, ports: dict[str, Callable[..., Tensor]]
) -> list[dict[str, Any]]:
    """A prompt in one step: products that the mask leaves."""
    cases = {name: Case(shape, [(num_tokens, 0)], dtype) for name, dtype in DTYPES.items()}
    seconds = measure(cases, repeats, ports)
    found: list[dict[str, Any]] = []
    for name in cases:
        ours, num_products = seconds[name, "ours"], shape[0] * shape[2] * num_tokens * (num_tokens + 1)
        of_peak = 2 * num_products * PLANES[name] / ours / ceilings.products[PRODUCTS[name]]
        text = f"{ours * 1e3:7.2f} ms, {2 * num_products / ours / 1e9:6.1f} GFLOP/s, {of_peak:4.2f} of the peak"
        key = {"shape": shape, "prefill": num_tokens, "cache": name, "seconds": ours}
        found.append({**key, "of_peak": round(of_peak, 3)})
        report(f"{shape} prompt of {num_tokens:5} {name}: {text}", found[-1], name, seconds)
    return found


def measure(
    cases: dict[str, Case], repeats: int, ports: dict[str, Callable[..., Tensor]]
) -> dict[tuple[str, str], float]:
    """Median seconds of each case and port, in turn."""
    seconds: dict[tuple[str, str], list[float]] = {(name, port): [] for name in cases for port in ports}
    for repeat in range(repeats + 1):
        for (name, port), times in seconds.items():
            spent = cases[name].seconds(ports[port])
            if repeat > 0:  # the first warms up
                times.append(spent)
    return {key: statistics.median(times) for key, times in seconds.items()}


def report(text: str, found: dict[str, Any], name: str, seconds: dict[tuple[str, str], float]) -> None:
    """Print it, with how much faster it is than others; they go into `found` too."""
    others = {"bf16": seconds["bf16", "ours"]} if name != "bf16" else {}
    if (name, "reference") in seconds:
        others["reference"] = seconds[name, "reference"]
    for other, spent in others.items():
        found[f"against_{other}"] = round(spent / seconds[name, "ours"], 2)
        text += f", {found[f'against_{other}']:.2f}x {other}"
    print(text, flush=True)


class Case:
    """A step over the caches of several layers, which hold random numbers."""

    def __init__(self, shape: tuple[int, ...], rows: list[tuple[int, int]], dtype: torch.dtype) -> None:
        num_heads, num_kv_heads, head_size = shape
        per_row = [-(-(new + old) // PAGE_SIZE) for new, old in rows]
        pages = (torch.randperm(sum(per_row), generator=torch.Generator().manual_seed(0)) + 1).tolist()
        batch_rows = [
            Row([0] * new, old, [pages.pop() for _ in range(n)], 1) for (new, old), n in zip(rows, per_row, strict=True)
        ]
        self.batch: Batch = make_batch(batch_rows, PAGE_SIZE)
        cache_shape = (2, sum(per_row) + 1, PAGE_SIZE, num_kv_heads, head_size)
        row_bytes = head_size + 4 if dtype == torch.int8 else 2 * head_size
        self.num_bytes = 2 * sum(new + old for new, old in rows) * num_kv_heads * row_bytes
        self.caches = [random_cache(cache_shape, dtype) for _ in range(max(1, min(64, READ_BYTES // self.num_bytes)))]
        self.query = torch.randn(len(self.batch.tokens), num_heads, head_size).bfloat16()
        self.scale = head_size**-0.5

    def seconds(self, port: Callable[..., Tensor]) -> float:
        """Of one layer."""

        def run() -> None:
            for kv_cache in self.caches:
                port(self.query, kv_cache, self.batch, self.scale, None, None)

        return timed(run) / len(self.caches)


def random_cache(shape: tuple[int, ...], dtype: torch.dtype) -> KVCache:
    data = fresh_memory(math.prod(shape) * dtype.itemsize)[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    if dtype != torch.int8:
        return KVCache(data.normal_())
    scale = fresh_memory(4 * data.numel() // shape[-1])[: 4 * data.numel() // shape[-1]].view(torch.float32)
    return KVCache(data.random_(-127, 128), scale.view(shape[:-1]).uniform_(0, 1 / 64))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
