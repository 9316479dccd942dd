"""Runs plans on several chips of XLA: the programs of XlaRunner, on all chips at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer import spmd
from torchinfer.batch import KVCache
from torchinfer.device import mark_as_donated
from torchinfer.parallel import DividedModel
from torchinfer.spmd_step import SpmdStep
from torchinfer.step_input import StepShape
from torchinfer.xla_runner import XlaRunner


class SpmdRunner(XlaRunner):
    """An XlaRunner of a divided model, with the caches of all chips."""

    def __init__(
        self, model: DividedModel, kv_caches: list[KVCache], page_size: int, device: torch.device, **sizes: int
    ) -> None:
        self._num_chips, self._step = model.num_chips, SpmdStep(model, page_size, kv_caches[0].pages)
        super().__init__(model.local, kv_caches, page_size, device, **sizes)

    def _send(self, array: NDArray[Any]) -> Tensor:
        # A copy: the transfer may read it later, and it may be part of a larger one.
        return spmd.put_everywhere(torch.from_numpy(array.copy()), self._num_chips)

    def _send_divided(self, array: NDArray[Any]) -> Tensor:
        parts = np.split(array.copy(), self._num_chips)
        return spmd.put(lambda chip: torch.from_numpy(parts[chip]), 0, self._num_chips)

    def _counter_tensors(self) -> dict[str, Tensor]:
        return self._step.counters

    def _forward_eager(self, shape: StepShape, ints: Tensor, last_ids: Tensor, *state: Tensor) -> list[Tensor]:
        mark_as_donated(list(state))
        after, hidden, logits = self._step.forward(ints, last_ids, state, shape)
        return [*after, hidden, logits]

    def _head_eager(self, hidden: Tensor, rows: Tensor) -> list[Tensor]:
        return [self._step.head(hidden, rows)]

    def _greedy_eager(self, logits: Tensor) -> list[Tensor]:
        return super()._greedy_eager(self._step.own_rows(logits))

    def _sample_eager(self, logits: Tensor, top_k: Tensor, reals: Tensor) -> list[Tensor]:
        """Each chip draws the ids of its rows."""
        own = self._step.own_part
        parameters = own(self._step.everywhere(top_k), 0), own(self._step.everywhere(reals), 1)
        return super()._sample_eager(self._step.own_rows(logits), *parameters)

    def _feed(self, ids: Tensor) -> Tensor:
        return self._step.from_all(super()._feed(self._step.of_all_rows(ids)))

    def _edit_eager(self, logits: Tensor, row: Tensor, token: Tensor, factor: Tensor, addend: Tensor) -> list[Tensor]:
        edits = (spmd.to_local(each, 0, self._num_chips) for each in (row, token, factor, addend))
        (edited,) = super()._edit_eager(self._step.own_rows(logits), *edits)
        return [spmd.to_global(edited, 0, self._num_chips)]

    def _logprobs_eager(self, logits: Tensor, token_ids: Tensor) -> list[Tensor]:
        """Each chip computes those of its rows; all get all of them, which are few."""
        own_ids = self._step.own_part(self._step.everywhere(token_ids)[: logits.shape[0]], 0)
        found = super()._logprobs_eager(self._step.own_rows(logits), own_ids)
        return [self._step.from_all(self._step.of_all_rows(each)) for each in found]
