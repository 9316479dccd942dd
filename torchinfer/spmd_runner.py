"""Runs plans on several chips of XLA: the programs of XlaRunner, on all chips at once.

Caches go into a program and come out of it, in the same memory: torch_xla 2.9 would write them in place by one more
program a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer import spmd
from torchinfer.batch import KVCache
from torchinfer.device import mark_as_donated
from torchinfer.parallel import DividedModel
from torchinfer.sampler import LogprobTensors
from torchinfer.spmd_step import SpmdStep
from torchinfer.step_input import Ints, StepShape
from torchinfer.xla_runner import XlaRunner, compiled

R = TypeVar("R")


class SpmdRunner(XlaRunner):
    """An XlaRunner of a divided model, with the caches of all chips."""

    def __init__(
        self, model: DividedModel, kv_caches: list[KVCache], page_size: int, device: torch.device, **sizes: int
    ) -> None:
        self._num_chips, self._step = model.num_chips, SpmdStep(model, page_size, kv_caches[0].pages)
        super().__init__(model.local, kv_caches, page_size, device, **sizes)
        self._state = [tensor for cache in kv_caches for tensor in cache.tensors] + self._step.counters
        self._forward_state = _renewing(compiled(self._forward_state_eager))
        for name in ("_head", "_sample", "_greedy", "_edit_chunk", "_logprobs"):
            setattr(self, name, _renewing(getattr(self, name)))

    def num_dropped_expert_tokens(self) -> int:
        return sum(int(counter.item()) for counter in self._state[len(self._state) - len(self._step.counters) :])

    def _send(self, array: NDArray[Any]) -> Tensor:
        # A copy: the transfer may read it later, and it may be part of a larger one.
        return spmd.put_everywhere(torch.from_numpy(array.copy()), self._num_chips)

    def _send_divided(self, array: NDArray[Any]) -> Tensor:
        parts = np.split(array.copy(), self._num_chips)
        return spmd.put(lambda chip: torch.from_numpy(parts[chip]), 0, self._num_chips)

    def _run_forward(self, packed: Ints, shape: StepShape) -> tuple[Tensor, Tensor]:
        ints = self._send(packed[: shape.num_forward])
        self._state, hidden, logits = self._forward_state(ints, self._last_ids, self._state, shape)
        return logits, hidden

    def _forward_state_eager(
        self, ints: Tensor, last_ids: Tensor, state: list[Tensor], shape: StepShape
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        mark_as_donated(state)
        return self._step.forward(ints, last_ids, state, shape)

    def _head_eager(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return self._step.head(hidden, rows)

    def _greedy_eager(self, logits: Tensor) -> Tensor:
        return super()._greedy_eager(self._step.own_rows(logits))

    def _sample_eager(self, logits: Tensor, top_k: Tensor, reals: Tensor) -> Tensor:
        """Each chip draws the ids of its rows."""
        own = self._step.own_part
        parameters = own(self._step.everywhere(top_k), 0), own(self._step.everywhere(reals), 1)
        return super()._sample_eager(self._step.own_rows(logits), *parameters)

    def _feed(self, ids: Tensor) -> Tensor:
        return self._step.from_all(super()._feed(self._step.of_all_rows(ids)))

    def _edit_eager(self, logits: Tensor, row: Tensor, token: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
        edits = (spmd.to_local(each, 0, self._num_chips) for each in (row, token, factor, addend))
        edited = super()._edit_eager(self._step.own_rows(logits), *edits)
        return spmd.to_global(edited, 0, self._num_chips)

    def _logprobs_eager(self, logits: Tensor, token_ids: Tensor) -> LogprobTensors:
        """Each chip computes those of its rows; all get all of them, which are few."""
        own_ids = self._step.own_part(self._step.everywhere(token_ids)[: logits.shape[0]], 0)
        found = super()._logprobs_eager(self._step.own_rows(logits), own_ids)
        return LogprobTensors(*(self._step.from_all(self._step.of_all_rows(each)) for each in found.tensors))


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
