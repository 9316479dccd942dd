"""A matrix in fewer bits: its tensors, and what they mean. Plain data, read by kernels.

Also what a device made of a matrix for its own kernels, as far as others may know it.

    element [o, i]  =  (values[o, i] - zero[o, g]) * scale[o // row_block, g],    g = i // column_block

Letters: E experts, O outputs, I inputs, G groups of inputs, S parts that were merged into one matrix (q, k and v).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from torch import Tensor

NIBBLE_ZERO = 8  # what stands for zero in 4 bits where a scheme has no zeros of its own


class PreparedWeight(Protocol):
    """A matrix in the layout of one device's kernels; only they read it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[O, I], or [E, O, I]."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""

    def numel(self) -> int:
        """Numbers that it stands for."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix [O, I], or those of experts [E, O, I]: then all tensors begin with E."""

    values: Tensor  # int8 or float8_e4m3fn [O, I]; uint8 [O, I / 2]: two of 4 bits, the first in the low half
    scale: Tensor  # float32 [ceil(O / row_block), G]
    row_block: int  # outputs that share a scale
    column_block: int  # inputs that share a scale: a group
    activations: str = "none"  # none, int8, fp8: what the inputs are rounded to, by scales as `input_group` has them
    zero: Tensor | None = None  # [O, G], uint8 with 4 bits, int8 with int8; None: 8 with 4 bits, else 0
    group_index: Tensor | None = None  # int32 [S, I], the group of each input; None: in order
    input_scale: Tensor | None = None  # float32 [S], the scale of all inputs in place of one a token
    part_rows: tuple[int, ...] = ()  # outputs of each of the S parts; empty: there is one

    @property
    def input_group(self) -> int:
        """Inputs of a token that are rounded by a scale of their own: in e4m3 those of a group; 0: all of them."""
        has_groups = self.scale.shape[-1] > 1 and self.input_scale is None
        return self.column_block if self.activations == "fp8" and has_groups else 0

    def expert(self, index: int) -> QuantizedWeight:
        """The matrix of one expert."""
        return replace(
            self,
            values=self.values[index],
            scale=self.scale[index],
            zero=None if self.zero is None else self.zero[index],
            group_index=None if self.group_index is None else self.group_index[index],
            input_scale=None if self.input_scale is None else self.input_scale[index],
        )

    def parts(self) -> Iterator[QuantizedWeight]:
        """The merged parts, each with its own `group_index` [1, I] and `input_scale` [1]. Needs row_block 1."""
        rows = self.part_rows or (self.values.shape[0],)
        for part, (size, end) in enumerate(zip(rows, accumulate(rows), strict=True)):
            start = end - size
            yield replace(
                self,
                values=self.values[start:end],
                scale=self.scale[start:end],
                zero=None if self.zero is None else self.zero[start:end],
                group_index=None if self.group_index is None else self.group_index[part : part + 1],
                input_scale=None if self.input_scale is None else self.input_scale[part : part + 1],
                part_rows=(),
            )
