"""How a model is divided among chips by tensor parallelism (arXiv 1909.08053): the one place that says it.

Each chip computes a model of its own sizes (`local_config`), built from the same modules as the whole one:

    column-parallel   q, k and v by heads; gate, up (also each expert's) by intermediate size; embedding, head by rows
    row-parallel      attention's output, down: by inputs, so that each chip has a part of a sum
    replicated        norms, routers; key-value heads, by neighbours, where they are fewer than chips
    on one chip       biases of row-parallel layers: the others add zeros to the sum

Experts are divided within: then every chip has the same work, whatever the router says. With `expert_parallel` chips
have some of them each, whole, and compute what their experts add to the same sum, so that no token travels either.
Which dimension of a tensor is cut follows from the sizes: it is the one in which a chip's is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchinfer.errors import ConfigError, raise_all
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import Linear
from torchinfer.models.moe import Experts, MoE
from torchinfer.quantization import QuantizedMatrix
from torchinfer.spmd import REPLICATED

REDUCED = ("attention.output", "mlp")  # ends of the names of modules whose results are parts of a sum
BY_VOCABULARY = ("embedding.", "head.")  # names of what has a row for each token id; the last chip's are padded


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model a process or a chip holds, of `world` that divide its tensors."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"rank={self.rank} of world={self.world} must be in [0, {self.world})")


WHOLE = Shard()


@dataclass(frozen=True, slots=True)
class Cut:
    """The part [start, stop) of a tensor along a dimension that a process or a chip takes."""

    dim: int
    start: int
    stop: int

    def of(self, shard: Shard, size: int) -> Cut:
        """The part of another one, of a tensor with `size` in this dimension. Parts are of one size; where they are
        fewer than there are to take them, neighbours have the same."""
        length = self.stop - self.start
        start = shard.rank * (size // max(length, 1)) // shard.world * length
        return Cut(self.dim, start, start + length)


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix that was merged into another one: its place along the dimension that is cut, and a chip's share."""

    start: int
    size: int
    share: int


