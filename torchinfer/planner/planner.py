"""Where a model fits, and how fast it may be there: each kind of chip, up to the smallest topology that fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from torchinfer import aot
from torchinfer.errors import ConfigError, TorchinferError, raise_all
from torchinfer.kv_cache.tensors import SCALED, kernel_pages, resolve_cache_dtype, resolve_page_size
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import partition_problems
from torchinfer.planner.accelerators import ACCELERATORS, Accelerator, Topology
from torchinfer.planner.capacity import Capacity, capacity
from torchinfer.planner.footprint import Footprint, footprint
from torchinfer.planner.options import ALL, PlanOptions
from torchinfer.planner.prices import Price, price_of
from torchinfer.planner.roofline import Step, decode_step, prefill_steps
from torchinfer.planner.source import HOST, ModelSource, read_source

DEFAULT_CONTEXT = 4096
BATCHES = (1, 8, 64)  # and the most that fit


@dataclass(frozen=True, slots=True)
class Placement:
    """A model on a topology. Without `capacity` its sizes do not divide among the chips: `problems` says which."""

    accelerator: Accelerator
    topology: Topology
    problems: tuple[str, ...]
    footprint: Footprint | None = None
    capacity: Capacity | None = None

    @property
    def fits(self) -> bool:
        """At least one request of the asked length."""
        return self.capacity is not None and self.capacity.num_requests > 0

    @property
    def is_roomy(self) -> bool:
        """Fits, and keeps the 80/20 rule."""
        return self.fits and self.capacity is not None and self.capacity.keeps_rule

    @property
    def name(self) -> str:
        """v5e 2x4, 2 x h100."""
        topology, kind = self.topology.name, self.accelerator.name
        return f"{kind} {topology}" if "x" in topology else f"{topology} x {kind}"


@dataclass(frozen=True, slots=True)
class Speed:
    """Least times of a placement's steps, and what a chip costs."""

    placement: Placement
    price: Price
    decode: tuple[Step, ...]  # of growing batches, the last as large as fits
    prefill: tuple[Step, ...]  # of one request but for its last token

    @property
    def usd_per_hour(self) -> float:
        return self.price.usd * self.placement.topology.num_chips


@dataclass(frozen=True, slots=True)
class Plan:
    """What `torchinfer plan` tells."""

    source: ModelSource
    num_parameters: int
    cache_dtype: torch.dtype
    context: int
    chunk: int
    placements: tuple[Placement, ...]
    speeds: tuple[Speed, ...]  # one a kind of chip: of the topology that was asked for, or the smallest that fits


def plan(options: PlanOptions) -> Plan:
    """Work out where a model fits.

    Raises:
        CheckpointError: there is no config.json, or it is not JSON.
        UnsupportedModelError: with everything in it that this library cannot compute.
        ConfigError: options that cannot be honoured, all at once; or the model fits nothing that was asked for.
    """
    is_tpu = (options.dtype == "auto" or options.compile) and any(map(num_cores, _kinds(options)))
    source = read_source(options.model, options.dtype, options.quantization, options.expert_parallel, is_tpu)
    cache_dtype = resolve_cache_dtype(options.kv_cache_dtype, source.dtype, HOST)
    raise_all(list(_problems(options, source.config, cache_dtype)), ConfigError, "cannot plan")
    num_parameters = source.build(source.config).num_parameters()  # also shows what is wrong on any number of chips
    context = options.context or min(DEFAULT_CONTEXT, source.config.context_length)
    place = _Placer(source, cache_dtype, options.page_size, context, options.max_num_batched_tokens)
    kinds = _kinds(options)
    placements = {kind.name: _placements(kind, options.topology, place) for kind in kinds}
    chosen = [each for each in map(smallest, placements.values()) if each is not None]
    if not chosen:
        raise ConfigError(_too_big(place, [each for found in placements.values() for each in found]))
    return Plan(
        source=source,
        num_parameters=num_parameters,
        cache_dtype=cache_dtype,
        context=context,
        chunk=options.max_num_batched_tokens,
        placements=tuple(each for found in placements.values() for each in found),
        speeds=tuple(_speed(each, place, options.price) for each in chosen),
    )


@dataclass(slots=True)
class _Placer:
    """Puts one model on topologies; a number of chips is looked at once."""

    source: ModelSource
    cache_dtype: torch.dtype
    page_size: int | None
    context: int
    chunk: int
    _parts: dict[tuple[int, int | None], Footprint | str] = field(default_factory=dict)

    def __call__(self, accelerator: Accelerator, topology: Topology) -> Placement:
        problems = partition_problems(self.source.config, topology.num_chips)
        part = None if problems else self._part(topology.num_chips, num_cores(accelerator))
        if part is None or isinstance(part, str):
            return Placement(accelerator, topology, tuple(problems or [str(part)]))
        return Placement(accelerator, topology, (), part, capacity(part, accelerator, self.context, self.chunk))

    def _part(self, num_chips: int, num_cores: int | None) -> Footprint | str:
        """One chip's, or why its scheme does not fit the shapes there."""
        key = (num_chips, num_cores)
        if key not in self._parts:
            try:
                self._parts[key] = footprint(self.source, num_chips, self.cache_dtype, self.page_size, num_cores)
            except TorchinferError as error:
                self._parts[key] = f"divided by {num_chips} chips, {error}"
        return self._parts[key]


def num_cores(accelerator: Accelerator) -> int | None:
    """Of a TPU chip, for which there are kernels; None for others."""
    return aot.CHIPS[accelerator.name].num_cores if accelerator.name in aot.CHIPS else None


