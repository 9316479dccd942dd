"""Kernels for CUDA, in Triton: how near they come to the card's memory and products; or what the compiler says of them.

python benchmarks/cuda_kernels.py                              # on a GPU: ceilings, then every case
python benchmarks/cuda_kernels.py --cases attention,int8       # those whose names have one of these
python benchmarks/cuda_kernels.py --cases "decode bf16,decode peer"   # attention beside torch's and FlashInfer's
python benchmarks/cuda_kernels.py --compile 9.0                # no GPU: registers, shared memory, instructions
python benchmarks/cuda_kernels.py --tiny                       # no GPU: shapes of a few numbers, in the interpreter

Ceilings are measured in the same run: copying memory, and torch's products of 8192 x 8192 matrices. A case is captured
in a CUDA graph over copies of its tensors that the second cache does not hold, so that its time is the device's.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from cuda_cases import Case, full_cases, static_cases, tiny_cases
from cuda_peers import peer_cases, tiny_peer_cases

COLD_BYTES = 512 << 20  # of copies, so that nothing is in the second cache
REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="parts of names, comma between them; all if empty")
    parser.add_argument("--compile", metavar="CAPABILITY", help="8.0, 8.9 or 9.0: compile only")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if options.compile:
        os.environ.pop("TRITON_INTERPRET", None)
    if options.compile:
        cases = static_cases()
    else:
        cases = tiny_cases() + tiny_peer_cases() if options.tiny else full_cases() + peer_cases()
    wanted = [case for case in cases if any(part in case.name for part in options.cases.split(","))]
    if options.compile:
        results = compile_cases(wanted, options.compile)
    else:
        results = run_tiny(wanted) if options.tiny else measure(wanted)
    print(json.dumps({"device": device_name(options), "torch": torch.__version__, "results": results}))


def device_name(options: argparse.Namespace) -> str:
    """What the results are of."""
    if options.compile:
        return f"compiled for {options.compile}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def compile_cases(cases: list[Case], capability: str) -> list[dict[str, Any]]:
    """What Triton's compiler and ptxas make of each case, on tensors without memory."""
    from torchinfer.kernels.cuda.offline import compiling

    major, minor = map(int, capability.split("."))
    results: list[dict[str, Any]] = []
    with compiling((major, minor)) as compiled:
        for case in cases:
            known = len(compiled)
            case.make("meta")()
            for kernel in compiled[known:]:
                results.append({"case": case.name, **asdict(kernel)})
                needs = f"{kernel.registers} registers, {kernel.stack_bytes} B stack, {kernel.shared_bytes} B shared"
                print(f"{case.name:48s} {kernel.name:23s} {needs}, {kernel.loop_instructions} in the longest loop")
    return results


def run_tiny(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case once: that the calls are right, not how long they take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        from torchinfer.kernels.cuda.interpreter import repair

        repair()
    for case in cases:
        case.make(device)()
        print(f"{case.name}: runs")
    return [{"case": case.name} for case in cases]


def measure(cases: list[Case]) -> list[dict[str, Any]]:
    """Seconds of each case, and what part of the ceilings they are."""
    ceilings = measure_ceilings()
    print(", ".join(f"{name}: {value / 1e12:.2f} T/s" for name, value in ceilings.items()))
    results = []
    for case in cases:
        copies = [case.make("cuda") for _ in range(min(8, max(1, COLD_BYTES // case.num_bytes)))]
        seconds = seconds_of(copies)
        del copies
        torch.cuda.empty_cache()
        share = {
            "of_bandwidth": case.num_bytes / seconds / ceilings["bandwidth"],
            "of_products": case.num_operations / seconds / ceilings[case.peak],
        }
        shares = ", ".join(f"{name} {value:.2f}" for name, value in share.items())
        print(f"{case.name:60s} {seconds * 1e6:9.1f} us, {shares}")
        results.append({"case": case.name, "seconds": seconds, **share})
    return [{"case": "ceilings", **ceilings}, *results]


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and write, and operations a second of torch's products."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    e4m3, one, integers = (a.to(torch.float8_e4m3fn), torch.ones((), device="cuda"), a.to(torch.int8))
    products: dict[str, Callable[[], object]] = {
        "bf16": lambda: a @ b,
        "int8": lambda: torch._int_mm(integers, integers.T),
        "fp8": lambda: torch._scaled_mm(e4m3, e4m3.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
    }
    found = {"bandwidth": 2 * source.numel() / seconds_of([lambda: target.copy_(source)])}
    return found | {name: 2 * 8192**3 / seconds_of([call]) for name, call in products.items()}


def seconds_of(calls: list[Callable[[], object]]) -> float:
    """Seconds of a call on the device, median of several replays of a graph that holds all of them."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(REPEATS + 1):  # the first warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
