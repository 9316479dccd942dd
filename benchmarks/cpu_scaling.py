"""How decoding on the CPU grows: tokens a second against requests, tokens of context, and threads.

    python benchmarks/cpu_scaling.py --model DIR --quantization int8_w8a8
    python benchmarks/cpu_scaling.py --model DIR --requests 1 8 --contexts 128 2048 --threads 2 --plot docs

One engine; prompts begin alike from one point to the next, so that the prefix cache has what was read before. Beside
each step stand two limits, from ceilings measured in the same run: the bytes of its weights and cache over the read
bandwidth, and its products over those of registers; attention's are not counted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from bars import plot_bars
from cpu_linear import PLANES, PRODUCTS, median_seconds, read_bandwidth
from cpu_peers_worker import make_prompt, matrix_bytes

from torchinfer.config import EngineConfig
from torchinfer.engine import Engine
from torchinfer.kernels.cpu import library
from torchinfer.launch import start_engine
from torchinfer.request import Request, SamplingParams

STEPS, REPEATS = 8, 3
REGISTER_REPEATS = 1 << 19


class Machine:
    """Ceilings of this moment with so many threads: bytes and operations a second."""

    def __init__(self, threads: int, kind: int) -> None:
        library.configure(threads)
        opened = library.loaded()
        count = opened.torchinfer_cpu_measure_products(kind, 1) * REGISTER_REPEATS * threads
        seconds = median_seconds(lambda: opened.torchinfer_cpu_measure_products(kind, REGISTER_REPEATS))
        self.products = 2 * count / seconds
        self.read = read_bandwidth()


def step_seconds(engine: Engine, names: itertools.count[int], requests: int, context: int, vocab_size: int) -> float:
    """The median time of a step in which all requests decode."""
    most = STEPS * REPEATS + 8 + requests * context // 256  # the first ones go on while the last ones' prompts are read
    params = SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=True)
    started = [f"r{next(names)}" for _ in range(requests)]
    for seed, name in enumerate(started):
        engine.add(Request(name, tuple(make_prompt(context, seed + 1, vocab_size)), params))
    waiting = set(started)
    while waiting:
        waiting -= {event.request_id for event in engine.step()}
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        times.append((time.perf_counter() - start) / STEPS)
    for name in started:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    return statistics.median(times)


def measure(engine: Engine, args: argparse.Namespace, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Each point with each number of threads."""
    model = engine.runner._model  # type: ignore[attr-defined]
    matrices = [getattr(module, name) for module in model.modules() for name in getattr(module, "MATRICES", ())]
    numbers = sum(matrix.numel() for matrix in (*matrices, model.prepared_head) if matrix is not None)
    caches = engine.runner._kv_caches  # type: ignore[attr-defined]
    cache_bytes = sum(tensor.numel() * tensor.element_size() for cache in caches for tensor in cache.tensors)
    token_bytes = cache_bytes / (engine.info.num_pages * engine.info.page_size)
    kind, planes = PRODUCTS[args.quantization], PLANES.get(args.quantization, 1)
    names, rows = itertools.count(), []
    points = [(count, args.contexts[0]) for count in args.requests]
    points += [(1, context) for context in args.contexts[1:]]
    for threads, (requests, context) in itertools.product(args.threads, points):
        machine = Machine(threads, kind)
        seconds = step_seconds(engine, names, requests, context, config["vocab_size"])
        memory = (matrix_bytes(model) + requests * context * token_bytes) / machine.read
        products = 2 * numbers * requests * planes / machine.products
        row = {"threads": threads, "requests": requests, "context": context, "seconds": seconds}
        row |= {"tokens": requests / seconds, "of_reading": memory / seconds, "of_products": products / seconds}
        print(
            f"{threads} threads, {requests:3} requests after {context:5} tokens: {seconds * 1e3:7.1f} ms a step, "
            f"{row['tokens']:6.1f} tokens/s, {row['of_reading']:.2f} of reading ({machine.read / 1e9:.1f} GB/s), "
            f"{row['of_products']:.2f} of the products ({machine.products / 1e9:.0f} GFLOP/s)",
            flush=True,
        )
        rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    bars = [
        ("ours", f"{row['threads']} threads, {row['requests']} x {row['context']} tokens", row["tokens"])
        for row in rows
    ]
    plot_bars("decode on the CPU", "tokens/s", bars, None, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--quantization", choices=PRODUCTS, default="int8_w8a8")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192, 16384])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--kv-cache", default="auto")
    parser.add_argument("--plot", type=Path, help="folder for one SVG")
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    engine = start_engine(
        EngineConfig(
            model=args.model,
            device="cpu",
            quantization=None if args.quantization == "bf16" else args.quantization,
            kv_cache_dtype=args.kv_cache,
            kv_cache_memory=2 << 30,
            max_num_requests=max(args.requests),
            progress=False,
        )
    )
    rows = measure(engine, args, config)
    if args.plot:
        plot(rows, args.plot / "cpu_scaling.svg")
    print(json.dumps({"benchmark": "cpu_scaling", "quantization": args.quantization, "rows": rows}))


if __name__ == "__main__":
    main()
