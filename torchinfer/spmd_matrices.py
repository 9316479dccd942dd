"""Chips' parts of matrices in the layout of their kernels: each chip packs the part that it has, for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.func import functional_call

from torchinfer import kernels, spmd
from torchinfer.models.layers import PreparedMatrix, preparable
from torchinfer.parallel import DividedModel, Division
from torchinfer.quantization import QuantizedMatrix
from torchinfer.spmd import STACKED


def prepare_chips(model: DividedModel, num_cores: int, settle: Callable[[], None] | None = None) -> None:
    """Bring the matrices of a divided model into the layout of the chips' kernels, where they take a chip's part.

    `tensors` are exchanged one matrix at a time, so that one is there twice; they may be without memory, on meta.
    num_cores: of a chip, see `kernels.prepare`. `settle` is called after each matrix.
    """
    for path, module in list(model.local.named_modules()):
        for attribute in preparable(module):
            prepared = _prepare(model, f"{path}.{attribute}", getattr(module, attribute), num_cores)
            if prepared is None:
                continue
            delattr(module, attribute)  # nn.Module does not let a parameter become anything else
            setattr(module, attribute, prepared)
            if settle is not None:
                settle()


def _prepare(
    model: DividedModel, name: str, matrix: QuantizedMatrix | nn.Parameter, num_cores: int
) -> PreparedMatrix | None:
    """What stands for a matrix in a chip's model, its tensors put in the place of those that it had."""
    fields = dict(matrix.named_buffers()) if isinstance(matrix, QuantizedMatrix) else {"": matrix}
    names = {field: f"{name}.{field}".rstrip(".") for field in fields}
    shares = {
        field: spmd.to_local(model.tensors[each], model.divisions[each].place, model.num_chips)
        for field, each in names.items()
    }
    own = functional_call(matrix, shares) if isinstance(matrix, QuantizedMatrix) else shares[""]
    packed: Any = kernels.prepare(own, num_cores=num_cores)
    if packed is None:
        return None
    for each in names.values():
        del model.tensors[each], model.divisions[each]
    for field, tensor in packed.tensors.items():
        model.tensors[f"{name}.{field}"] = spmd.to_global(tensor, STACKED, model.num_chips)
        model.divisions[f"{name}.{field}"] = Division(STACKED)
    return PreparedMatrix(packed)
