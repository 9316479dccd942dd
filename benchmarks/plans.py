"""Plans of well-known models for TPU v5e and v5p, compiled by the TPU's own compiler: do they fit, do they compile?

    python benchmarks/plans.py                         # all, one after the other: 20 minutes
    python benchmarks/plans.py --only mixtral --json plans.json
    python benchmarks/plans.py --no-compile            # the arithmetic only

Needs no TPU and no weights: configs are in benchmarks/configs. Prints a row of Markdown for each compiled step, and
all of it again as one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchinfer.planner.compiled import CompiledStep, compile_steps
from torchinfer.planner.options import PlanOptions
from torchinfer.planner.planner import Plan, plan

CONFIGS = Path(__file__).resolve().parent / "configs"
HEADINGS = (
    "model",
    "weights",
    "on",
    "weights, GB a chip",
    "requests of 1,024 that fit",
    "step",
    "GB a chip by the compiler",
    "of memory",
    "GB moved, x needed",
    "all-reduces",
    "other collectives",
    "ms, by its estimate",
    "s to compile",
)


@dataclass(frozen=True)
class Case:
    """A model on a topology. `batch` and `chunk`: of the steps that are compiled."""

    model: str
    quantization: str | None
    accelerator: str
    topology: str
    batch: int = 64
    chunk: int = 512

    @property
    def name(self) -> str:
        """llama-2-70b int8 v5p 2x2x1."""
        return f"{self.model} {self.quantization or 'bfloat16'} {self.accelerator} {self.topology}"


CASES = (
    Case("llama-2-7b", "int8", "v5e", "1x1", batch=32),
    Case("gemma-7b", "int8", "v5e", "1x1", batch=24),
    Case("gpt-j-6b", None, "v5e", "2x2"),
    Case("gpt-j-6b", "int8", "v5e", "2x2"),
    Case("llama-2-13b", "int8", "v5e", "2x2"),
    Case("llama-2-70b", "int8", "v5e", "2x4"),
    Case("llama-2-70b", "int8", "v5p", "2x2x1"),
    Case("llama-2-70b", None, "v5p", "2x2x1"),
    Case("llama-3-8b", "int8", "v5e", "2x2", batch=256),
    Case("mixtral-8x7b", "int8", "v5e", "2x2"),
    Case("mixtral-8x7b", "int8", "v5p", "2x2x1"),
)


def main() -> None:
    """Plan and compile what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="models and topologies whose name has it")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile-seconds", type=float, default=1800, metavar="X", help="for each program")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    results = []
    for case in (case for case in CASES if arguments.only in case.name):
        for row, result in run(case, arguments.compile, arguments.compile_seconds):
            print(f"| {' | '.join(row)} |", flush=True)
            results.append(result)
    text = json.dumps(results)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


def run(case: Case, is_compiled: bool, limit_seconds: float) -> Iterator[tuple[list[str], dict[str, object]]]:
    """Cells and facts of each step; of the plan alone if nothing is compiled."""
    options = PlanOptions(
        model=CONFIGS / f"{case.model}.json",
        quantization=case.quantization,
        kv_cache_dtype="int8",
        dtype="bfloat16",
        context=1024,
        accelerator=case.accelerator,
        topology=case.topology,
        max_num_batched_tokens=case.chunk,
        batch=(case.batch,),
        compile_seconds=limit_seconds,
    )
    found = plan(options)
    facts = {"model": case.model, "weights": case.quantization or "bfloat16"}
    if not is_compiled:
        yield cells(case, found), {**facts, "on": found.placements[0].name}
        return
    for step in compile_steps(found, options):
        yield cells(case, found) + compiled_cells(step, case), {**facts, **step.to_dict()}


def cells(case: Case, found: Plan) -> list[str]:
    """By arithmetic."""
    place = found.placements[0]
    assert place.capacity is not None
    weights, requests = place.capacity.weight_bytes / 1e9, place.capacity.num_requests
    return [case.model, case.quantization or "bfloat16", place.name, f"{weights:.2f}", f"{requests:,}"]


def compiled_cells(step: CompiledStep, case: Case) -> list[str]:
    """By the compiler."""
    name = f"decode, {case.batch} requests" if step.kind == "decode" else f"prefill, {case.chunk} tokens"
    program, capacity = step.program, step.placement.capacity
    if program is None or capacity is None:
        return [name, f"does not compile: {step.error}", *["-"] * 5, f"{step.seconds:.0f}"]
    collectives = step.collectives
    others = [f"{count} {kind}" for kind, count in sorted(collectives.items()) if kind != "all-reduce"]
    return [
        name,
        f"{program.peak_bytes / 1e9:.2f}",
        f"{program.peak_bytes / capacity.memory_bytes:.0%}",
        f"{step.moved_bytes / 1e9:.2f}, {step.moved_bytes / step.needed_bytes:.2f}",
        str(collectives.get("all-reduce", 0)),
        ", ".join(others) or "none",
        f"{1000 * step.estimated_seconds:.1f}",
        f"{step.seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
