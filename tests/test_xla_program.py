"""Functions as programs of XLA (XLA:CPU will do): what they take, what they write, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchinfer.device import count_compilations, mark_as_donated, resolve_device, synchronize

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")

from torchinfer.xla_program import CompiledFunction, record  # noqa: E402


@pytest.fixture(autouse=True)
def xla() -> torch.device:
    return resolve_device("xla")


def address(tensor: Tensor) -> int:
    import torch_xla

    synchronize(tensor.device)  # before, it has none
    return int(torch_xla._XLAC._unsafe_buffer_pointer(tensor))


def ramp(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, dtype=torch.float32).to(device)


def test_each_shape_is_compiled_once_whatever_the_values(xla: torch.device) -> None:
    weight = ramp(3, xla) + 1
    times = CompiledFunction(lambda x, y: [x * weight - y, x.sum() + y])
    before = count_compilations()
    for rows in (2, 4, 2, 4):
        for scale in (1.0, -2.5):
            x, y = scale * torch.randn(rows, 3), torch.tensor([scale])
            first, second = times(x.to(xla), y)  # from both devices
            torch.testing.assert_close(first.cpu(), x * torch.tensor([1.0, 2.0, 3.0]) - y)
            torch.testing.assert_close(second.cpu(), x.sum() + y)
    assert count_compilations() - before == 2 + 1  # weight, too


def test_what_is_written_to_an_argument_is_a_result_and_the_argument_stays(xla: torch.device) -> None:
    def write(cache: Tensor, value: Tensor) -> list[Tensor]:
        cache[1:3] = value
        return [cache, value + 1]

    cache = ramp(4, xla)
    written, _ = CompiledFunction(write)(cache, torch.tensor([7.0]))
    assert written.tolist() == [0, 7, 7, 3]
    assert cache.tolist() == [0, 1, 2, 3]


def test_a_donated_argument_is_gone_and_its_memory_is_the_result_s(xla: torch.device) -> None:
    def add(cache: Tensor, value: Tensor) -> list[Tensor]:
        mark_as_donated([cache])
        cache.add_(value)
        return [cache]

    donates = CompiledFunction(add)
    cache = ramp(4096, xla)
    (cache,) = donates(cache, torch.ones(1))
    old, memory = cache, address(cache)
    (cache,) = donates(cache, torch.ones(1))
    assert cache[:3].tolist() == [2, 3, 4]
    assert address(cache) == memory
    with pytest.raises(RuntimeError, match="HasValue"):
        old.cpu()


def value_of(x: Tensor) -> list[Tensor]:
    return [x + x.sum().item()]


def chosen(x: Tensor) -> list[Tensor]:
    return [x[x > 1]]


@pytest.mark.parametrize("function", [value_of, chosen])
def test_a_function_of_values_is_refused_and_others_are_recorded_after_it(
    function: Callable[[Tensor], list[Tensor]], xla: torch.device
) -> None:
    with pytest.raises(RuntimeError, match="execution"):
        record(function, [ramp(3, xla)])
    assert CompiledFunction(lambda x: [x + 1])(ramp(3, xla))[0].tolist() == [1, 2, 3]


def test_an_argument_as_a_result_is_a_bug(xla: torch.device) -> None:
    with pytest.raises(AssertionError, match="not computed"):
        record(lambda x: [x + 1, x], [ramp(3, xla)])
