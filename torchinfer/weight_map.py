"""How a model's file says which checkpoint tensor fills which parameter.

A model class has two tables:

    CHECKPOINT: dict[str, Target]   checkpoint name -> parameter (and the part of it)
    IGNORED: tuple[str, ...]        checkpoint names that hold nothing to compute with (old rotary tables, masks)

`{layer}` and `{expert}` in a name stand for a number and mean the same number in the parameter's name. A parameter
that several checkpoint tensors fill (q, k and v in one matrix) is owned by a module with `slots`, which gives each
part's rows: `slots["q"] == slice(0, 512)`. Experts share one parameter [E, rows, columns]: `{expert}` picks the
first index, the slot the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes. `transform` reorders it, into one new tensor of the same shape."""

    parameter: str
    slot: str | None = None
    transform: Callable[[Tensor], Tensor] | None = None
