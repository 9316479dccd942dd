"""The forward pass of a divided model, as one program on all chips.

What goes in and out is whole: a step, ids, hidden states and logits are the same on every chip. Parameters and caches
are cut. Between, each chip computes its own model from its shares, as on one chip.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.func import functional_call

from torchinfer import spmd
from torchinfer.batch import KernelPages, KVCache
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import DividedModel, connect
from torchinfer.spmd import REPLICATED, STACKED
from torchinfer.step_input import StepInput, StepShape, unpack

COUNTER = "num_dropped"  # the ends of the names of buffers that a forward pass writes to


class SpmdStep:
    """Functions of tensors that are on all chips. `state` is what a step changes: the caches' tensors, layer by layer,
    then `counters`."""

    def __init__(self, model: DividedModel, page_size: int, pages: KernelPages | None = None) -> None:
        self._num_chips, self._vocab_size, self._page_size = model.num_chips, model.whole.config.vocab_size, page_size
        self._num_layers, self._pages = model.local.config.num_layers, pages
        self._places = {name: division.place for name, division in model.divisions.items()}
        self._counters = [name for name in model.tensors if name.endswith(COUNTER)]
        self._weights = {name: tensor for name, tensor in model.tensors.items() if name not in self._counters}
        self.counters = [model.tensors[name] for name in self._counters]
        connect(model.local, partial(spmd.all_reduce, num_chips=model.num_chips))
        self._model, self._model_head = _Model(model.local), _Head(model.local)

    def forward(
        self, ints: Tensor, last_ids: Tensor, state: list[Tensor], shape: StepShape
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits [R, V], hidden states [T, H], and the state afterwards, in the same memory where it is donated."""
        step = unpack(self._everywhere(ints), shape, self._page_size, None).fed(self._everywhere(last_ids))
        num_written = len(state) - len(self._counters)
        written = [spmd.to_local(tensor, STACKED, self._num_chips) for tensor in state[:num_written]]
        counted = [self._everywhere(tensor) for tensor in state[num_written:]]
        tensors = self._shares() | dict(zip(self._counters, counted, strict=True))
        size = num_written // self._num_layers
        layers = [written[at : at + size] for at in range(0, num_written, size)]
        caches = [KVCache(layer[0], layer[1] if size > 1 else None, self._pages) for layer in layers]
        logits, hidden = functional_call(self._model, _of_model(tensors), (step, caches))
        after = [spmd.to_global(tensor, STACKED, self._num_chips) for tensor in written]
        after += [self._from_all(tensor) for tensor in counted]
        return self._whole(logits), self._from_all(hidden), after

    def head(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits of some rows of hidden states."""
        chosen = self._everywhere(hidden)[self._everywhere(rows)]
        return self._whole(functional_call(self._model_head, _of_model(self._shares()), (chosen,)))

    def _everywhere(self, tensor: Tensor) -> Tensor:
        return spmd.to_local(tensor, REPLICATED, self._num_chips)

    def _from_all(self, tensor: Tensor) -> Tensor:
        return spmd.to_global(tensor, REPLICATED, self._num_chips)

    def _whole(self, logits: Tensor) -> Tensor:
        """What chips have of the vocabulary, together, without the rows that padded it."""
        return spmd.gather(logits, 1, self._num_chips)[:, : self._vocab_size]

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
