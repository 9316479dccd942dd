"""What a decode step costs on the host with XLA:CPU, in a graph of 32 layers that are small enough to compute nothing.

Host time is the processor time of the thread that steps: planning, packing, the transfer, the call of the compiled
programs, events; not the programs themselves, which run in threads of XLA's. The ceiling is 2 ms a step, no compilation
after the warm-up, and every cache tensor written in place.

    python benchmarks/xla_host.py
    python benchmarks/xla_host.py --kv-cache-dtype int8 --requests 64
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

from torchinfer.config import KV_CACHE_DTYPES, EngineConfig
from torchinfer.engine import Engine
from torchinfer.launch import start_engine
from torchinfer.request import Request, SamplingParams
from torchinfer.testing import SIZES, save_random_checkpoint

CEILING_MS = 2.0


def start(folder: Path, num_layers: int, num_requests: int, kv_cache_dtype: str) -> Engine:
    """An engine that decodes so many requests, warm."""
    from transformers import LlamaConfig

    save_random_checkpoint(LlamaConfig(**SIZES | {"num_hidden_layers": num_layers}), folder)
    config = EngineConfig(
        model=folder,
        device="xla",
        dtype="float32",
        max_num_requests=num_requests,
        max_num_batched_tokens=max(16, num_requests),
        kv_cache_dtype=kv_cache_dtype,
        progress=False,
    )
    return start_engine(config)


def decode(engine: Engine, num_requests: int, num_steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each step of so many requests: processor time of this thread, and on the clock."""
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    for index in range(num_requests):
        engine.add(Request(f"r{index}", tuple(range(5, 13)), params))
    while engine.stats().num_running < num_requests or engine.stats().num_waiting:
        engine.step()
    for _ in range(20):
        engine.step()
    host, wall = [], []
    for _ in range(num_steps):
        before = time.thread_time(), time.perf_counter()
        engine.step()
        host.append(1000 * (time.thread_time() - before[0]))
        wall.append(1000 * (time.perf_counter() - before[1]))
    return host, wall


def count_aliases(folder: Path) -> int:
    """Outputs of the largest dumped program that are written in place."""
    forward = max(folder.glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text()
    found = re.search(r"input_output_alias=\{(.*?)\}, entry", forward, re.S)
    return found.group(1).count("may-alias") if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        dump = Path(name) / "dump"
        os.environ |= {
            "PJRT_DEVICE": "CPU",
            "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=none",
        }
        engine = start(Path(name) / "model", args.layers, args.requests, args.kv_cache_dtype)
        warm = engine.stats().num_compilations
        print(
            f"{args.layers} layers, {warm} programs; ceiling: {CEILING_MS} ms of host time a step, 0 compilations more"
        )
        host, wall = decode(engine, args.requests, args.steps)
        num_aliases = count_aliases(dump)
    result = {
        "benchmark": "xla_host",
        "layers": args.layers,
        "requests": args.requests,
        "kv_cache_dtype": args.kv_cache_dtype,
        "host_ms": round(statistics.median(host), 3),
        "host_ms_p90": round(statistics.quantiles(host, n=10)[-1], 3),
        "wall_ms": round(statistics.median(wall), 3),
        "compilations": engine.stats().num_compilations - warm,
        "aliased": num_aliases,
        "cache_tensors": args.layers * (2 if args.kv_cache_dtype in ("int8", "fp8") else 1),
    }
    print(f"host {result['host_ms']} ms a step, {result['host_ms'] / CEILING_MS:.2f} of the ceiling")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
