"""The real compiler's word on a plan: decode steps and a prefill step, traced and compiled for the topology."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchinfer import aot
from torchinfer.device import dtype_name, free_memory_bytes
from torchinfer.errors import ConfigError, DeviceError, TorchinferError, raise_all
from torchinfer.hbm_traffic import hbm_bytes
from torchinfer.planner.kernels import StepKernel, step_kernels
from torchinfer.planner.options import PlanOptions
from torchinfer.planner.planner import Placement, Plan, num_cores
from torchinfer.planner.source import HOST
from torchinfer.step_input import StepShape, buckets
from torchinfer.xla_runner import MIN_TOKENS, request_buckets

logger = logging.getLogger(__name__)

HOST_BYTES = 2 << 30  # free on this machine before the compiler is started; 80 layers take about 1.3 GB
DEFAULT_BATCH = 64
GIB = 2**30
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclass(frozen=True, slots=True)
class CompiledStep:
    """A program of the engine, its bytes on one chip. Without `program` it does not compile: `error` says why."""

    placement: Placement
    kind: str  # decode or prefill
    shape: StepShape
    num_requests: int  # whose cache the step has; the shape's are those of the bucket
    num_pages: int
    needed_bytes: int  # weights and the cache of the bucket's requests: what a step must read
    program: aot.Compiled | None
    error: str | None
    seconds: float  # of tracing and compiling
    moved_bytes: int = 0  # between the chip and its memory
    kernels: tuple[StepKernel, ...] = ()  # the distinct Pallas kernels

    @property
    def name(self) -> str:
        """v5e 2x4, decode of 64 requests."""
        size = f"{self.num_requests:,} requests" if self.kind == "decode" else f"{self.shape.num_tokens:,} tokens"
        return f"{self.placement.name}, {self.kind} of {size}"

    @property
    def cache_bytes(self) -> int:
        """Of the program's arguments: what is written in place. Rows are padded to the tiles of the chip."""
        assert self.program is not None
        return self.program.alias_bytes

    @property
    def num_tokens_left(self) -> int:
        """Of cache, in the memory that the program itself leaves, by the compiler's bytes."""
        part, found = self.placement.footprint, self.placement.capacity
        assert part is not None and found is not None and self.program is not None
        left = found.memory_bytes - (self.program.peak_bytes - self.cache_bytes)
        return max(left * self.num_pages // self.cache_bytes - 1, 0) * part.page_size

    @property
    def collectives(self) -> dict[str, int]:
        """Name -> how many there are in the compiled program."""
        assert self.program is not None
        return dict(Counter(_COLLECTIVE.findall(self.program.hlo)))

    @property
    def num_kernels(self) -> int:
        """Calls of Pallas kernels."""
        return sum(kernel.call.count for kernel in self.kernels)

    @property
    def estimated_seconds(self) -> float:
        """The compiler's cycles of all operations that it has an estimate for, and those of Pallas kernels, of each the
        larger of its bundles and of the memory's cycles for its bytes: one after the other."""
        assert self.program is not None
        chip = aot.CHIPS[self.placement.accelerator.name]
        cycles = sum(map(int, _CYCLES.findall(self.program.hlo)))
        return (cycles + sum(kernel.cycles for kernel in self.kernels)) / chip.clock_hz

    def to_dict(self) -> dict[str, Any]:
        """Bytes, seconds."""
        place, program, shape = self.placement, self.program, self.shape
        named: dict[str, Any] = {
            "accelerator": place.accelerator.name,
            "topology": place.topology.name,
            "kind": self.kind,
            "batch": self.num_requests,
            "num_tokens": shape.num_tokens,
            "num_requests": shape.num_requests,
            "num_pages": self.num_pages,
            "compile_seconds": self.seconds,
            "error": self.error,
        }
        if program is None:
            return named
        return named | {
            "argument_bytes": program.argument_bytes,
            "cache_bytes": self.cache_bytes,
            "code_bytes": program.code_bytes,
            "peak_bytes": program.peak_bytes,
            "num_tokens_left": self.num_tokens_left,
            "flops": program.flops,
            "bytes_accessed": program.bytes_accessed,
            "moved_bytes": self.moved_bytes,
            "needed_bytes": self.needed_bytes,
            "estimated_seconds": self.estimated_seconds,
            "collectives": self.collectives,
            "num_kernels": self.num_kernels,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
        }


def compile_steps(plan: Plan, options: PlanOptions) -> list[CompiledStep]:
    """Compile steps for each TPU topology that was chosen. A program that the compiler refuses is a result.

    Raises:
        ConfigError: no TPU was planned for, or with each step that the engine would not run.
        DeviceError: torch_xla or libtpu are missing, or of another version; or memory of this machine.
    """
    places = [speed.placement for speed in plan.speeds if speed.placement.accelerator.name in aot.CHIPS]
    if not places:
        raise ConfigError(
            f"--compile: the model fits no TPU that was asked for (accelerator={options.accelerator!r}); use v5e or v5p"
        )
    raise_all(list(_problems(plan, options, places)), ConfigError, "cannot compile")
    _check_host()
    return [step for place in places for step in _compile_place(plan, options, place)]


def _problems(plan: Plan, options: PlanOptions, places: Sequence[Placement]) -> Iterator[str]:
    for batch in options.batch:
        if batch > plan.chunk:
            yield (
                f"batch={batch} must not be more than max_num_batched_tokens={plan.chunk}, the most tokens of a "
                "step: lower the one or raise the other"
            )
    for place in places:
        yield from _place_problems(plan, options, place)


def _place_problems(plan: Plan, options: PlanOptions, place: Placement) -> Iterator[str]:
    assert place.capacity is not None
    requests = request_buckets(1, place.topology.num_chips)[0]
    if plan.chunk > requests * plan.context:
        yield (
            f"max_num_batched_tokens={plan.chunk} is more than the {requests} requests of a prefill step have, of "
            f"context={plan.context} tokens: use at most {requests * plan.context}, or a longer context"
        )
    for batch in options.batch:
        if batch > place.capacity.num_requests:
            yield (
                f"batch={batch} does not fit {place.name}, which holds {place.capacity.num_requests} requests: "
                "ask for at most that"
            )


def _check_host() -> None:
    missing = [name for name in ("torch_xla", "jax", "torchax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceError(f"--compile needs {', '.join(missing)}: not installed; pip install 'torchinfer[tpu]'")
    try:
        importlib.import_module("torchax")
    except ImportError as error:  # the older one of torch_xla's wheel
        raise DeviceError(
            f"--compile needs torchax, which cannot be imported: {error}; pip install --no-deps --force-reinstall "
            "torchax==0.0.7"
        ) from error
    aot.check_compiler()
    free = free_memory_bytes(HOST)
    if free < HOST_BYTES:
        raise DeviceError(
            f"--compile needs about {HOST_BYTES / GIB:.0f} GiB of this machine's memory and {free / GIB:.1f} GiB are "
            "free; end other programs, or use a larger machine"
        )


def _compile_place(plan: Plan, options: PlanOptions, place: Placement) -> Iterator[CompiledStep]:
    assert place.capacity is not None and place.footprint is not None
    batches = options.batch or (min(place.capacity.num_requests, DEFAULT_BATCH, plan.chunk),)
    width = -(-plan.context // place.footprint.page_size)
    steps = [("decode", batch, request_buckets(batch, place.topology.num_chips)[-1]) for batch in batches]
    steps.append(("prefill", plan.chunk, request_buckets(1, place.topology.num_chips)[0]))
    for kind, tokens, rows in steps:
        shape = StepShape(buckets(MIN_TOKENS, max(tokens, rows))[-1], rows, width)
        yield _compile_step(plan, options, place, kind, shape, min(tokens, rows, max(batches)))


def _compile_step(
    plan: Plan, options: PlanOptions, place: Placement, kind: str, shape: StepShape, batch: int
) -> CompiledStep:
    part = place.footprint
    assert part is not None
    num_pages = batch * shape.table_width + 1
    request = {
        "model": str(Path(options.model).absolute() if Path(options.model).exists() else options.model),
        "dtype": dtype_name(plan.source.dtype),
        "quantization": options.quantization,
        "expert_parallel": options.expert_parallel,
        "num_chips": part.num_chips,
        "shape": [shape.num_tokens, shape.num_requests, shape.table_width],
        "cache_dtype": dtype_name(plan.cache_dtype),
        "num_pages": num_pages,
        "page_size": part.page_size,
        "num_cores": num_cores(place.accelerator),
    }
    logger.info("compiling %s, %d tokens, %d requests, for %s", kind, shape.num_tokens, shape.num_requests, place.name)
    started = time.monotonic()
    program, kernels, error = _try(request, place, options.compile_seconds)
    needed = part.weight_bytes + batch * part.request_bytes(plan.context)
    moved = 0 if program is None else hbm_bytes(program.hlo)
    seconds = time.monotonic() - started
    return CompiledStep(place, kind, shape, batch, num_pages, needed, program, error, seconds, moved, kernels)


def _try(
    request: dict[str, Any], place: Placement, limit_seconds: float
) -> tuple[aot.Compiled | None, tuple[StepKernel, ...], str | None]:
    """The compiled program and its kernels, or why there is none."""
    with tempfile.TemporaryDirectory(prefix="torchinfer-plan-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, "-m", "torchinfer.planner.trace", name]
        environment = os.environ | {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(place.topology.num_chips)}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            return None, (), f"the step could not be traced within compile_seconds={limit_seconds:g}; allow more"
        if done.returncode:
            return None, (), f"the step cannot be traced: {_last_line(done.stderr)}"
        text = (folder / "module.mlir").read_text()
        donated = tuple(json.loads((folder / "traced.json").read_text())["donated"])
    topology = f"{place.accelerator.name}:{place.topology.name}"
    assert place.footprint is not None
    try:
        program = aot.compile_hlo(
            text,
            topology,
            num_devices=place.topology.num_chips,
            donate=donated,
            timeout_seconds=limit_seconds,
        )
        kernels = step_kernels(program.hlo, topology, place.footprint, limit_seconds)
    except TorchinferError as error:
        return None, (), explain(str(error))
    return program, kernels, None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def explain(error: str) -> str:
    """What a compiler's refusal means and what to change; its own words where that is not known."""
    found = re.search(r"memory space (\w+)\. Used (\S+) of (\S+) \w+", error)
    if found and found[1] == "hbm":
        return (
            f"does not fit: weights, cache and what the step works with take {found[2]}iB of {found[3]}iB on each "
            "chip; use more chips, fewer bits (--quantization, --kv-cache int8), or a smaller --batch or --context"
        )
    if found:
        return (
            f"a kernel needs {found[2]}iB of the {found[3]}iB of {found[1]}: its blocks are too large for this chip; "
            "report it with the command"
        )
    if "did not end in" in error:
        return f"{error}: give a larger --compile-seconds"
    if "ended with code -9" in error:
        return "the compiler was killed, most likely because this machine's memory ran out; use a larger machine"
    return f"the compiler refuses it: {error[:500]}"
