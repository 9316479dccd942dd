"""The forward pass of a divided model, as one program on all chips.

What goes in and out is whole: a step, ids and hidden states are the same on every chip. Parameters and caches are cut;
logits, too, by rows, so that each chip has all that its rows' ids are drawn from. Between, each chip computes its own
model from its shares, as on one chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.func import functional_call

from torchinfer import spmd
from torchinfer.batch import KernelPages, KVCache, split_layers
from torchinfer.models.decoder import Decoder
from torchinfer.models.moe import COUNTER
from torchinfer.parallel import DividedModel, connect
from torchinfer.spmd import REPLICATED, STACKED
from torchinfer.step_input import StepInput, StepShape, unpack


class SpmdStep:
    """Functions of tensors that are on all chips. `state` is what a step changes: the caches' tensors, layer by layer,
    then `counters`."""

    def __init__(self, model: DividedModel, page_size: int, pages: KernelPages | None = None) -> None:
        self._num_chips, self._vocab_size, self._page_size = model.num_chips, model.whole.config.vocab_size, page_size
        self._num_layers, self._pages = model.local.config.num_layers, pages
        self._places = {name: division.place for name, division in model.divisions.items()}
        self.counters = {name: tensor for name, tensor in model.tensors.items() if name.endswith(COUNTER)}
        self._weights = {name: tensor for name, tensor in model.tensors.items() if name not in self.counters}
        connect(model.local, partial(spmd.all_reduce, num_chips=model.num_chips))
        self._model, self._model_head = _Model(model.local), _Head(model.local)

    def forward(
        self, ints: Tensor, last_ids: Tensor, state: Sequence[Tensor], shape: StepShape
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The state afterwards, in the same memory where it is donated, hidden states [T, H], logits [R, V] by rows.

        In this order, because XLA pairs what is donated with results of the same type as they come.
        """
        step = unpack(self.everywhere(ints), shape, self._page_size, None).fed(self.everywhere(last_ids))
        num_written = len(state) - len(self.counters)
        written = [spmd.to_local(tensor, STACKED, self._num_chips) for tensor in state[:num_written]]
        counted = [self.everywhere(tensor) for tensor in state[num_written:]]
        tensors = self._shares() | dict(zip(self.counters, counted, strict=True))
        caches = split_layers(written, self._num_layers, self._pages)
        logits, hidden = functional_call(self._model, _of_model(tensors), (step, caches))
        after = [spmd.to_global(tensor, STACKED, self._num_chips) for tensor in written]
        after += [self.from_all(tensor) for tensor in counted]
        return after, self.from_all(hidden), self._by_rows(logits)

    def head(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits of some rows of hidden states, as many as chips divide; by rows."""
        chosen = self.everywhere(hidden)[self.everywhere(rows)]
        return self._by_rows(functional_call(self._model_head, _of_model(self._shares()), (chosen,)))

    def everywhere(self, tensor: Tensor) -> Tensor:
        """In a program: a chip's copy of what all have."""
        return spmd.to_local(tensor, REPLICATED, self._num_chips)

    def from_all(self, tensor: Tensor) -> Tensor:
        """What all chips have alike, as what goes out of a program."""
        return spmd.to_global(tensor, REPLICATED, self._num_chips)

    def own_rows(self, logits: Tensor) -> Tensor:
        """In a program: a chip's rows of logits, [R / chips, V]."""
        return spmd.to_local(logits, 0, self._num_chips)

    def own_part(self, tensor: Tensor, dim: int) -> Tensor:
        """In a program: of what belongs to all rows and every chip has, that of a chip's rows."""
        return spmd.reshard(tensor, REPLICATED, dim, self._num_chips)

    def of_all_rows(self, tensor: Tensor) -> Tensor:
        """In a program: what chips have for their rows, on every chip for all rows."""
        return spmd.reshard(tensor, 0, REPLICATED, self._num_chips)

    def _by_rows(self, logits: Tensor) -> Tensor:
        """From what chips have of the vocabulary, without the columns that padded it."""
        rows = spmd.reshard(logits, 1, 0, self._num_chips)[:, : self._vocab_size]
        return spmd.to_global(rows, 0, self._num_chips)

    def _shares(self) -> dict[str, Tensor]:
        return {
            name: spmd.to_local(tensor, self._places[name], self._num_chips) for name, tensor in self._weights.items()
        }


class _Model(nn.Module):
    """A module, because torch calls only those with other tensors than their own."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, step: StepInput, kv_caches: list[KVCache]) -> tuple[Tensor, Tensor]:
        """Logits of the sampled rows, and hidden states."""
        hidden: Tensor = self.model(step.batch, kv_caches)
        return self.model.logits(hidden[step.sample_index]), hidden


class _Head(nn.Module):
    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab]."""
        return self.model.logits(hidden)


def _of_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}
