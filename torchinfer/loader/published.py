"""Checkpoints that come quantized: the model's matrices are held as the checkpoint has them, before it is loaded.

Tensors beside them that hold nothing to compute with are left out; those that tools write as zeros for what a model
does not have are read, and must be zeros.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import nn

from torchinfer.errors import CheckpointError, raise_all
from torchinfer.loader.checkpoint import HEADER_READERS, Checkpoint
from torchinfer.loader.header import quoted, shorten
from torchinfer.loader.placement import expected_tensors
from torchinfer.loader.schemes import MatrixName, describe, hold, matrices_of, unsupported
from torchinfer.quantization import Scheme, Source
from torchinfer.quantization.formats import Format, read_format
from torchinfer.quantization.formats.layout import Check

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Published:
    """What a checkpoint holds besides its weights: what is left out of it, and what must be looked at first."""

    checkpoint: Checkpoint
    checks: Mapping[str, Check]  # of tensors that are left out
    summary: str


def hold_published(model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> Checkpoint:
    """Let a model (on meta) hold its matrices as the checkpoint does; the checkpoint without what is left out of it.

    Raises:
        UnsupportedModelError: quantization_config has what is unknown or not supported here.
        CheckpointError: layers cannot be held so, or tensors that are left out would change something.
    """
    published, problems = plan_published(model, checkpoint, device)
    raise_all(shorten(problems), CheckpointError, f"{checkpoint.address} comes quantized")
    _verify(checkpoint, published.checks)
    logger.info("%s; %s", published.summary, describe(model))
    return published.checkpoint


def plan_published(
    model: nn.Module, checkpoint: Checkpoint, device: torch.device | None = None
) -> tuple[Published, list[str]]:
    """The same without reading a tensor, and what does not fit.

    Raises:
        UnsupportedModelError: quantization_config has what is unknown or not supported here.
    """
    found = read_format(checkpoint.quantization, {name: entry.dtype for name, entry in checkpoint.tensors.items()})
    for note in found.notes:
        logger.info("%s: %s", found.method, note)
    held, kept, problems = _layouts(list(matrices_of(model)), found)
    if device is not None:
        dtypes = {scheme.values for _, scheme, _ in held}
        problems += unsupported(dtypes, device, "use another device, or an unquantized copy of the checkpoint")
    for matrix, scheme, sources in held:
        hold(model, matrix, scheme, sources)
    layers = [layer for matrix, _, _ in held for layer in matrix.layers]
    skipped, checks = _left_out(model, checkpoint, found, layers)
    tensors = {name: entry for name, entry in checkpoint.tensors.items() if name not in skipped}
    summary = _summary(found, [scheme for _, scheme, _ in held], kept)
    return Published(replace(checkpoint, tensors=tensors), checks, summary), problems


_Held = tuple[MatrixName, Scheme, tuple[Source, ...]]


def _layouts(matrices: list[MatrixName], found: Format) -> tuple[list[_Held], list[str], list[str]]:
    """Matrices with their schemes, layers that are not quantized, and problems."""
    held: list[_Held] = []
    kept: list[str] = []
    problems: list[str] = []
    for matrix in matrices:
        recipes = {layer: found.recipe(layer) for layer in matrix.layers}
        recipe = recipes[matrix.layers[0]]
        own = _disagreements(recipes, matrix)
        if recipe is None and not own:
            kept += matrix.layers
        elif recipe is not None and not own:
            columns = matrix.shape[-1]
            own = [f"{quoted(matrix.layers[0])}: {text}" for text in recipe.problems(matrix.part_rows, columns)]
            if not own:
                scheme, sources = recipe.layout(matrix.part_rows, columns)
                own = _unheld(matrix, scheme)
                held += [] if own else [(matrix, scheme, sources)]
        problems += own
    return held, kept, problems


def _disagreements(recipes: Mapping[str, object], matrix: MatrixName) -> list[str]:
    """Layers that are one matrix here must be quantized alike."""
    first = matrix.layers[0]
    other = next((layer for layer, recipe in recipes.items() if recipe != recipes[first]), None)
    if other is None:
        return []
    both = " and ".join(f"{quoted(name)} ({recipes[name] or 'not quantized'})" for name in (first, other))
    return [f"{both} are one matrix here and must be quantized alike: take another copy of the checkpoint"]


def _unheld(matrix: MatrixName, scheme: Scheme) -> list[str]:
    found = []
    if matrix.is_reordered:
        found.append(
            f"{quoted(matrix.layers[0])} has its outputs in another order than here, and quantized ones are not "
            "reordered: take an unquantized copy of the checkpoint"
        )
    if scheme.input_bound is not None and len(matrix.shape) > 2:
        found.append(
            f"{quoted(matrix.layers[0])}: experts with activation_scale_ub are not supported: take an "
            "unquantized copy of the checkpoint"
        )
    return found


def _left_out(
    model: nn.Module, checkpoint: Checkpoint, found: Format, layers: Iterable[str]
) -> tuple[set[str], dict[str, Check]]:
    """Tensors that are not placed, and how those of them that must be looked at are checked."""
    wanted = {name for placements in expected_tensors(model).values() for name in placements}
    skipped: set[str] = set()
    checks: dict[str, Check] = {}
    for layer in layers:
        skipped |= {layer + suffix for suffix in found.skipped}
        checks |= {layer + suffix: check for suffix, check in found.checks.items()}
    checks = {name: check for name, check in checks.items() if name in checkpoint.tensors and name not in wanted}
    if found.skipped_names is not None:
        pattern = re.compile(found.skipped_names)
        skipped |= {name for name in checkpoint.tensors if pattern.fullmatch(name)}
    return (skipped | checks.keys()) - wanted, checks


def _verify(checkpoint: Checkpoint, checks: Mapping[str, Check]) -> None:
    """Side by side: they are small, and over a network each is a round trip."""
    stop = threading.Event()

    def problem(name: str) -> str | None:
        text = checks[name](checkpoint.read(name, stop))
        return None if text is None else f"tensor {quoted(name)} {text}"

    with ThreadPoolExecutor(HEADER_READERS, "check") as pool:
        try:
            problems = [text for text in pool.map(problem, checks) if text is not None]
        finally:
            stop.set()  # after an error or Ctrl-C nobody waits for what is left
    raise_all(shorten(problems), CheckpointError, f"{checkpoint.address} comes quantized")


def _summary(found: Format, schemes: list[Scheme], kept: list[str]) -> str:
    counts = Counter(scheme.name for scheme in schemes)
    held = ", ".join(f"{name} in {count} matrices" for name, count in counts.items())
    rest = f"; as they are: {', '.join(shorten(kept, 4))}" if kept else ""
    return f"{found.method}: {held or 'no matrix'}{rest}"
