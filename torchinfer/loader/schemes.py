"""Which matrices of a model are held in which scheme: put into the model before it is loaded.

A request is the name of a scheme, for every matrix but the kept ones, or a mapping from patterns to names. Patterns
are those of fnmatch, on the checkpoint's names of layers ("model.layers.*.mlp.*", "lm_head"); the first that fits
counts. Routers and embeddings are always kept as they are, the head unless a pattern names it without a wildcard. Where
the head is the table of embeddings, what is quantized is a copy of it (`Decoder.copy_table`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from torchinfer.device import dtype_name, has_dtype
from torchinfer.errors import ConfigError, raise_all
from torchinfer.loader.header import quoted, shorten
from torchinfer.loader.placement import Placement, expected_tensors
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import Linear
from torchinfer.models.moe import Experts
from torchinfer.quantization import SCHEMES, QuantizedMatrix, Scheme, Source

logger = logging.getLogger(__name__)

NONE = "none"
ALL = "*"  # what is left; that may be nothing
HEAD = "lm_head"
TABLE = "embedding.weight"


@dataclass(frozen=True, slots=True)
class MatrixName:
    """A matrix of a model, and what the checkpoint calls the layers that were merged into it."""

    parameter: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]  # the checkpoint's names, without ".weight"
    part_rows: tuple[int, ...]
    is_reordered: bool  # the checkpoint has its rows in another order


def quantize_model(model: Decoder, request: str | Mapping[str, str], device: torch.device) -> None:
    """Replace the matrices of a model (on meta) by quantized ones, to be packed while they are loaded.

    Raises:
        ConfigError: with every name, pattern and shape that does not fit.
    """
    for matrix, scheme in choose_schemes(model, request, device):
        if matrix.parameter == TABLE:
            model.head_scheme = scheme
            logger.info("quantization: the head is a copy of the embeddings in %s", scheme.name)
        else:
            hold(model, matrix, scheme)
    logger.info("%s", describe(model))


def choose_schemes(
    model: Decoder, request: str | Mapping[str, str], device: torch.device
) -> list[tuple[MatrixName, Scheme]]:
    """The matrices that a request quantizes; raises as `quantize_model`."""
    patterns = {ALL: request} if isinstance(request, str) else dict(request)
    raise_all(_unknown(patterns), ConfigError, "quantization")
    matrices = list(matrices_of(model))
    if model.head is None:
        shape = tuple(model.embedding.weight.shape)
        matrices.append(MatrixName(TABLE, shape, (HEAD,), shape[:1], is_reordered=False))
    chosen, problems = _choose(matrices, patterns)
    problems += _misfits(chosen)
    problems += unsupported({scheme.values for _, scheme in chosen}, device)
    raise_all(shorten(problems), ConfigError, f"quantization={request!r}")
    return chosen


def matrices_of(model: nn.Module) -> Iterator[MatrixName]:
    """The matrices that can be quantized."""
    for parameter, placements in expected_tensors(model).items():
        owner = model.get_submodule(parameter.rpartition(".")[0])
        is_matrix = parameter.endswith(".weight") if isinstance(owner, Linear) else isinstance(owner, Experts)
        if not is_matrix or (isinstance(owner, Linear) and owner.is_router):
            continue
        shape = tuple(owner.get_parameter(parameter.rpartition(".")[2]).shape)
        layers = tuple(name.removesuffix(".weight") for name in placements)
        is_reordered = any(placement.convert is not None for placement in placements.values())
        yield MatrixName(parameter, shape, layers, _part_rows(placements, shape[-2]), is_reordered)


def hold(model: nn.Module, matrix: MatrixName, scheme: Scheme, sources: tuple[Source, ...] = ()) -> None:
    """Let a model hold a matrix as a scheme does."""
    module, _, attribute = matrix.parameter.rpartition(".")
    owner = model.get_submodule(module)
    delattr(owner, attribute)
    with torch.device("meta"):
        setattr(owner, attribute, QuantizedMatrix(matrix.shape, scheme, matrix.part_rows, sources))


def describe(model: nn.Module) -> str:
    """One line: how many matrices are held in which scheme, and their bytes."""
    sizes: dict[str, tuple[int, int]] = {}
    for module in model.modules():
        if isinstance(module, QuantizedMatrix):
            count, size = sizes.get(module.scheme.name, (0, 0))
            own = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
            sizes[module.scheme.name] = (count + 1, size + own)
    kept = sum(parameter.numel() for parameter in model.parameters())
    held = ", ".join(f"{name} {count} matrices, {size / 1e6:,.1f} MB" for name, (count, size) in sizes.items())
    return f"quantization: {held or 'none'}; {kept / 1e6:,.1f} M other numbers stay as they are"


def _part_rows(placements: Mapping[str, Placement], num_rows: int) -> tuple[int, ...]:
    parts = {(placement.rows.start, placement.rows.stop) for placement in placements.values() if placement.rows}
    return tuple(stop - start for start, stop in sorted(parts)) or (num_rows,)


def _unknown(patterns: Mapping[str, str]) -> list[str]:
    known = ", ".join([NONE, *SCHEMES])
    found = [f"scheme {name!r} of {pattern!r} is unknown" for pattern, name in patterns.items()]
    found = [text for text, name in zip(found, patterns.values(), strict=True) if name not in (NONE, *SCHEMES)]
    return [f"{text}; use one of: {known}" for text in found]


def _choose(
    matrices: list[MatrixName], patterns: Mapping[str, str]
) -> tuple[list[tuple[MatrixName, Scheme]], list[str]]:
    """The scheme of each matrix that gets one, and what is wrong with the patterns."""
    chosen, problems, used = [], [], set()
    for matrix in matrices:
        fitting = {_pattern_of(layer, patterns) for layer in matrix.layers}
        used |= fitting
        names = sorted({patterns.get(pattern, NONE) if pattern else NONE for pattern in fitting})
        if len(names) > 1:
            problems.append(
                f"{', '.join(map(quoted, matrix.layers[:3]))} are one matrix here and must have one scheme, not "
                f"{' and '.join(names)}"
            )
        elif names[0] != NONE:
            chosen.append((matrix, SCHEMES[names[0]]))
    layers = [layer for matrix in matrices for layer in matrix.layers]
    unused = [pattern for pattern in patterns if pattern not in used and pattern != ALL]
    return chosen, problems + [_why_unused(pattern, patterns, layers) for pattern in unused]


def _why_unused(pattern: str, patterns: Mapping[str, str], layers: list[str]) -> str:
    fitting = [layer for layer in layers if fnmatchcase(layer, pattern)]
    if not fitting:
        return (
            f"no layer's name fits pattern {pattern!r}; names are such as {', '.join(map(quoted, layers[:2]))}; "
            "embeddings, norms and routers are not quantized"
        )
    takers = {_pattern_of(layer, patterns) for layer in fitting} - {None}
    if not takers:
        return f"pattern {pattern!r} has no effect: the head is quantized only where {HEAD!r} names it"
    return (
        f"pattern {pattern!r} has no effect: all layers that it fits, such as {quoted(fitting[0])}, are taken by "
        f"{', '.join(sorted(map(repr, takers)))}: put it ahead, or leave it out"
    )


def _pattern_of(layer: str, patterns: Mapping[str, str]) -> str | None:
    return next((p for p in patterns if p == layer or (layer != HEAD and fnmatchcase(layer, p))), None)


def _misfits(chosen: list[tuple[MatrixName, Scheme]]) -> list[str]:
    """Why matrices cannot be held in their schemes; one line for all with the same reason."""
    layers: dict[str, list[str]] = {}
    for matrix, scheme in chosen:
        for problem in scheme.problems(matrix.part_rows, matrix.shape[-1]):
            layers.setdefault(f"as {scheme.name}: {problem}", []).append(matrix.layers[0])
    return [
        f"{quoted(names[0])}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {reason}"
        for reason, names in layers.items()
    ]


def unsupported(dtypes: set[torch.dtype], device: torch.device, way_out: str = "use int8") -> list[str]:
    """The dtypes that this torch does not have on the device, as problems."""
    return [
        f"{dtype_name(dtype)} does not work on {device.type} with torch {torch.__version__}: {way_out}"
        for dtype in sorted(dtypes, key=str)
        if not has_dtype(dtype, device)
    ]
