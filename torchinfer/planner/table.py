"""A plan as text, for a terminal, and as plain data, for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torchinfer import aot
from torchinfer.device import DEFAULT_CACHE_SHARE, dtype_name
from torchinfer.evaluation.table import columns
from torchinfer.kv_cache.tensors import SCALED
from torchinfer.planner.capacity import WEIGHT_SHARE
from torchinfer.planner.compiled import CompiledStep
from torchinfer.planner.kernels import StepKernel
from torchinfer.planner.planner import Placement, Plan, Speed
from torchinfer.planner.roofline import LEFT_OUT, Step, price_per_million
from torchinfer.planner.source import UNREAD

PLACES = (
    "on",
    "",
    "chips",
    "hosts",
    "weights GB",
    "of memory",
    "KV B/token",
    "act. MB",
    "tokens",
    "requests",
    "80/20 tokens",
    "requests",
)
STEPS = ("step", "limit", "ms", "tokens/s", "$/M tokens", "GB read", "GFLOP", "ms between chips")
COMPILED = (
    "compiled for",
    "step",
    "tokens",
    "requests",
    "GB",
    "of it work",
    "of memory",
    "cache tokens",
    "GFLOP",
    "GB moved",
    "x needed",
    "ms, est.",
    "collectives",
    "kernels",
    "compile s",
)
KERNELS = ("kernel", "of", "calls", "MB", "memory's cycles", "bundles", "of memory", "ms, est.")
COMPILED_NOTES = (
    "compiled: the engine's program for the topology, by libtpu. "
    "GB: the most at once of arguments, with the cache of so many requests of full length, and what is worked with; "
    "cache tokens: that fit if the work's part does not grow with the cache. GB moved: between the chip and its "
    "memory, counted in the compiled program, and how many times weights and cache of the requests that is; "
    "attention's kernel counts the pages that rows of full length fetch. ms: the compiler's cycles of the operations "
    "that it estimates, and of kernels the larger of bundles and the memory's cycles, one after the other: without "
    "gathers, transfers, waiting, and what XLA fetches while something else is computed.",
    "kernels: MB that a call moves, as it states; VLIW bundles of a call, one a cycle at most, of loops times their "
    "rounds, branches that are not taken included. Below 1 of the memory's cycles the memory is the limit, above it "
    "the kernel; ms are those of all calls.",
    "Where there are no kernels (a float32 cache, a matrix in a scheme that stays as it is) experts are multiplied one "
    "after the other under masks (kernels/tpu/grouped_matmul.py), and attention gathers the pages of every token's "
    "request (kernels/tpu/paged_attention.py): formulations for correctness, which move far more than is needed.",
)
LANES = 128  # numbers in a row of a TPU's tile
RULE = round(100 * WEIGHT_SHARE)


def to_text(plan: Plan, compiled: Sequence[CompiledStep] = ()) -> str:
    """The model, where it fits, how fast it may be there, and what the numbers leave out."""
    source = plan.source
    lines = [
        f"{source.name}: {source.config.architecture}, {plan.num_parameters:,} parameters",
        f"weights {source.scheme}, activations {dtype_name(source.dtype)}, KV cache {dtype_name(plan.cache_dtype)}",
        f"requests of {plan.context:,} tokens, prompts in steps of {plan.chunk:,}; bytes and operations are of "
        "each chip",
        "",
        *columns([PLACES, *map(_place_cells, plan.placements)]),
        *(f"{each.name}: {'; '.join(each.problems)}" for each in plan.placements if each.problems),
    ]
    for speed in plan.speeds:
        lines += ["", f"{speed.placement.name}: {_price(speed)}", *columns([STEPS, *_step_cells(plan, speed)])]
    if compiled:
        lines += ["", *_compiled_table(compiled)]
    lines += ["", *(f"- {note}" for note in [*notes(plan), *(COMPILED_NOTES if compiled else ())])]
    return "\n".join(lines)


def _place_cells(placement: Placement) -> tuple[str, ...]:
    topology = placement.topology
    size = (str(topology.num_chips), str(topology.num_hosts))
    found, part = placement.capacity, placement.footprint
    if found is None or part is None:
        return (placement.name, "does not divide", *size, *("-",) * 8)
    verdict = "fits" if placement.is_roomy else "fits, tight" if placement.fits else "too big"
    return (
        placement.name,
        verdict,
        *size,
        f"{found.weight_bytes / 1e9:.2f}",
        f"{found.weight_share:.0%}",
        f"{part.kv_bytes_per_token:,}",
        f"{found.activation_bytes / 1e6:.0f}",
        f"{found.num_tokens:,}",
        f"{found.num_requests:,}",
        f"{found.rule_tokens:,}" if found.keeps_rule else "-",
        f"{found.rule_requests:,}" if found.keeps_rule else "-",
    )


def _price(speed: Speed) -> str:
    chips = speed.placement.topology.num_chips
    return f"{chips} x ${speed.price.usd:g} = ${speed.usd_per_hour:,.2f} an hour ({speed.price.source})"


def _step_cells(plan: Plan, speed: Speed) -> Iterator[tuple[str, ...]]:
    for step in speed.decode:
        yield _cells(f"decode, batch {step.num_requests:,}", [step], speed)
    yield _cells(f"prefill, {sum(step.num_tokens for step in speed.prefill):,} tokens", speed.prefill, speed)


def _cells(name: str, steps: Sequence[Step], speed: Speed) -> tuple[str, ...]:
    """Of several steps the sums, and the limit of the longest."""
    seconds = sum(step.seconds for step in steps)
    rate = sum(step.num_tokens for step in steps) / seconds
    return (
        name,
        max(steps, key=lambda step: step.seconds).limit,
        f"{1000 * seconds:,.2f}",
        f"{rate:,.0f}",
        f"{price_per_million(rate, speed.usd_per_hour):,.3f}",
        f"{sum(step.memory_bytes for step in steps) / 1e9:,.2f}",
        f"{sum(step.flops for step in steps) / 1e9:,.0f}",
        f"{1000 * sum(step.interconnect_seconds for step in steps):,.3f}",
    )


def _compiled_table(steps: Sequence[CompiledStep]) -> list[str]:
    """What was compiled, and why the rest was not."""
    lines = columns([COMPILED, *map(_compiled_cells, steps)])
    lines += [f"{each.name}: {each.error}" for each in steps if each.error is not None]
    for step in (each for each in steps if each.kernels):
        rows = [_kernel_cells(kernel, step) for kernel in step.kernels]
        lines += ["", f"{step.name}: Pallas kernels", *columns([KERNELS, *rows])]
    return lines


def _kernel_cells(kernel: StepKernel, step: CompiledStep) -> tuple[str, ...]:
    clock_hz = aot.CHIPS[step.placement.accelerator.name].clock_hz
    return (
        kernel.name,
        kernel.streamed,
        f"{kernel.call.count:,}",
        f"{kernel.num_bytes / 1e6:,.2f}" if kernel.num_bytes else "-",
        f"{kernel.hbm_cycles:,.0f}" if kernel.num_bytes else "-",
        f"{kernel.num_bundles:,}",
        f"{kernel.num_bundles / kernel.hbm_cycles:.2f}" if kernel.num_bytes else "-",
        f"{1000 * kernel.cycles / clock_hz:,.3f}",
    )


def _compiled_cells(step: CompiledStep) -> tuple[str, ...]:
    named = (step.placement.name, step.kind, f"{step.shape.num_tokens:,}", f"{step.shape.num_requests:,}")
    program = step.program
    if program is None:
        return (*named, "does not compile", *("-",) * 9, f"{step.seconds:.0f}")
    assert step.placement.capacity is not None
    collectives = ", ".join(f"{count} {name}" for name, count in sorted(step.collectives.items()))
    return (
        *named,
        f"{program.peak_bytes / 1e9:.2f}",
        f"{(program.peak_bytes - program.argument_bytes) / 1e9:.2f}",
        f"{program.peak_bytes / step.placement.capacity.memory_bytes:.0%}",
        f"{step.num_tokens_left:,}",
        f"{program.flops / 1e9:,.0f}",
        f"{step.moved_bytes / 1e9:,.2f}",
        f"{step.moved_bytes / step.needed_bytes:.2f}",
        f"{1000 * step.estimated_seconds:,.1f}",
        collectives or "none",
        str(step.num_kernels),
        f"{step.seconds:.0f}",
    )


def notes(plan: Plan) -> Iterator[str]:
    """How to read the numbers of this plan."""
    yield f"These are limits of the hardware, not measurements: they leave out {LEFT_OUT}"
    yield (
        f"tokens, requests: all memory that weights and activations leave is cache (--kv-cache-memory); by itself the "
        f"engine takes {DEFAULT_CACHE_SHARE['xla']:.0%} of what weights leave. 80/20: the rule of thumb of {RULE} % "
        f"for weights and {100 - RULE} % for cache."
    )
    yield "decode: every request has its full length, so the cache that is read is at its largest."
    config = plan.source.config
    windows = sorted({window for window in config.windows if window is not None and window < plan.context})
    if windows:
        number = sum(window in windows for window in config.windows)
        yield (
            f"{number} of {config.num_layers} layers see {', '.join(map(str, windows))} tokens: steps read no more "
            "there, but the cache holds all tokens of a request in every layer."
        )
    if plan.source.checkpoint.quantization is not None and plan.source.checkpoint.tensors is UNREAD:
        yield "Which layers come quantized is assumed, without the tensors' headers: all but the head."
    yield from _chip_notes(plan)


def _chip_notes(plan: Plan) -> Iterator[str]:
    kv_heads = plan.source.config.num_kv_heads
    for speed in plan.speeds:
        place, topology = speed.placement, speed.placement.topology
        if topology.num_chips > kv_heads:
            copies = topology.num_chips // kv_heads
            yield f"{place.name}: each of {kv_heads} KV heads is held by {copies} chips."
        if topology.num_hosts > 1:
            yield f"{place.name}: {topology.num_hosts} hosts, one process on each."
    head_dim = plan.source.config.head_dim
    tpus = [
        place.accelerator.name
        for place in (speed.placement for speed in plan.speeds)
        if place.accelerator.name in aot.CHIPS and place.footprint is not None and place.footprint.pages is None
    ]
    if tpus and head_dim % LANES:
        room = -(-head_dim // LANES) * LANES
        yield (
            f"{', '.join(tpus)}: heads of {head_dim} numbers take the room of {room} in the tiles of a TPU, so that "
            f"the cache may take {room / head_dim:.2g} times as much as is counted here; --compile tells."
        )
    parts = [speed.placement.footprint for speed in plan.speeds]
    stored = {plan.cache_dtype, *(product.stored for part in parts if part for product in part.products)}
    lacking = [s.placement.accelerator.name for s in plan.speeds if "fp8" not in s.placement.accelerator.peak_flops]
    if lacking and torch.float8_e4m3fn in stored:
        yield f"{', '.join(lacking)}: no unit for fp8, values are converted to bfloat16; int8 takes as many bytes."
    if plan.source.dtype == torch.float32:
        yield "float32: the peak of bfloat16 is taken; give --dtype bfloat16 to halve weights and cache."


def to_dict(plan: Plan, compiled: Sequence[CompiledStep] = ()) -> dict[str, Any]:
    """Bytes, seconds, USD."""
    source = plan.source
    return {
        "model": source.name,
        "architecture": source.config.architecture,
        "num_parameters": plan.num_parameters,
        "weights": source.scheme,
        "dtype": dtype_name(source.dtype),
        "kv_cache_dtype": dtype_name(plan.cache_dtype),
        "kv_cache_has_scales": plan.cache_dtype in SCALED,
        "context": plan.context,
        "max_num_batched_tokens": plan.chunk,
        "placements": [_place_dict(each) for each in plan.placements],
        "speeds": [_speed_dict(each) for each in plan.speeds],
        "compiled": [each.to_dict() for each in compiled],
        "notes": list(notes(plan)),
    }


def _place_dict(placement: Placement) -> dict[str, Any]:
    found, part, topology = placement.capacity, placement.footprint, placement.topology
    named = {
        "accelerator": placement.accelerator.name,
        "topology": topology.name,
        "num_chips": topology.num_chips,
        "num_hosts": topology.num_hosts,
        "fits": placement.fits,
        "problems": list(placement.problems),
    }
    if found is None or part is None:
        return named
    return named | {
        "keeps_80_20": found.keeps_rule,
        "memory_bytes": found.memory_bytes,
        "weight_bytes": found.weight_bytes,
        "activation_bytes": found.activation_bytes,
        "page_size": part.page_size,
        "kv_bytes_per_token": part.kv_bytes_per_token,
        "cache_bytes": found.cache_bytes,
        "num_tokens": found.num_tokens,
        "num_requests": found.num_requests,
        "rule_tokens": found.rule_tokens,
        "rule_requests": found.rule_requests,
    }


def _speed_dict(speed: Speed) -> dict[str, Any]:
    return {
        "accelerator": speed.placement.accelerator.name,
        "topology": speed.placement.topology.name,
        "usd_per_chip_hour": speed.price.usd,
        "usd_per_hour": speed.usd_per_hour,
        "price_source": speed.price.source,
        "accelerator_sources": list(speed.placement.accelerator.sources),
        "decode": [{"batch": step.num_requests, **_step_dict([step], speed)} for step in speed.decode],
        "prefill": _step_dict(speed.prefill, speed),
    }


def _step_dict(steps: Sequence[Step], speed: Speed) -> dict[str, Any]:
    seconds, tokens = sum(step.seconds for step in steps), sum(step.num_tokens for step in steps)
    return {
        "num_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "usd_per_million_tokens": price_per_million(tokens / seconds, speed.usd_per_hour),
        "limit": max(steps, key=lambda step: step.seconds).limit,
        "memory_bytes": sum(step.memory_bytes for step in steps),
        "flops": sum(step.flops for step in steps),
        "interconnect_bytes": sum(step.interconnect_bytes for step in steps),
        "memory_seconds": sum(step.memory_seconds for step in steps),
        "compute_seconds": sum(step.compute_seconds for step in steps),
        "interconnect_seconds": sum(step.interconnect_seconds for step in steps),
    }