@dataclass(frozen=True, slots=True)
class Division:
    """How a tensor of a model is divided among chips: along `dim`, from each part a share, in the order of the parts.

    What all chips have together, one behind the other along `dim`, is a tensor too: larger than the whole one where
    neighbours have the same heads, and with q, k and v of a chip side by side.
    """

    dim: int | None = None  # None: every chip has all of it
    parts: tuple[Part, ...] = ()
    is_on_first_only: bool = False  # the others have zeros

    @property
    def place(self) -> int:
        """The dimension along which chips' tensors make one tensor; REPLICATED if all have the same."""
        if self.is_on_first_only:
            return 0
        return REPLICATED if self.dim is None else self.dim

    def of(self, whole: Tensor, shard: Shard) -> Tensor:
        """What a chip has; a view where that is possible. Rows that the whole one lacks are zeros."""
        if self.is_on_first_only:
            return whole if shard.rank == 0 else torch.zeros_like(whole)
        if self.dim is None:
            return whole
        pieces = [self._share(whole, part, shard) for part in self.parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def _share(self, whole: Tensor, part: Part, shard: Shard) -> Tensor:
        assert self.dim is not None
        cut = Cut(self.dim, 0, part.share).of(shard, part.size)
        end = whole.shape[self.dim]
        start, stop = min(part.start + cut.start, end), min(part.start + cut.stop, end)
        piece = whole.narrow(self.dim, start, stop - start)
        if stop - start == part.share:
            return piece
        padding = [0, 0] * (whole.ndim - 1 - self.dim) + [0, part.share - (stop - start)]
        return functional.pad(piece, padding)


@dataclass(slots=True)
class DividedModel:
    """A model on meta that is to be loaded, and a chip's part of it, on meta too, which computes with `tensors`."""

    whole: Decoder
    local: Decoder
    num_chips: int
    divisions: dict[str, Division] = field(init=False)  # of parameters and buffers of `local`
    num_parameters: int = field(init=False)  # of the whole
    tensors: dict[str, Tensor] = field(default_factory=dict)  # what all chips have together

    def __post_init__(self) -> None:
        self.num_parameters = self.whole.num_parameters()
        self._number("embedding", "first_row", self.local.config.vocab_size)
        for name, module in self.local.named_modules():
            if isinstance(module, MoE) and module.config.num_chips > 1:
                self._number(name, "first_expert", module.config.num_experts_here)
        tensors = tensors_of(self.whole)
        self.divisions = {
            name: _division(name, self, tensors[name], share) for name, share in tensors_of(self.local).items()
        }

    def _number(self, module: str, buffer: str, size: int) -> None:
        """Say of each chip where what it has begins, in a buffer: of each so many, one behind the other."""
        first = torch.arange(self.num_chips, dtype=torch.int32) * size
        setattr(self.whole.get_submodule(module), buffer, first)
        setattr(self.local.get_submodule(module), buffer, first[:1])

    @property
    def share_bytes(self) -> int:
        """What a chip has of `tensors`."""
        places = {name: division.place for name, division in self.divisions.items()}
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in self.tensors.items()}
        return sum(size if places[name] == REPLICATED else size // self.num_chips for name, size in sizes.items())


def divide(whole: Decoder, num_chips: int) -> DividedModel:
    """Divide a model without `partition_problems`, whose matrices are held in their schemes already.

    Raises:
        ConfigError: scales that several rows or columns share cannot be divided so, with all such matrices; or the
            head is a copy of the table.
    """
    refuse_copy(whole)
    config, moe = local_config(whole.config, num_chips), whole.config.moe
    with torch.device("meta"):
        local = build_model(config) if moe is None else build_model(config, moe.mode, moe.capacity_factor)
        for name, matrix in _matrices(whole):
            module, _, attribute = name.rpartition(".")
            owner = local.get_submodule(module)
            shape = tuple(getattr(owner, attribute).shape)
            parts = [part.stop - part.start for part in _slots(owner, attribute)] or [shape[-2]]
            delattr(owner, attribute)
            setattr(owner, attribute, QuantizedMatrix(shape, matrix.scheme, tuple(parts)))
    _check_schemes(whole, local, num_chips)
    return DividedModel(whole, local.eval(), num_chips)


def refuse_copy(whole: Decoder) -> None:
    """Raise ConfigError where the head is to be a quantized copy of the table of embeddings."""
    if whole.head_scheme is not None:
        raise ConfigError(
            f"quantization: lm_head={whole.head_scheme.name} of a model whose head is its table of embeddings is for "
            "one chip; leave the pattern out, or use one chip"
        )


def connect(local: Decoder, reduce: Callable[[Tensor], Tensor]) -> None:
    """Let modules with parts of a sum add them up over all chips."""

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return reduce(output)

    for name, module in local.named_modules():
        if name.endswith(REDUCED):
            module.register_forward_hook(hook)
    local.embedding.register_forward_hook(hook)


def local_config(config: ModelConfig, num_chips: int) -> ModelConfig:
    """The sizes of one chip's part."""
    moe = config.moe
    if moe is not None:
        shared, among = moe.shared_intermediate_size, num_chips if moe.expert_parallel else 1
        moe = replace(
            moe,
            intermediate_size=moe.intermediate_size * among // num_chips,
            shared_intermediate_size=None if shared is None else shared // num_chips,
            num_chips=among,
        )
    return replace(
        config,
        vocab_size=-(-config.vocab_size // num_chips),  # the last chip's rows are padded
        num_heads=config.num_heads // num_chips,
        num_kv_heads=max(config.num_kv_heads // num_chips, 1),
        intermediate_size=max(config.intermediate_size // num_chips, 1),
        moe=moe,
    )


def with_expert_parallel(config: ModelConfig) -> ModelConfig:
    """The same model, of which chips that divide it have some of the experts each.

    Raises:
        ConfigError: it has no experts.
    """
    if config.moe is None:
        raise ConfigError(f"expert_parallel=True: {config.architecture} has no experts; leave it out")
    return replace(config, moe=replace(config.moe, expert_parallel=True))


def partition_problems(config: ModelConfig, num_chips: int) -> list[str]:
    """Why a model cannot be divided among so many chips."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    found = []
    if heads % num_chips:
        found.append(f"num_heads={heads} is not divisible by {num_chips} chips")
    if kv_heads % num_chips and num_chips % kv_heads:
        found.append(f"num_kv_heads={kv_heads} neither divides {num_chips} chips nor is divisible by them")
    for name, size in _inner_sizes(config):
        if size % num_chips:
            found.append(f"{name}={size} is not divisible by {num_chips} chips")
    return found


def _inner_sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    moe = config.moe
    if moe is None or len(moe.layers) < config.num_layers:
        yield "intermediate_size", config.intermediate_size
    if moe is not None:
        if moe.expert_parallel:
            yield "num_experts", moe.num_experts
        else:
            yield "the experts' intermediate_size", moe.intermediate_size
        if moe.shared_intermediate_size is not None:
            yield "the shared expert's intermediate_size", moe.shared_intermediate_size


def tensors_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _matrices(model: nn.Module) -> Iterator[tuple[str, QuantizedMatrix]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QuantizedMatrix))


def _slots(module: nn.Module, attribute: str) -> list[slice]:
    """Rows of the parts that a tensor of a layer was merged from; none where it is one."""
    is_merged = isinstance(module, Linear) or (isinstance(module, Experts) and attribute == "gate_up")
    slots: Mapping[str, slice] = module.slots if is_merged else {}  # type: ignore[assignment]
    return list(slots.values())


def _division(name: str, model: DividedModel, tensor: Tensor, share: Tensor) -> Division:
    owner, _, attribute = name.rpartition(".")
    module, mine = model.whole.get_submodule(owner), model.local.get_submodule(owner)
    differing = [dim for dim, (a, b) in enumerate(zip(tensor.shape, share.shape, strict=True)) if a != b]
    if not differing:
        is_bias = isinstance(module, Linear) and isinstance(mine, Linear) and attribute == "bias"
        return Division(is_on_first_only=is_bias and _num_inputs(module) != _num_inputs(mine))
    (dim,) = differing
    row_block: int | None = 1
    if isinstance(module, QuantizedMatrix):
        row_block = module.specs[attribute].row_block
        owner, _, attribute = owner.rpartition(".")
        module, mine = model.whole.get_submodule(owner), model.local.get_submodule(owner)
    rows, own = _slots(module, attribute), _slots(mine, attribute)
    if dim != max(tensor.ndim - 2, 0) or not rows or row_block is None:
        size, length = tensor.shape[dim], share.shape[dim]
        return Division(dim, (Part(0, length * model.num_chips if name.startswith(BY_VOCABULARY) else size, length),))
    return Division(
        dim, tuple(_part(_blocks(a, row_block), _blocks(b, row_block)) for a, b in zip(rows, own, strict=True))
    )


def _num_inputs(module: nn.Module) -> int:
    assert isinstance(module, Linear) and isinstance(module.weight, nn.Parameter | QuantizedMatrix)
    return module.weight.shape[-1]


def _blocks(rows: slice, row_block: int) -> tuple[int, int]:
    """Where blocks of rows start, and how many there are."""
    start = rows.start // row_block
    return start, -(-rows.stop // row_block) - start


def _part(whole: tuple[int, int], share: tuple[int, int]) -> Part:
    return Part(*whole, share[1])


def _check_schemes(whole: Decoder, local: Decoder, num_chips: int) -> None:
    problems: dict[str, list[str]] = {}
    for name, matrix in _matrices(whole):
        share = local.get_submodule(name)
        assert isinstance(share, QuantizedMatrix)
        for problem in _scheme_problems(matrix, share):
            problems.setdefault(problem, []).append(name)
    lines = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {problem}"
        for problem, names in problems.items()
    ]
    raise_all(lines, ConfigError, f"quantized matrices cannot be divided among {num_chips} chips")


def _scheme_problems(matrix: QuantizedMatrix, share: QuantizedMatrix) -> Iterator[str]:
    """Why a chip's rows or columns are not those of whole scales."""
    scheme, columns = matrix.scheme, share.shape[-1]
    if columns != matrix.shape[-1]:
        block = scheme.column_block or columns
        is_shared = matrix.shape[-1] <= block or block % columns == 0
        if columns % block and not is_shared:
            yield (
                f"as {scheme.name}, {block} inputs share a scale, and a chip has {columns}: use a smaller group, int8, "
                "or fewer chips"
            )
        elif matrix.values.dtype == torch.uint8 and columns % 2:
            yield f"as {scheme.name}, 2 inputs share a byte, and a chip has {columns}: use int8, or fewer chips"
        if scheme.has_group_index:
            yield "its inputs are in groups out of order (desc_act), which chips cannot divide: use one chip"
    if share.shape[-2] != matrix.shape[-2]:
        odd = [rows for rows in share.part_rows if rows % scheme.row_block]
        if odd:
            yield (
                f"as {scheme.name}, {scheme.row_block} outputs share a scale, and a chip has {odd[0]}: use fp8, or "
                "fewer chips"
            )
