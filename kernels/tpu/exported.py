"""Functions of jax with Pallas kernels for a TPU, wherever they are traced.

An export has the format of kernels that libtpu reads, and may be called in a program for another platform, which then
cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import torch
from torch import Tensor

Shapes = tuple[tuple[tuple[int, ...], str], ...]  # of arguments, with their dtypes


def shapes_of(arguments: Sequence[Tensor]) -> Shapes:
    """What a function is exported for."""
    return tuple((tuple(each.shape), dtype_name(each.dtype)) for each in arguments)


def dtype_name(dtype: torch.dtype) -> str:
    """As jax has it."""
    return str(dtype).removeprefix("torch.")


def export_for_tpu(function: Callable[..., Any], shapes: Shapes) -> Any:
    """The function, for `xla_builder.call_jax`."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes]
    checks = [jax.export.DisabledSafetyCheck.platform()]
    return jax.export.export(jax.jit(function), platforms=("tpu",), disabled_checks=checks)(*arguments).call
