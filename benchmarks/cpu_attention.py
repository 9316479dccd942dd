"""Attention of the CPU library: bytes of the cache that it reads per second, beside what the memory gives.

    python benchmarks/cpu_attention.py

Each case in turn, and the read bandwidth between them: decode over bf16 and int8 caches at several contexts, with one
request and with eight, and a chunk of a prompt; the reference (torch's attention) beside it. Many layers' caches are
read one after the other, as in a model, so that none is left in the processor's cache. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchinfer.batch import Batch, KVCache
from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.paged_attention import paged_attention
from torchinfer.kernels.reference.paged_attention import paged_attention as reference
from torchinfer.testing import Row, make_batch

PAGE_SIZE = 16
SHAPES = [(32, 4, 64), (32, 8, 128)]  # query heads, KV heads, head size
CONTEXTS = [512, 2048, 8192]
READ_BYTES = 2**29  # that a measurement reads at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    opened = library.loaded()
    results: list[dict[str, Any]] = []
    source = torch.ones(2**26, dtype=torch.int64)
    for shape in SHAPES:
        for num_rows in (1, 8):
            for context in CONTEXTS:
                results.append(decode(shape, num_rows, context, repeats, source))
                print(line(results[-1]), flush=True)
        results.append(prefill(shape, 512, repeats))
        print(results[-1], flush=True)
    level, threads = opened.torchinfer_cpu_level().decode(), opened.torchinfer_cpu_num_threads()
    print(json.dumps({"level": level, "threads": threads, "results": results}))


def decode(shape: tuple[int, int, int], num_rows: int, context: int, repeats: int, source: Tensor) -> dict[str, Any]:
    """Medians, in turn, of bandwidth, bf16, int8 and the reference over bf16."""
    rows = [(1, context - 1)] * num_rows
    bf16 = Case(shape, rows, torch.bfloat16)
    int8 = Case(shape, rows, torch.int8)
    seconds: dict[str, list[float]] = {"read": [], "bf16": [], "int8": [], "reference": []}
    for _ in range(repeats):
        seconds["read"].append(timed(source.sum) / (source.numel() * 8))
        seconds["bf16"].append(bf16.seconds(paged_attention))
        seconds["int8"].append(int8.seconds(paged_attention))
        seconds["reference"].append(bf16.seconds(reference))
    bandwidth = 1 / min(seconds["read"])  # the best: what the memory can give
    found: dict[str, Any] = {"shape": shape, "rows": num_rows, "context": context, "gb_per_second": bandwidth / 1e9}
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, case in (("bf16", bf16), ("int8", int8)):
        found[f"{name}_us"] = middle[name] * 1e6
        found[f"{name}_fraction_of_bandwidth"] = case.num_bytes / middle[name] / bandwidth
    found["int8_against_bf16"] = middle["bf16"] / middle["int8"]
    found["bf16_against_reference"] = middle["reference"] / middle["bf16"]
    return found


def prefill(shape: tuple[int, int, int], num_tokens: int, repeats: int) -> dict[str, Any]:
    """A prompt's first chunk."""
    found: dict[str, Any] = {"shape": shape, "prefill": num_tokens}
    num_products = 2 * shape[0] * shape[2] * num_tokens * (num_tokens + 1) // 2
    for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8)):
        case = Case(shape, [(num_tokens, 0)], dtype)
        seconds = [case.seconds(paged_attention) for _ in range(repeats)]
        other = [case.seconds(reference) for _ in range(repeats)]
        found[f"{name}_ms"] = statistics.median(seconds) * 1e3
        found[f"{name}_gflops"] = 2 * num_products / statistics.median(seconds) / 1e9
        found[f"{name}_against_reference"] = statistics.median(other) / statistics.median(seconds)
    return found


class Case:
    """A step over the caches of several layers, which hold random numbers."""

    def __init__(self, shape: tuple[int, int, int], rows: list[tuple[int, int]], dtype: torch.dtype) -> None:
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
    if dtype == torch.int8:
        return KVCache(torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[:-1]) / 64)
    return KVCache(torch.randn(shape, dtype=dtype))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def line(found: dict[str, Any]) -> str:
    return (
        f"{found['shape']} {found['rows']} x {found['context']}: read {found['gb_per_second']:.1f} GB/s, "
        f"bf16 {found['bf16_us']:.0f} us ({found['bf16_fraction_of_bandwidth']:.2f}), "
        f"int8 {found['int8_us']:.0f} us ({found['int8_fraction_of_bandwidth']:.2f}), "
        f"int8/bf16 {found['int8_against_bf16']:.2f}x, bf16/reference {found['bf16_against_reference']:.1f}x"
    )


if __name__ == "__main__":
    main()
