"""The engine on a GPU: decode against the memory's limit and against transformers, throughput, host time, loading.

    python benchmarks/cuda_engine.py --work /tmp/cuda --out results.jsonl           # all parts, one after the other
    python benchmarks/cuda_engine.py --work /tmp/cuda --parts decode-fp8,host --limits host=60
    python benchmarks/cuda_engine.py --work /tmp/tiny --tiny --device cpu            # that it runs, in under a minute

    ceilings      bytes a second of copies on the device, and from pinned memory to it; operations of bf16 and e4m3
                  products
    load-*        a checkpoint in the page cache -> parameters on the device    limit: a pinned copy of its bytes
                  the first load of a process, which pins its buffers, and the best of two after it
    decode-*      one request, steps a second                                   limit: copy bandwidth / bytes of a step
    eager-*       the same without CUDA graphs
    peer          transformers' generate, static cache, compiled; the same request
    host          what the host does a step, 256 requests                       limit: the device's time of a step
    host-mixed    the same with 128 requests that decode, and a prompt beside them in each step: no graph
    throughput    1,000 tokens in and 1,000 out, 256 requests, fp8 with inputs in 8 bits, int8 cache
                  limit: bytes of the decode steps at copy bandwidth, and operations of the prompts at e4m3's rate
    mixtral       the same with the shapes of Mixtral 8x7B, of which 4 layers of 32; the limit is that of 4 layers, too

The checkpoint has the shapes of Llama 3 8B and random numbers, 16 GB, is made in --work if it is not there, and stays;
Mixtral's takes 12 GB. Each part is a process with a time limit of its own, and prints one JSON line as soon as it ends;
what was lost after it costs nothing. The last line says which parts ended, and how many times transformers' steps ours
are if both were measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cuda_engine_parts import (
    SCHEMES,
    TINY,
    Bench,
    Result,
    Sizes,
    ceilings,
    decode,
    host,
    host_mixed,
    load,
    mixtral,
    peer,
    throughput,
)

SECONDS = {"ceilings": 60, "peer": 300, "throughput": 300, "mixtral": 300, "host": 120, "host-mixed": 120}  # others 150


def parts() -> dict[str, Callable[[Bench], Result]]:
    """Name -> measurement, in the order in which a short loan of a GPU wants them."""
    found: dict[str, Callable[[Bench], Result]] = {"ceilings": ceilings}
    found |= {f"decode-{name}": decode(scheme, True) for name, scheme in SCHEMES.items()}
    found |= {"eager-bf16": decode(None, False), "peer": peer, "host": host, "host-mixed": host_mixed}
    found |= {"throughput": throughput, "mixtral": mixtral}
    found |= {f"load-{name}": load(SCHEMES[name]) for name in ("bf16", "fp8")}
    return found


def run_part(bench: Bench, name: str) -> Result:
    """In this process."""
    start = time.perf_counter()
    result = parts()[name](bench)
    gpu = torch.cuda.get_device_name() if bench.device == "cuda" else "none"
    common = {"part": name, "part_seconds": time.perf_counter() - start, "gpu": gpu, "torch": torch.__version__}
    return common | result


def run_apart(name: str, arguments: list[str], limit: float) -> Result:
    """In a process of its own, which is killed after `limit` seconds."""
    command = [sys.executable, __file__, *arguments, "--parts", name, "--together"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"part": name, "error": f"ran past its limit of {limit:g} s"}
    if done.returncode:
        return {"part": name, "error": f"ended with code {done.returncode}; see above"}
    result: Result = json.loads(done.stdout.splitlines()[-2])
    return result


def main() -> None:
    args = parse()
    bench = Bench(args.work, args.device, TINY if args.tiny else Sizes())
    limits = SECONDS | {name: float(value) for name, _, value in (each.partition("=") for each in args.limits)}
    arguments = ["--work", str(args.work), "--device", args.device, *(["--tiny"] if args.tiny else [])]
    ended: dict[str, Result] = {}
    failed = []
    for name in args.parts.split(",") if args.parts else parts():
        result = run_part(bench, name) if args.together else run_apart(name, arguments, limits.get(name, 150))
        if "error" in result:
            failed.append(name)
        else:
            ended[name] = result
        print(json.dumps(result), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    measured = {line["part"]: line for line in map(json.loads, lines) if "error" not in line} | ended
    print(json.dumps({"benchmark": "cuda_engine", "ended": list(ended), "failed": failed} | ratios(measured)))


def ratios(measured: dict[str, Result]) -> Result:
    """Of parts that were measured, in this run or an earlier one into the same file, on the same GPU."""
    ours, theirs = measured.get("decode-bf16"), measured.get("peer")
    if ours is None or theirs is None or ours["gpu"] != theirs["gpu"]:
        return {}
    return {"times_transformers": theirs["ms"] / ours["ms"]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", help=f"some of {','.join(parts())}; all if left out")
    parser.add_argument("--limits", nargs="*", default=[], metavar="PART=SECONDS")
    parser.add_argument("--out", type=Path, help="file to which each part's line is added, too")
    parser.add_argument("--tiny", action="store_true", help="a model of some layers, and few tokens")
    parser.add_argument("--together", action="store_true", help="all in this process, without limits")
    args = parser.parse_args()
    unknown = [name for name in (args.parts or "").split(",") if name and name not in parts()]
    if unknown:
        parser.error(f"no part is named {', '.join(unknown)}; there are {', '.join(parts())}")
    return args


if __name__ == "__main__":
    main()
