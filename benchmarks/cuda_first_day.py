"""All that a GPU has to answer, in the order of worth, within a budget of time: tests, then figures, then the rest.

    python benchmarks/cuda_first_day.py --work /tmp/cuda --out results                # 13 minutes at most
    python benchmarks/cuda_first_day.py --work /tmp/cuda --out results --steps kernel-tests,decode
    python benchmarks/cuda_first_day.py --list

A step that fails, or runs past its limit, costs no other. Each writes its output to a file in --out as it runs, and
summary.json is written anew behind each: what a loan of a machine that ends early has measured is there. Steps that the
budget has no room for are named in it. See docs/cuda.md for what a machine must have.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 15.0  # with less left no step is begun
TEST_FILES = ("full", "ops", "matmul", "packed", "splits", "fused_rows", "attention", "rotate_and_write", "sample")
TEST_FILES += ("models", "persistent", "tuning")
LOOK = """
import logging, torch, triton, torchinfer
from torchinfer import kernels
logging.basicConfig(level=logging.INFO)
print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), torch.cuda.mem_get_info())
kernels.load_ports("cuda")
assert kernels._find_folder("cuda") == "cuda", "Triton cannot launch: see above"
"""
GPU_TESTS = ("tests/test_decode_graphs.py", "tests/test_cuda_ids.py", "tests/loader/test_weights.py")
CORNERS = "batch 16 context 4096,batch 64 context 32768,batch 1 context 131072"  # of figure 1


@dataclass(frozen=True)
class Step:
    """A command; `is_background`: the next ones begin beside it."""

    name: str
    command: list[str]
    limit: float  # seconds
    waits_for: str | None = None  # a step in the background
    is_background: bool = False


def plan(work: Path, out: Path) -> list[Step]:
    """The most needed first."""
    python, workers = sys.executable, ["-n", "8"] if importlib.util.find_spec("xdist") else []
    benchmarks = ROOT / "benchmarks"
    pytest = [python, "-m", "pytest", "-q", "--maxfail", "30"]
    kernel_tests = [f"tests/kernels/test_cuda_{name}.py" for name in TEST_FILES]
    make = [python, str(benchmarks / "make_checkpoint.py"), "--shards", "4", "--kind"]
    engine = [python, str(benchmarks / "cuda_engine.py"), "--work", str(work), "--out", str(out / "engine.jsonl")]
    measured = [python, str(benchmarks / "cuda_kernels.py"), "--cases"]
    ready, experts = "make-llama", "make-mixtral"
    return [
        Step("look", [python, "-c", LOOK], 60),
        Step(ready, [*make, "llama3-8b", "--out", str(work / "llama3-8b")], 180, is_background=True),
        Step("kernel-tests", [*pytest, *workers, *kernel_tests], 200),
        Step("gpu-tests", [*pytest, *workers, "-m", "cuda", *GPU_TESTS], 150),
        Step("decode", [*engine, "--parts", "ceilings,decode-bf16,eager-bf16,decode-fp8,decode-int4"], 150, ready),
        Step("throughput", [*engine, "--parts", "throughput,host"], 150, ready),
        Step("attention", [*measured, CORNERS], 90),
        Step("linear", [*measured, "8b-gate_up,8b-output"], 90),
        Step("peer", [*engine, "--parts", "decode-int8,peer,load-bf16,load-fp8"], 150, ready),
        Step(experts, [*make, "mixtral-4-layers", "--out", str(work / "mixtral-4-layers")], 120, is_background=True),
        Step("experts", [*measured, "grouped"], 60),
        Step("mixtral", [*engine, "--parts", "mixtral,host-mixed"], 150, experts),
        Step("linear-70b", [*measured, "70b/8-gate_up"], 60),
        Step("plot", [python, str(benchmarks / "cuda_plot.py"), "--results", str(out), "--plot", str(out)], 30),
        Step("tune", [python, str(benchmarks / "cuda_tune.py"), "--out", str(out / "tuned.json")], 900),
    ]


def run_steps(steps: list[Step], out: Path, budget: float) -> dict[str, Any]:
    """Every step that there is time for. Name -> how it ended, and after how many seconds."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + budget
    found: dict[str, Any] = {}
    background: dict[str, Running] = {}
    for step in steps:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            found[step.name] = {"ended": "no time left"}
            continue
        if step.waits_for in background:
            waited = background.pop(step.waits_for)
            found[waited.step.name] = waited.wait(min(waited.step.limit, left))
        running = Running(step, out)
        if step.is_background:
            background[step.name] = running
        else:
            found[step.name] = running.wait(min(step.limit, deadline - time.monotonic()))
        save(found, out)
    for waited in background.values():
        found[waited.step.name] = waited.wait(deadline - time.monotonic())
    save(found, out)
    return found


class Running:
    """A step's process, whose output goes to a file."""

    def __init__(self, step: Step, out: Path) -> None:
        self.step, self.start = step, time.monotonic()
        print(f"{step.name}: {' '.join(step.command[1:4])[:80]} ...", flush=True)
        with (out / f"{step.name}.log").open("wb") as log:
            options: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            env = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what is killed has written what it found
            self.process = subprocess.Popen(step.command, cwd=ROOT, env=env, **options)

    def wait(self, limit: float) -> dict[str, Any]:
        """How it ended; past the limit it is killed, with all that it started."""
        try:
            code = self.process.wait(max(limit, 0))
            ended = "well" if code == 0 else f"with code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            ended = f"past its limit of {limit:.0f} s"
        seconds = round(time.monotonic() - self.start, 1)
        print(f"{self.step.name}: ended {ended} after {seconds} s", flush=True)
        return {"ended": ended, "seconds": seconds}


def save(found: dict[str, Any], out: Path) -> None:
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/cuda"), help="folder for 28 GB of checkpoints")
    parser.add_argument("--out", type=Path, default=Path("cuda_results"), help="folder for logs and results")
    parser.add_argument("--budget", type=float, default=780, help="seconds for all steps")
    parser.add_argument("--steps", help="some of them, with what they wait for; all if left out")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    options = parser.parse_args()
    steps = plan(options.work.resolve(), options.out.resolve())
    wanted = set(options.steps.split(",")) if options.steps else {step.name for step in steps}
    unknown = wanted - {step.name for step in steps}
    if unknown:
        parser.error(f"no step is named {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in steps)}")
    wanted |= {step.waits_for for step in steps if step.name in wanted and step.waits_for}
    chosen = [step for step in steps if step.name in wanted]
    if options.list:
        for step in chosen:
            print(f"{step.name:14s} {step.limit:4.0f} s  {' '.join(step.command[1:])[:100]}".replace("\n", " "))
        return
    print(json.dumps(run_steps(chosen, options.out.resolve(), options.budget)))


if __name__ == "__main__":
    main()
