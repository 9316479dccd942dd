"""Whole models on the CPU: tokens a second of ours and of the engines that people would pick instead.

    python benchmarks/cpu_peers.py --work /tmp/peers                        # all peers; the first time installs them
    python benchmarks/cpu_peers.py --work /tmp/peers --peers llama.cpp --bits 8 --rounds 3
    python benchmarks/cpu_peers.py --work /tmp/peers --model qwen2-0.5b --peers --tasks b1 b8

The same random weights in each format, two threads, greedy, prompts of ids. Each engine loads once and waits
in a process of its own while the others are measured; they take turns in each round, and medians are told. The limit of
decoding one request is the read bandwidth, measured just before, over the bytes of weights that a token needs. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpu_peers_setup as prepared
from bars import plot_bars
from cpu_linear import read_bandwidth

WORKER = Path(__file__).with_name("cpu_peers_worker.py")
PEERS = ("llama.cpp", "vllm", "openvino", "ctranslate2", "onnxruntime", "transformers")
TASKS = {
    "b1": {"requests": 1, "prompt": 128, "new": 64},
    "b8": {"requests": 8, "prompt": 128, "new": 32},
    "b32": {"requests": 32, "prompt": 32, "new": 32},
    "p512": {"requests": 1, "prompt": 512, "new": 1},
    "p4096": {"requests": 1, "prompt": 4096, "new": 1},
}
THREADS = "2"


@dataclass
class Case:
    """One engine with one format of weights."""

    engine: str
    label: str
    bits: int
    python: Path
    model: Path
    options: dict[str, str] = field(default_factory=dict)
    load: dict[str, float] = field(default_factory=dict)
    results: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.label}"

    def start(self) -> None:
        command = [self.python, WORKER, self.engine, self.model]
        command += [part for key, value in self.options.items() for part in ("--option", f"{key}={value}")]
        env = {**os.environ, "OMP_NUM_THREADS": THREADS}
        self.process = subprocess.Popen(
            [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.load = self._answer()

    def measure(self, task: dict[str, int]) -> dict[str, float]:
        assert self.process is not None and self.process.stdin is not None
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answer(self) -> dict[str, float]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}; its messages are above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def median(self, task: str, key: str) -> float | None:
        found = [result[key] for result in self.results.get(task, ()) if key in result]
        return statistics.median(found) if found else None


def cases(work: Path, model: str, peers: list[str], bits: list[int]) -> list[Case]:
    """Ours first; everything that they need is made here."""
    source, own = prepared.checkpoint(work, model), Path(sys.executable)
    found = [Case("torchinfer", "bf16", 16, own, source)]
    for scheme, size in (("int8", 8), ("int8_w8a8", 8), ("int4", 4), ("int4_w4a8", 4)):
        # llama.cpp and OpenVINO quantize the head too.
        found.append(Case("torchinfer", scheme, size, own, source, {"quantization": scheme, "head": scheme}))
    makers: dict[str, Callable[[], list[Case]]] = {
        "llama.cpp": lambda: [
            Case("llama.cpp", kind, size, prepared.python_of(work, "llama.cpp"), prepared.gguf(work, model, kind))
            for kind, size in (("BF16", 16), ("Q8_0", 8), ("Q4_0", 4))
            if size in bits
        ],
        "vllm": lambda: [
            Case("vllm", label, size, prepared.python_of(work, "vllm"), make(work, model))
            for label, size, make in (("bf16", 16, prepared.checkpoint), ("w8a8", 8, prepared.vllm_int8))
            if size in bits
        ],
        "openvino": lambda: [
            Case("openvino", kind, size, prepared.python_of(work, "openvino"), prepared.openvino(work, model, kind))
            for kind, size in (("fp16", 16), ("int8", 8), ("int4", 4))
            if size in bits
        ],
        "ctranslate2": lambda: [
            Case("ctranslate2", kind, size, prepared.python_of(work, "export"), prepared.ctranslate2(work, model, kind))
            for kind, size in (("bfloat16", 16), ("int8", 8))
            if size in bits
        ],
        "onnxruntime": lambda: [
            Case("onnxruntime", kind, size, prepared.python_of(work, "onnxruntime"), prepared.onnx(work, model, kind))
            for kind, size in (("int8", 8), ("int4", 4))
            if size in bits
        ],
        "transformers": lambda: [Case("transformers", "bf16", 16, own, source)],
    }
    found += [case for peer in peers for case in makers[peer]()]
    return [case for case in found if case.bits in bits]


def run(chosen: list[Case], tasks: list[str], rounds: int, vocab_size: int) -> float:
    """Measure; returns the median of the read bandwidth, bytes a second."""
    bandwidths = []
    with ExitStack() as stack:
        for case in chosen:
            stack.callback(case.stop)
            case.start()
            print(f"{case.name}: loaded in {case.load['load_seconds']:.1f} s", file=sys.stderr, flush=True)
        for number in range(rounds + 1):
            for task in tasks:
                for case in chosen:
                    bandwidth = read_bandwidth()
                    found = case.measure({**TASKS[task], "vocab_size": vocab_size})
                    bandwidths.append(bandwidth)
                    if "decode" in found and "token_bytes" in case.load:
                        found["of_limit"] = found["decode"] * case.load["token_bytes"] / bandwidth
                    if number > 0:  # the first one warms up
                        case.results.setdefault(task, []).append(found)
                    brief = ", ".join(f"{key} {found[key]:.1f}" for key in ("prefill", "decode") if key in found)
                    print(f"round {number}: {task} {case.name}: {brief}", file=sys.stderr, flush=True)
    return statistics.median(bandwidths)


def report(chosen: list[Case], tasks: list[str], bandwidth: float) -> list[dict[str, Any]]:
    """Print a table; returns its rows."""
    columns = [(task, "prefill" if task.startswith("p") else "decode") for task in tasks]
    print(f"\nread bandwidth {bandwidth / 1e9:.1f} GB/s; tokens a second, medians")
    print(
        f"{'engine':24}" + "".join(f"{task:>10}" for task, _ in columns) + f"{'of limit':>10}{'load s':>8}{'RSS MB':>8}"
    )
    rows = []
    for case in chosen:
        values = {task: case.median(task, key) for task, key in columns}
        rss = max(result["peak_rss"] for results in case.results.values() for result in results)
        fraction = case.median("b1", "of_limit")
        cells = "".join(f"{'' if value is None else format(value, '.1f'):>10}" for value in values.values())
        share = "" if fraction is None else format(fraction, ".2f")
        print(f"{case.name:24}{cells}{share:>10}{case.load['load_seconds']:8.1f}{rss / 1e6:8.0f}")
        row = {"engine": case.engine, "weights": case.label, "bits": case.bits, "of_limit": fraction}
        rows.append({**row, **case.load, **values, "peak_rss": rss})
    return rows


def plot(chosen: list[Case], tasks: list[str], model: str, folder: Path) -> None:
    """Bars for each task."""
    for task in tasks:
        key = "prefill" if task.startswith("p") else "decode"
        bars = []
        for case in sorted(chosen, key=lambda case: case.bits, reverse=True):
            value = case.median(task, key)
            if value is not None:
                bars.append(("ours" if case.engine == "torchinfer" else "peer", case.name, value))
        plot_bars(f"{model}, {task}, {key}", "tokens/s", bars, None, folder / f"cpu_peers_{model}_{task}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments and models")
    parser.add_argument("--model", choices=prepared.MODELS, default="llama-1.1b")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 8, 4), default=[16, 8, 4])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="folder for one SVG a task")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = cases(args.work, args.model, args.peers, args.bits)
    bandwidth = run(chosen, args.tasks, args.rounds, prepared.MODELS[args.model]["vocab_size"])
    rows = report(chosen, args.tasks, bandwidth)
    if args.plot:
        plot(chosen, args.tasks, args.model, args.plot)
    print(json.dumps({"benchmark": "cpu_peers", "model": args.model, "bandwidth": bandwidth, "rows": rows}))


if __name__ == "__main__":
    main()
