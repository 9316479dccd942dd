"""QuantizedMatrix: what stands in a layer in place of the parameter of a matrix."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from torchinfer.quantization.scheme import Scheme, TensorSpec
from torchinfer.quantization.source import Source
from torchinfer.quantized_weight import QuantizedWeight


class QuantizedMatrix(nn.Module):
    """A matrix [O, I], or experts' [E, O, I], as its scheme holds it: buffers that the loader fills.

    `part_rows`: the outputs of the matrices that were merged into it, in their order. `sources`: the tensors of a
    checkpoint that comes quantized; without them `<layer>.weight` is quantized while it is loaded.
    """

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    group_index: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        scheme: Scheme,
        part_rows: tuple[int, ...] = (),
        sources: tuple[Source, ...] = (),
    ) -> None:
        super().__init__()
        self.shape, self.scheme, self.sources = shape, scheme, sources
        self.part_rows = part_rows or (shape[-2],)
        self.specs = scheme.tensors(shape[-2], shape[-1], len(self.part_rows))
        for name in ("values", "scale", "zero", "group_index", "input_scale"):
            self.register_buffer(name, self._empty(self.specs.get(name)))

    def forward(self) -> QuantizedWeight:
        """The matrix for a kernel."""
        tensors = {
            "values": self.values,
            "scale": self.scale,
            "zero": self.zero,
            "group_index": self.group_index,
            "input_scale": self.input_scale,
        }
        return self.scheme.weight(tensors, self.shape[-1], self.part_rows)

    def rows(self, start: int, count: int) -> dict[str, Tensor]:
        """Of each tensor what belongs to these rows, for `Scheme.pack`; `start` is a multiple of row_block."""
        blocks = {name: spec.row_block or 1 for name, spec in self.specs.items()}
        return {
            name: self.get_buffer(name)[start // block : -(-(start + count) // block)] for name, block in blocks.items()
        }

    def numel(self) -> int:
        """Numbers that the matrix stands for."""
        return prod(self.shape)

    def _empty(self, spec: TensorSpec | None) -> Tensor | None:
        return None if spec is None else torch.empty(self.shape[:-2] + spec.shape, dtype=spec.dtype)
