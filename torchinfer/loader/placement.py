"""Which checkpoint tensor fills which part of which parameter, and what does not fit; no data is read.

A quantized matrix counts as one parameter, of the shape that it stands for, where it is quantized on the way; as its
tensors, `<parameter>.values` and so on, where the checkpoint has them.

The tables are the model's (torchinfer/weight_map.py). A model's expected names come from its parameters: a pattern
whose parameter a layer does not have (a bias, experts) expects nothing there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, nn

from torchinfer.device import dtype_name
from torchinfer.loader.header import TensorEntry, quoted, shorten
from torchinfer.parallel import WHOLE, Cut, Shard
from torchinfer.quantization import QuantizedMatrix
from torchinfer.quantization.source import Shape
from torchinfer.weight_map import Target

NUMBER = "0|[1-9][0-9]*"
PACKED_AT_ONCE_BYTES = 4 << 20  # of rows that must become float32 before they are packed
SOURCE_COPIES = 3  # that a format's conversion makes at most of the larger of a tensor and its result
LOADABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one checkpoint tensor goes: a whole parameter, or rows of it, of one expert or of all there is."""

    parameter: str
    expert: int | None = None
    rows: slice | None = None
    cut: Cut | None = None  # None: the tensor as a whole
    matrix: QuantizedMatrix | None = None  # that `parameter` is, and whose scheme the tensor is packed by
    convert: Callable[[Tensor], Tensor] | None = None  # what must see the whole tensor before it is placed
    copies: int = 1  # that `convert` makes at most, of the larger of the tensor and its result
    result_bytes: int = 0  # of what `convert` gives, where it is not the tensor in another order
    shapes: tuple[tuple[int, ...], ...] = ()  # that the tensor may have; empty: that of the part
    dtypes: tuple[torch.dtype, ...] = ()  # of the tensor; empty: those that the parameter's can be made of
    view: torch.dtype | None = None  # what the tensor's bytes are numbers of, if not of its own dtype
    columns: Tensor | None = None  # float32 [I]: what its columns are multiplied by before it is packed

    def part(self, parameter: Tensor, row_block: int = 1) -> Tensor:
        """The view of the parameter that the tensor fills; of another one that has a row for `row_block` of its."""
        if self.expert is not None:
            parameter = parameter[self.expert]
        if self.rows is None:
            return parameter
        return parameter[self.rows.start // row_block : -(-self.rows.stop // row_block)]

    def pack(self, rows: Tensor, into: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """Rows of the tensor as the matrix holds them; raises nothing where `matrix` is set. See `Scheme.pack`."""
        assert self.matrix is not None
        scheme = self.matrix.scheme
        if not self._packs_floats(rows.dtype):
            return scheme.pack(rows, into)
        into = scheme.empty(len(rows), rows.shape[1], rows.device) if into is None else into
        blocks = {name: spec.row_block or 1 for name, spec in self.matrix.specs.items()}
        count = self._rows_at_once(rows.shape[1])
        for first in range(0, len(rows), count):
            last = min(first + count, len(rows))
            parts = {name: into[name][first // block : -(-last // block)] for name, block in blocks.items()}
            scheme.pack(self._floats(rows[first:last]), parts)
        return into

    def temporary_bytes(self, entry: TensorEntry) -> int:
        """What it takes at most to convert and pack the tensor, beside its bytes and its place."""
        found = self.copies * max(entry.num_bytes, self.result_bytes) if self.convert is not None else 0
        if self.matrix is not None and self._packs_floats(entry.dtype):
            num_rows, num_columns = entry.shape
            found += min(num_rows, self._rows_at_once(num_columns)) * num_columns * torch.float32.itemsize
        return found

    def _floats(self, rows: Tensor) -> Tensor:
        """As float32, and with what its columns are multiplied by."""
        found = rows.to(torch.float32, copy=True)
        return found if self.columns is None else found.mul_(self.columns.to(rows.device))

    def _packs_floats(self, dtype: torch.dtype) -> bool:
        """Whether rows become float32 first: where they change, or where no kernel reads them as they are."""
        return self.columns is not None or dtype == torch.float64

    def _rows_at_once(self, num_columns: int) -> int:
        row_bytes = self.row_block * num_columns * torch.float32.itemsize
        return self.row_block * max(1, PACKED_AT_ONCE_BYTES // row_bytes)

    @property
    def row_block(self) -> int:
        """Rows that must be placed together."""
        return self.matrix.scheme.row_block if self.matrix is not None else 1

    def part_shape(self, shape: torch.Size) -> torch.Size:
        """Of `part` for a parameter of this shape. A view of a tensor takes ten times as long, and experts are many."""
        if self.expert is not None:
            shape = shape[1:]
        return shape if self.rows is None else torch.Size((len(range(shape[0])[self.rows]), *shape[1:]))

    def rows_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """First and last + 1 of the rows of the checkpoint tensor that must be read. A row is read as a whole, also
        where only some of its columns are taken: they are not together in the file."""
        return (self.cut.start, self.cut.stop) if self.cut and self.cut.dim == 0 else (0, shape[0])


def place(
    model: nn.Module, tensors: Mapping[str, TensorEntry], shard: Shard = WHOLE
) -> tuple[dict[str, Placement], list[str]]:
    """The placement of each checkpoint tensor to be read, by its name, and all that does not fit.

    With a `shard` the model has this process's shapes; where a parameter is smaller than the checkpoint's tensor, in
    one dimension, this process's part is cut out. A dimension that the model divides by less than `world` (few
    key-value heads) is held by several neighbours.

    A parameter with two names (tied) is filled from the first of them that the checkpoint has; the other's tensors
    are known and left out.
    """
    matrices = _matrices(model)
    state = _parameters(model, matrices)
    expected = _expected(model, matrices, state)
    chosen: dict[str, Placement] = {}
    missing: list[str] = []
    for names in tied_names(state):
        complete = [name for name in names if expected[name] and all(tensor in tensors for tensor in expected[name])]
        placements = expected[complete[0] if complete else names[0]]
        chosen |= {name: placement for name, placement in placements.items() if name in tensors}
        missing += [quoted(name) for name in placements if name not in tensors]
        if not placements:
            missing.append(
                f"a tensor for parameter {names[0]!r}, which {type(model).__name__}.CHECKPOINT does not name"
            )
    known = {name for placements in expected.values() for name in placements}
    unexpected = [quoted(name) for name in _unexpected(model, [name for name in tensors if name not in known])]
    problems = [*_listed(missing, "missing"), *_listed(unexpected, "unexpected")]
    is_quantized = any(matrix.sources for matrix in matrices.values())
    if missing and is_quantized:
        problems[0] += "; quantization_config says that they are there: download the checkpoint again, or correct it"
    if shard.world > 1 and is_quantized:
        problems.append(f"a checkpoint that comes quantized is read by one process, not divided among {shard.world}")
    cut = {name: _with_cut(placement, state, tensors[name], shard) for name, placement in chosen.items()}
    return cut, [*problems, *_unfit(cut, state, tensors)]


def tied_names(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor; more than one where it is tied."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _parameters(model: nn.Module, matrices: Mapping[str, QuantizedMatrix]) -> dict[str, Tensor]:
    """What is filled, by name: the state dict, but for quantized matrices that are packed on the way: those are one
    tensor, on meta, of the shape and dtype of what is packed."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, matrix in matrices.items():
        if not matrix.sources:
            for tensor in matrix.specs:
                del state[f"{name}.{tensor}"]
            state[name] = torch.empty(matrix.shape, device="meta")
    return state


def packed_matrices(model: nn.Module) -> dict[str, QuantizedMatrix]:
    """The matrices that are quantized while they are loaded, by name."""
    return {name: matrix for name, matrix in _matrices(model).items() if not matrix.sources}


def _matrices(model: nn.Module) -> dict[str, QuantizedMatrix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}


def expected_tensors(model: nn.Module) -> dict[str, dict[str, Placement]]:
    """Parameter -> checkpoint name -> placement, of everything that CHECKPOINT names."""
    matrices = _matrices(model)
    return _expected(model, matrices, _parameters(model, matrices))


def _expected(
    model: nn.Module, matrices: Mapping[str, QuantizedMatrix], state: Mapping[str, Tensor]
) -> dict[str, dict[str, Placement]]:
    expected: dict[str, dict[str, Placement]] = {parameter: {} for parameter in state}
    for name, placement in _all_placements(model, matrices, state):
        expected[placement.parameter][name] = placement
    for parameter, placements in expected.items():
        shape = state[parameter].shape
        filled = sum(placement.part_shape(shape).numel() for placement in placements.values())
        assert filled in (0, shape.numel()), f"CHECKPOINT and slots of {parameter} fill {filled} of {shape.numel()}"
    return expected


def _all_placements(
    model: nn.Module, matrices: Mapping[str, QuantizedMatrix], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Placement]]:
    table: Mapping[str, Target] = model.CHECKPOINT  # type: ignore[assignment]
    targets: dict[str, list[tuple[str, Target]]] = {}
    for pattern, target in table.items():
        targets.setdefault(target.parameter, []).append((pattern, target))
    shapes = {name: tensor.shape for name, tensor in state.items() if name.rpartition(".")[0] not in matrices}
    for parameter, shape in {**shapes, **{name: matrix.shape for name, matrix in matrices.items()}}.items():
        matrix = matrices.get(parameter)
        for own, numbers in _patterns(parameter):
            for pattern, target in targets.get(own, ()):
                rows = _rows(model, parameter, target)
                for name, expert in _names(pattern, numbers, shape):
                    placement = Placement(parameter, expert, rows, matrix=matrix, convert=target.transform)
                    if matrix is not None and matrix.sources:
                        yield from _sources(name, placement, matrix)
                    else:
                        yield name, placement


def _sources(name: str, placement: Placement, matrix: QuantizedMatrix) -> Iterator[tuple[str, Placement]]:
    """The tensors that a checkpoint which comes quantized has in place of `name`."""
    assert placement.convert is None, f"{name}: a tensor that is reordered cannot come quantized"
    rows = placement.rows or slice(0, matrix.shape[-2])
    part = [0, *accumulate(matrix.part_rows)].index(rows.start)
    for source in matrix.sources:
        spec = matrix.specs[source.tensor]
        block = spec.row_block
        own = slice(part, part + 1) if block is None else slice(rows.start // block, -(-rows.stop // block))
        shape = (own.stop - own.start, *spec.shape[1:])
        yield (
            name.removesuffix(".weight") + source.suffix,
            Placement(
                f"{placement.parameter}.{source.tensor}",
                placement.expert,
                own,
                convert=partial(_convert, source.convert, shape) if source.convert is not None else None,
                copies=SOURCE_COPIES,
                result_bytes=prod(shape) * spec.dtype.itemsize,
                shapes=source.shapes(rows.stop - rows.start) if source.shapes is not None else (),
                dtypes=source.dtypes,
                view=source.view,
            ),
        )


def _convert(convert: Callable[[Tensor, Shape], Tensor], shape: Shape, tensor: Tensor) -> Tensor:
    return convert(tensor, shape)


def _patterns(parameter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What a table may call a parameter, and the numbers in it: its own name, or one with `{layer}` for a number. To
    match each parameter with each pattern of the table would take as long as to read the headers."""
    yield parameter, {}
    for match in re.finditer(NUMBER, parameter):
        yield f"{parameter[: match.start()]}{{layer}}{parameter[match.end() :]}", {"layer": match[0]}


def _names(pattern: str, numbers: Mapping[str, str], shape: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
    """The checkpoint names that a pattern means for one parameter: one, or one for each expert."""
    for placeholder, number in numbers.items():
        pattern = pattern.replace(f"{{{placeholder}}}", number)
    if "{expert}" not in pattern:
        yield pattern, None
        return
    for expert in range(shape[0]):
        yield pattern.replace("{expert}", str(expert)), expert


def _rows(model: nn.Module, parameter: str, target: Target) -> slice | None:
    if target.slot is None:
        return None
    slots: Mapping[str, slice] = model.get_submodule(parameter.rpartition(".")[0]).slots  # type: ignore[assignment]
    return slots[target.slot]


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern)
    for placeholder in ("layer", "expert"):
        escaped = escaped.replace(rf"\{{{placeholder}\}}", f"(?P<{placeholder}>{NUMBER})")
    return re.compile(escaped)


def _unexpected(model: nn.Module, unknown: list[str]) -> list[str]:
    ignored: Iterable[str] = model.IGNORED  # type: ignore[assignment]
    regexes = [_regex(pattern) for pattern in ignored] if unknown else []
    return [name for name in unknown if not any(regex.fullmatch(name) for regex in regexes)]


def _with_cut(placement: Placement, state: Mapping[str, Tensor], entry: TensorEntry, shard: Shard) -> Placement:
    """The placement with this process's part, if the tensor is divided. What does not divide evenly stays whole, and
    is found to be of the wrong shape."""
    if shard.world == 1:
        return placement
    local, full = placement.part_shape(state[placement.parameter].shape), entry.shape
    differing = [dim for dim, (a, b) in enumerate(zip(local, full, strict=False)) if a != b]
    if len(local) != len(full) or len(differing) != 1 or placement.convert is not None:
        return placement
    dim = differing[0]
    num_parts, rest = divmod(full[dim], max(local[dim], 1))
    if rest or shard.world % num_parts:
        return placement
    return replace(placement, cut=Cut(dim, 0, local[dim]).of(shard, full[dim]))


def _unfit(
    chosen: Mapping[str, Placement], state: Mapping[str, Tensor], tensors: Mapping[str, TensorEntry]
) -> list[str]:
    shapes, dtypes = [], []
    for name, placement in chosen.items():
        parameter, entry = state[placement.parameter], tensors[name]
        needed_shapes = placement.shapes or (_shape_of(placement, parameter, entry),)
        if entry.shape not in needed_shapes:
            listed = " or ".join(str(list(shape)) for shape in needed_shapes)
            shapes.append(f"{quoted(name)} has {list(entry.shape)}, the model needs {listed}")
        if placement.dtypes:
            if entry.dtype not in placement.dtypes:
                needed = " or ".join(map(dtype_name, placement.dtypes))
                dtypes.append(f"{quoted(name)} has {dtype_name(entry.dtype)}, {needed} is needed")
        elif parameter.is_floating_point() and entry.dtype not in LOADABLE:
            dtypes.append(
                f"{quoted(name)} has {dtype_name(entry.dtype)}, float16, bfloat16, float32 or float64 is needed"
            )
        elif not parameter.is_floating_point() and entry.dtype != parameter.dtype:
            dtypes.append(f"{quoted(name)} has {dtype_name(entry.dtype)}, {dtype_name(parameter.dtype)} is needed")
    return [*_listed(shapes, "of the wrong shape"), *_listed(dtypes, "of the wrong dtype")]


def _shape_of(placement: Placement, parameter: Tensor, entry: TensorEntry) -> tuple[int, ...]:
    """What fills the part, in the tensor's own dtype and with what others cut out of it."""
    shape = list(placement.part_shape(parameter.shape))
    if placement.cut:
        shape[placement.cut.dim] = entry.shape[placement.cut.dim]
    if placement.view is not None:
        shape[-1] = shape[-1] * placement.view.itemsize // placement.dtypes[0].itemsize
    return tuple(shape)


def _listed(items: list[str], what: str) -> list[str]:
    """One line for all tensors with the same fault."""
    if not items:
        return []
    return [f"{len(items)} {'tensor' if len(items) == 1 else 'tensors'} {what}: {'; '.join(shorten(items))}"]
