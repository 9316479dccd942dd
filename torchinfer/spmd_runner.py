"""Runs plans on several chips of XLA: one program on all of them, in which each computes its part of the model.

The programs are those of XlaRunner, and what goes in and out is whole: a step, ids, hidden states and logits are the
same on every chip. Parameters and caches are cut. Caches go into a program and come out of it, in the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from torchinfer import spmd
from torchinfer.batch import KVCache
from torchinfer.device import mark_as_donated
from torchinfer.kv_cache.tensors import HEADS
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import DividedModel
from torchinfer.spmd import REPLICATED
from torchinfer.step_input import Ints, StepInput, StepShape, unpack
from torchinfer.xla_runner import XlaRunner, _compiled

R = TypeVar("R")
COUNTER = "num_dropped"  # the buffers that a forward pass writes to, by the ends of their names


class SpmdRunner(XlaRunner):
    """An XlaRunner of a divided model, with the caches of all chips."""

    def __init__(self, model: DividedModel, kv_caches: list[KVCache], *arguments: Any, **options: int) -> None:
        self._num_chips, self._vocab_size = model.num_chips, model.whole.config.vocab_size
        super().__init__(model.local, kv_caches, *arguments, **options)
        named = {**dict(model.local.named_parameters()), **dict(model.local.named_buffers())}
        self._dims = {name: division.place for name, division in model.divisions.items()}
        self._counters = [name for name in named if name.endswith(COUNTER)]
        self._weights = {name: tensor for name, tensor in named.items() if name not in self._counters}
        # What a step changes: tensors of the caches, and counters.
        self._state = [tensor for cache in kv_caches for tensor in cache.tensors]
        self._state += [named[name] for name in self._counters]
        self._step, self._only_head = _Step(model.local), _Head(model.local)
        self._forward_state = _renewing(_compiled(self._forward_state_eager))
        for name in ("_head", "_sample", "_greedy", "_edit_chunk", "_logprobs"):
            setattr(self, name, _renewing(getattr(self, name)))

    def num_dropped_expert_tokens(self) -> int:
        return sum(int(counter.item()) for counter in self._state[len(self._state) - len(self._counters) :])

    def _send(self, array: NDArray[Any]) -> Tensor:
        # A copy: the transfer may read it later, and it may be part of a larger one.
        return spmd.put_everywhere(torch.from_numpy(array.copy()), self._num_chips)

    def _run_forward(self, packed: Ints, shape: StepShape) -> tuple[Tensor, Tensor]:
        ints = self._send(packed[: shape.num_forward])
        logits, hidden, self._state = self._forward_state(ints, self._last_ids, self._state, shape)
        return logits, hidden

    def _forward_state_eager(
        self, ints: Tensor, last_ids: Tensor, state: list[Tensor], shape: StepShape
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        mark_as_donated(state)
        step = unpack(self._everywhere(ints), shape, self._page_size, None).fed(self._everywhere(last_ids))
        num_written = len(state) - len(self._counters)
        caches = [spmd.to_local(tensor, HEADS, self._num_chips) for tensor in state[:num_written]]
        counters = [self._everywhere(tensor) for tensor in state[num_written:]]
        tensors = self._local_weights() | dict(zip(self._counters, counters, strict=True))
        logits, hidden = functional_call(self._step, _prefixed(tensors), (step, self._in_layers(caches)))
        written = [spmd.to_global(tensor, HEADS, self._num_chips) for tensor in caches]
        written += [self._from_all(tensor) for tensor in counters]
        return self._whole_logits(logits), self._from_all(hidden), written

    def _head_eager(self, hidden: Tensor, rows: Tensor) -> Tensor:
        chosen = self._everywhere(hidden)[self._everywhere(rows)]
        return self._whole_logits(functional_call(self._only_head, _prefixed(self._local_weights()), (chosen,)))

    def _everywhere(self, tensor: Tensor) -> Tensor:
        return spmd.to_local(tensor, REPLICATED, self._num_chips)

    def _from_all(self, tensor: Tensor) -> Tensor:
        return spmd.to_global(tensor, REPLICATED, self._num_chips)

    def _whole_logits(self, logits: Tensor) -> Tensor:
        """What chips have of the vocabulary, together, without the rows that padded it."""
        return spmd.gather(logits, 1, self._num_chips)[:, : self._vocab_size]

    def _local_weights(self) -> dict[str, Tensor]:
        return {
            name: spmd.to_local(tensor, self._dims[name], self._num_chips) for name, tensor in self._weights.items()
        }

    def _in_layers(self, tensors: list[Tensor]) -> list[KVCache]:
        size = len(tensors) // len(self._kv_caches)
        return [KVCache(*tensors[at : at + size]) for at in range(0, len(tensors), size)]


class _Step(nn.Module):
    """The forward pass as a module, because torch calls only those with other tensors than their own."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, step: StepInput, kv_caches: list[KVCache]) -> tuple[Tensor, Tensor]:
        """Logits of the sampled rows, and hidden states."""
        hidden: Tensor = self.model(step.batch, kv_caches)
        return self.model.logits(hidden[step.sample_index]), hidden


class _Head(_Step):
    """The head alone."""

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """[N, hidden] -> [N, vocab]."""
        return self.model.logits(hidden)


def _renewing(function: Callable[..., R]) -> Callable[..., R]:
    """A compiled function that gets renewed arguments where it is traced, which is once for shapes of them."""
    traced = set()

    def call(*arguments: Any) -> R:
        key = tuple(
            each.shape if isinstance(each, Tensor) else each for each in arguments if not isinstance(each, list)
        )
        if key not in traced:
            traced.add(key)
            arguments = tuple(spmd.renewed(each) if isinstance(each, Tensor) else each for each in arguments)
        return function(*arguments)

    return call


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}
