"""Runs the cases of benchmarks/loading.py: each load in a fresh process, the methods taking turns."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from make_checkpoint import DTYPES, make_checkpoint

METHODS = Path(__file__).with_name("loading_methods.py")
Row = dict[str, Any]
Place = Callable[[], AbstractContextManager[Path | str]]  # where a checkpoint is, for the time of a load


@dataclass(frozen=True)
class Case:
    """One method on one checkpoint, which lies in `checkpoint` and is reached through `at`, a mount for example."""

    name: str
    kind: str  # limit, ours or peer
    checkpoint: Path
    task: dict[str, Any]  # see loading_methods.py
    at: Place | None = None
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where checkpoints are made, and how cases are run."""

    work: Path
    repeats: int
    shards: int
    peer_python: str
    timeout: float  # seconds, for one load

    def checkpoint(self, gigabytes: float, kind: str = "dense", dtype: str = "bf16") -> Path:
        """The folder of a checkpoint of this kind, made if it is not there."""
        return make_once(self.work, gigabytes, kind, dtype, self.shards)

    def rounds(self, cases: list[Case]) -> dict[str, list[Row]]:
        """All results of each case, by its name."""
        results: dict[str, list[Row]] = {case.name: [] for case in cases}
        for number in range(self.repeats):
            for case in cases:
                result = self.run(case)
                results[case.name].append(result)
                print(f"round {number + 1}: {case.name}: {brief(result)}", file=sys.stderr, flush=True)
        return results

    def run(self, case: Case) -> Row:
        """One load. That a peer is not installed, or fails, is a result too."""
        with case.at() if case.at else contextlib.nullcontext(case.checkpoint) as place:
            return self._run(case, str(place))

    def _run(self, case: Case, place: str) -> Row:
        shards = sorted(case.checkpoint.glob("*.safetensors"))
        files = [f"{place}/{shard.name}" for shard in shards]
        sizes = [shard.stat().st_size for shard in shards]
        task = json.dumps({"path": place, "files": files, "sizes": sizes, **case.task})
        python = self.peer_python if case.kind == "peer" else sys.executable
        env = {**os.environ, **case.env}
        try:
            done = subprocess.run(
                [python, str(METHODS), task], env=env, capture_output=True, text=True, timeout=self.timeout
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {self.timeout:g} s"}
        if done.returncode == 0:
            result: Row = json.loads(done.stdout.splitlines()[-1])
            return result
        if case.kind != "peer":
            raise SystemExit(f"{case.name} failed:\n{done.stderr}")
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def make_once(work: Path, gigabytes: float, kind: str, dtype: str, shards: int) -> Path:
    folder = work / f"{kind}-{gigabytes:g}-{dtype}-{shards}"
    if not (folder / "config.json").exists():
        make_checkpoint(folder, gigabytes, kind=kind, shards=shards, dtype=DTYPES[dtype])
        os.sync()  # or the disk would be writing while it is measured
    return folder


def gb_per_second(result: Row) -> float:
    return float(result["num_bytes"] / result["seconds"] / 1e9)


def brief(result: Row) -> str:
    """One result in a few words."""
    if "seconds" in result:
        return f"{result['seconds']:.2f} s, {gb_per_second(result):.3f} GB/s"
    return str(result.get("missing") or f"failed: {result['failed']}")


def summarize(case: Case, results: list[Row]) -> Row:
    """One row of a table: the median rate, or why there is none; a median of repeats that did not all succeed is
    none."""
    row: Row = {"name": case.name, "kind": case.kind}
    bad = [result for result in results if "seconds" not in result]
    if bad:
        return {**row, "note": brief(bad[0])}
    rates = [gb_per_second(result) for result in results]
    row |= {"gb_s": round(statistics.median(rates), 4), "least": round(min(rates), 4), "most": round(max(rates), 4)}
    row["from_storage"] = round(statistics.median(r["storage_bytes"] / r["num_bytes"] for r in results), 3)
    for name in ("version", "report"):
        if name in results[-1]:
            row[name] = results[-1][name]
    return row