def smallest(placements: Sequence[Placement]) -> Placement | None:
    """The first that fits and keeps the 80/20 rule, or else that fits."""
    fitting = [each for each in placements if each.fits]
    return next((each for each in fitting if each.is_roomy), fitting[0] if fitting else None)


def _placements(kind: Accelerator, topology: str | None, place: _Placer) -> list[Placement]:
    """On the topology that was asked for, or on all up to the smallest that fits."""
    if topology is not None:
        return [place(kind, kind.topology(topology))]
    found: list[Placement] = []
    for each in kind.topologies:
        found.append(place(kind, each))
        if found[-1].is_roomy:
            return found
    while len(found) > 1 and found[-1].problems:  # hundreds of chips for a model with tens of heads
        found.pop()
    return found


def _kinds(options: PlanOptions) -> list[Accelerator]:
    """Those that were asked for, and have the topology."""
    kinds = list(ACCELERATORS.values()) if options.accelerator == ALL else [ACCELERATORS[options.accelerator]]
    return [kind for kind in kinds if options.topology is None or kind.has(options.topology)]


def _problems(options: PlanOptions, config: ModelConfig, cache_dtype: torch.dtype) -> Iterator[str]:
    context, price, page_size = options.context, options.price, options.page_size
    if context is not None and not 2 <= context <= config.context_length:
        yield (
            f"context={context} must be from 2 to the model's {config.context_length} tokens (max_position_embeddings "
            "with its rope scaling)"
        )
    if price is not None and not 0 < price < math.inf:
        yield f"price={price} must be a positive number, USD for a chip and hour"
    if options.max_num_batched_tokens < 1:
        yield f"max_num_batched_tokens={options.max_num_batched_tokens} must be at least 1"
    if page_size is not None and (page_size < 1 or page_size & (page_size - 1)):
        yield f"page_size={page_size} must be a power of two"
    else:
        yield from _page_problems(options, config, cache_dtype)
    yield from (f"batch={batch} must be at least 1" for batch in options.batch if batch < 1)
    repeated = sorted({batch for batch in options.batch if options.batch.count(batch) > 1})
    if repeated:
        yield f"batch has {', '.join(map(str, repeated))} more than once: name each decode step once"
    if not 0 < options.compile_seconds < math.inf:
        yield f"compile_seconds={options.compile_seconds} must be a positive number, seconds for each program"
    if options.topology is not None:
        yield from _topology_problems(options, options.topology, config)


def _page_problems(options: PlanOptions, config: ModelConfig, cache_dtype: torch.dtype) -> Iterator[str]:
    cores = next((number for number in map(num_cores, _kinds(options)) if number is not None), None)
    try:
        resolve_page_size(options.page_size, kernel_pages(config, cache_dtype, cores))
    except ConfigError as error:
        yield str(error)


def _topology_problems(options: PlanOptions, topology: str, config: ModelConfig) -> Iterator[str]:
    """It does not exist, or the model's sizes do not divide among its chips."""
    kinds = _kinds(options)
    if not kinds:
        asked = [kind for kind in ACCELERATORS.values() if options.accelerator in (ALL, kind.name)]
        known = "; ".join(f"{kind.name}: {', '.join(each.name for each in kind.topologies)}" for kind in asked)
        yield f"topology={topology!r} does not exist; use one of {known}"
    for kind in kinds:
        problems = partition_problems(config, kind.topology(topology).num_chips)
        if problems:
            dividing = [each.name for each in kind.topologies if not partition_problems(config, each.num_chips)]
            way_out = f"use {' or '.join(dividing)}" if dividing else f"no topology of {kind.name} divides it"
            yield f"topology={topology!r} of {kind.name}: {', '.join(problems)}: {way_out}"


def _too_big(place: _Placer, tried: Sequence[Placement]) -> str:
    """Why nothing fits, where it would, and what makes the model smaller."""
    source = place.source
    lines = [f"{source.name} ({source.scheme}) does not fit:"]
    for each in tried:
        lines.append(f"  - {each.name}: {', '.join(each.problems) or _shortage(each, place.context)}")
    fitting = [smallest(_placements(kind, None, place)) for kind in ACCELERATORS.values()]
    names = [each.name for each in fitting if each is not None]
    lines.append(f"the smallest that fit: {', '.join(names)}" if names else "no topology of any accelerator holds it")
    ways = ["a shorter --context"]
    if place.cache_dtype not in SCALED:
        ways.insert(0, "--kv-cache int8")
    if source.quantization is None and source.checkpoint.quantization is None:
        ways.insert(0, "--quantization int8 or int4")
    lines.append(f"or make it smaller: {', '.join(ways)}")
    return "\n".join(lines)


def _shortage(placement: Placement, context: int) -> str:
    found = placement.capacity
    assert found is not None
    return (
        f"a chip has {found.memory_bytes / 1e9:.2f} GB, and weights take {found.weight_bytes / 1e9:.2f} GB, "
        f"activations {found.activation_bytes / 1e9:.2f} GB, the cache of one request of {context:,} tokens "
        f"{found.request_bytes / 1e9:.2f} GB"
    )


def _speed(placement: Placement, place: _Placer, price: float | None) -> Speed:
    part, found, kind = placement.footprint, placement.capacity, placement.accelerator
    assert part is not None and found is not None
    most = found.num_requests
    return Speed(
        placement,
        price_of(kind.name, price),
        tuple(decode_step(part, kind, batch, place.context) for batch in (*(b for b in BATCHES if b < most), most)),
        tuple(prefill_steps(part, kind, place.context - 1, place.chunk)),
    )
