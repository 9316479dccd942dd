"""Linear layers of a Llama of 1.1 billion parameters in the CPU library, against what the machine allows and torch.

python benchmarks/cpu_linear.py                                    # all formats, decode and prefill
python benchmarks/cpu_linear.py --formats bf16,int8_w8a8 --rows 1,512

First the ceilings: reading memory (the best of several patterns and sizes of pages) and products of registers. Weights
are spread over more memory than the caches hold. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.linear import linear
from torchinfer.kernels.cpu.packed_weight import PackedStruct, PackedWeight, prepare
from torchinfer.quantization import SCHEMES

SHAPES = {
    "qkv": (2048, 2560),
    "output": (2048, 2048),
    "gate_up": (2048, 11264),
    "down": (5632, 2048),
    "head": (2048, 32000),
}
FORMATS = ("bf16", "int8", "int8_w8a8", "int4", "fp8")
PRODUCTS = {"bf16": 1, "fp8": 1, "int8": 2, "int8_w8a8": 2, "int4": 2}  # the units that compute: Format in src/packed.h
PLANES = {"int8": 2, "int4": 2}  # passes over bfloat16 inputs: the peak is that much lower
COLD_BYTES = 256 << 20  # of copies of a weight, so that none is in a cache
READ_BYTES, MOST_AHEAD = 512 << 20, 16384
REPEATS = 7


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations a second; a multiply-add is two operations."""

    read: float
    products: dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,8,32,512")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--threads", type=int, default=0, help="0: the CPUs of this process")
    args = parser.parse_args()
    library.configure(args.threads)
    threads = library.loaded().torchinfer_cpu_num_threads()
    torch.set_num_threads(threads)
    level = library.loaded().torchinfer_cpu_level().decode()
    print(f"{level}, {threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    ceilings = measure_ceilings(threads)
    results = []
    for name in args.shapes.split(","):
        for format_name in args.formats.split(","):
            results += measure_shape(name, format_name, [int(rows) for rows in args.rows.split(",")], ceilings)
    products = {str(key): value for key, value in ceilings.products.items()}
    summary = {"level": level, "threads": threads, "read": ceilings.read, "products": products, "results": results}
    print(json.dumps(summary))


def median_seconds(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second, of the best of two patterns over large pages: it changes from moment to moment."""
    memory, opened = fresh_memory(READ_BYTES), library.loaded()
    calls = [partial(opened.torchinfer_cpu_measure_read, memory.data_ptr(), READ_BYTES, n, 0) for n in (1, 4)]
    return max(READ_BYTES / median_seconds(call) for call in calls)


def measure_ceilings(threads: int) -> Ceilings:
    """The best read pattern, and the peak of each kind of product."""
    opened, best = library.loaded(), 0.0
    for advice, pages in ((mmap.MADV_NOHUGEPAGE, "4 KiB"), (mmap.MADV_HUGEPAGE, "2 MiB")):
        memory = fresh_memory(READ_BYTES + MOST_AHEAD, advice)
        for streams in (1, 2, 4):
            for ahead in (0, 2048, 8192, MOST_AHEAD):
                read = partial(opened.torchinfer_cpu_measure_read, memory.data_ptr(), READ_BYTES, streams, ahead)
                rate = READ_BYTES / median_seconds(read)
                best = max(best, rate)
                print(f"read: pages of {pages}, {streams} streams, {ahead:5} bytes ahead: {rate / 1e9:5.1f} GB/s")
        del memory
    peaks = {}
    for kind, name in ((1, "bf16"), (2, "int8")):
        repeats = 1 << 20
        count = opened.torchinfer_cpu_measure_products(kind, 1) * repeats * threads
        peaks[kind] = 2 * count / median_seconds(partial(opened.torchinfer_cpu_measure_products, kind, repeats))
        print(f"products of registers: {name} {peaks[kind] / 1e9:.0f} GFLOP/s")
    return Ceilings(best, peaks)


def fresh_memory(num_bytes: int, advice: int = mmap.MADV_HUGEPAGE) -> Tensor:
    memory = mmap.mmap(-1, -(-num_bytes // (2 << 20)) * (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)


def measure_shape(name: str, format_name: str, rows_list: list[int], ceilings: Ceilings) -> list[dict[str, Any]]:
    columns, outputs = SHAPES[name]
    weight = torch.randn(outputs, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    packed = make_packed(weight, format_name)
    copies = cold_copies(packed)
    calls = {"ours": [partial(linear, weight=copy, bias=None) for copy in copies], **torch_calls(weight, format_name)}
    results = []
    for rows in rows_list:
        x = torch.randn(rows, columns).bfloat16()
        for engine, cold in calls.items():
            seconds = median_seconds(partial(call_all, cold, x)) / (len(cold) if rows < 64 else 1)
            gigabytes, gigaflops = packed.num_bytes / seconds / 1e9, 2 * rows * columns * outputs / seconds / 1e9
            peak = ceilings.products[PRODUCTS[format_name]] / (PLANES.get(format_name, 1) if engine == "ours" else 1)
            of_read, of_peak = gigabytes * 1e9 / ceilings.read, gigaflops * 1e9 / peak
            print(
                f"{name:8} {format_name:10} {rows:4} rows {engine:6} {seconds * 1e6:10.1f} us {gigabytes:6.1f} GB/s "
                f"({of_read:4.2f} of reading) {gigaflops:7.1f} GFLOP/s ({of_peak:4.2f} of the peak)",
                flush=True,
            )
            key = {"shape": name, "format": format_name, "rows": rows, "engine": engine, "seconds": seconds}
            results.append({**key, "of_read": round(of_read, 3), "of_peak": round(of_peak, 3)})
    return results


def make_packed(weight: Tensor, format_name: str) -> PackedWeight:
    if format_name == "bf16":
        packed = prepare(weight.bfloat16())
    else:
        scheme = SCHEMES[format_name]
        packed = prepare(scheme.weight(dict(scheme.pack(weight)), weight.shape[1], ()))
    assert packed is not None
    return packed


def cold_copies(packed: PackedWeight) -> list[PackedWeight]:
    """As many as the caches cannot hold, in large pages, as the loader gives them to parameters."""
    copies = []
    for _ in range(max(1, COLD_BYTES // packed.num_bytes)):
        values = fresh_memory(packed.values.numel())[: packed.values.numel()].copy_(packed.values)
        struct = PackedStruct.from_buffer_copy(packed.struct)
        struct.values = values.data_ptr()
        copies.append(replace(packed, values=values, struct=struct))
    return copies


def torch_calls(weight: Tensor, format_name: str) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """torch's own kernel for these weights, where it has one."""
    if format_name == "bf16":
        copies = [weight.bfloat16() for _ in range(max(1, COLD_BYTES // (2 * weight.numel())))]
        return {"torch": [partial(functional.linear, weight=copy) for copy in copies]}
    if format_name == "int8":
        packed = SCHEMES["int8"].pack(weight)
        values = [packed["values"].clone() for _ in range(max(1, COLD_BYTES // weight.numel()))]
        scale = packed["scale"].flatten().bfloat16()
        return {"torch": [partial(int8_by_torch, weight=copy, scale=scale) for copy in values]}
    return {}


def int8_by_torch(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, weight, scale)


def call_all(calls: list[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    for call in calls if len(x) < 64 else calls[:1]:
        call(x)


if __name__ == "__main__":
    main()
