"""Smoothing: a factor for each input channel moves from a norm into the columns of the matrices behind it.

The model computes the same, but channels with large numbers no longer take the steps of int8 from all others. How the
factors are found is torchinfer/calibration.py's. Source: SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from safetensors.torch import load, save
from torch import Tensor

from torchinfer.loader.placement import Placement

NORM, COLUMNS = "norm:", "columns:"


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What changes, by the checkpoint's names of tensors."""

    norms: Mapping[str, Tensor]  # what stands in place of it, weights and biases, in the dtype of the file
    columns: Mapping[str, Tensor]  # float32 [I], by which the columns of a matrix are multiplied before it is packed

    def applied_to(self, placements: Mapping[str, Placement]) -> dict[str, Placement]:
        """The same placements with what changes."""
        return {name: self._changed(name, placement) for name, placement in placements.items()}

    def to_bytes(self) -> bytes:
        """For `from_bytes`, with every bit."""
        norms = {f"{NORM}{name}": tensor for name, tensor in self.norms.items()}
        columns = {f"{COLUMNS}{name}": tensor.clone() for name, tensor in self.columns.items()}  # q, k, v share one
        return save(norms | columns)

    @classmethod
    def from_bytes(cls, content: bytes) -> Smoothing:
        """What `to_bytes` gave."""
        found = load(content)
        norms, columns = (
            {name.removeprefix(kind): tensor for name, tensor in found.items() if name.startswith(kind)}
            for kind in (NORM, COLUMNS)
        )
        return cls(norms, columns)

    def _changed(self, name: str, placement: Placement) -> Placement:
        if name in self.norms:
            norm = self.norms[name]
            return replace(placement, convert=lambda _: norm)
        return replace(placement, columns=self.columns[name]) if name in self.columns else placement
