"""Functions of tensors as programs of XLA that are called by their hash.

torch.compile's guards and wrappers and torch_xla's bridge to it take more time of the host than the launch. So a
function is recorded here once for each shape, by torch_xla's lazy tensors, and from then on a call is one call of
torch_xla's. That is what its bridge does (torch_xla/_dynamo/dynamo_bridge.py of 2.9.0: extract_graph_helper and
optimized_mod); its private interface is used in this file as it is there, and must be looked at again with another
version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchinfer.device import flush

Function = Callable[..., Sequence[Tensor]]


class CompiledFunction:
    """A function of tensors as one program for each shape of its first argument, which tells all other shapes.

    It is recorded at the first call with a shape. What it reads besides its arguments is remembered as it is then:
    weights, not random numbers. It must write to nothing but arguments; these stay as they are, and must be among the
    results with what was written. Results are computed, each once, and no argument as it came.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._programs: dict[torch.Size, Program] = {}

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Launch it, and return its results before they are computed. Arguments may be on the CPU, on one chip."""
        shape = arguments[0].shape
        if shape not in self._programs:
            self._programs[shape] = record(self._function, arguments)
        return self._programs[shape](arguments)


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled program, with what it takes besides arguments."""

    hash: bytes
    inputs: list[Tensor | None]  # None in the places of arguments
    arguments: list[tuple[int, int]]  # place in `inputs`, number of the argument

    def __call__(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        inputs = self.inputs.copy()
        for place, number in self.arguments:
            inputs[place] = arguments[number]
        results: list[Tensor] = _xlac()._run_cached_graph(self.hash, inputs)
        return results


@torch.no_grad()
def record(function: Function, arguments: Sequence[Tensor]) -> Program:
    """Compile a function for arguments of these shapes and dtypes, whatever their values. Waits for the device.

    Raises:
        RuntimeError: torch_xla's, because the function looks at a value, or calls an op that XLA does not have.
    """
    import torch_xla
    from torch_xla.utils.buffer_donor_context import alias_with_buffer_donor_config

    device = torch_xla.device()
    on_device = [argument.to(device) for argument in arguments]
    flush(device)  # all that is used has its memory, by which it is found below
    xlac = _xlac()
    # Other tensors over the same memory, so that what is written to them is not written to the arguments.
    _, others = xlac._get_tensors_xla_device_data_node(on_device)
    assert len(others) == len(on_device), "two arguments in the same memory"
    with _nothing_computed():
        results = list(function(*others))
    assert all(xlac._check_tensor_need_materialization(results)), "a result is not computed"
    _, inputs = xlac._get_tensors_xla_device_data_node(results)
    with alias_with_buffer_donor_config():
        program_hash = xlac._get_graph_hash(results)
        xlac._xla_warm_up_cache(results, [])
    xlac._clear_pending_irs(str(device))  # or they would be computed at the next occasion
    numbers = {handle: number for number, handle in enumerate(xlac._get_tensors_handle(on_device))}
    found = [numbers.get(handle) for handle in xlac._get_tensors_handle(inputs)]
    fixed = [tensor if number is None else None for tensor, number in zip(inputs, found, strict=True)]
    return Program(program_hash, fixed, [(at, number) for at, number in enumerate(found) if number is not None])


@contextmanager
def _nothing_computed() -> Iterator[None]:
    """What is asked for a value raises an error."""
    before = _xlac()._get_allow_execution()
    _xlac()._set_allow_execution(False)
    try:
        yield
    finally:
        _xlac()._set_allow_execution(before)


def _xlac() -> Any:
    import torch_xla

    return torch_xla._XLAC  # type: ignore[attr-defined]
