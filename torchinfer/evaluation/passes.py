"""Passes of a model over planned steps that give hidden states and logits, as runners do, but sample nothing.

EagerPass has exact shapes, XlaPass one padded shape: two programs are compiled at its first step, none later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from torchinfer.batch import KVCache, split_layers
from torchinfer.device import mark_as_donated
from torchinfer.models.decoder import Decoder
from torchinfer.scheduler import Plan
from torchinfer.step_input import Ints, StepShape, pack, unpack
from torchinfer.xla_program import CompiledFunction

DECODE_REQUESTS, DECODE_LENGTH = 8, 64  # at most, where the speed of decoding is measured
LOGITS_ROWS = 128  # at a time: bounds the memory for [rows, vocabulary]


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the steps. Pages suffice for all requests that a step can have, so that none is preempted."""

    page_size: int
    max_requests: int
    max_tokens: int  # of a step
    max_length: int  # of a request
    num_pages: int

    @classmethod
    def of(cls, page_size: int, max_tokens: int, context: int) -> Self:
        """For windows of `context` tokens: those of a step are one that was begun and those that begin."""
        num_windows = 1 + -(-max_tokens // context)
        num_pages = 1 + max(num_windows, DECODE_REQUESTS * DECODE_LENGTH // context) * -(-context // page_size)
        return cls(page_size, max(num_windows, DECODE_REQUESTS), max(max_tokens, DECODE_REQUESTS), context, num_pages)

    @property
    def table_width(self) -> int:
        return -(-self.max_length // self.page_size)


class Pass(Protocol):
    """A model with its caches."""

    def forward(self, plan: Plan, page_table: Ints) -> Tensor:
        """Hidden states [at least plan.num_tokens, hidden]."""

    def logits(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """[end - start, vocabulary] float32, of at most LOGITS_ROWS tokens, where arithmetic in float64 is possible."""


class EagerPass:
    """CPU and CUDA."""

    def __init__(self, model: Decoder, kv_caches: list[KVCache], layout: Layout, device: torch.device) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._layout = layout
        self._device = device

    @torch.inference_mode()
    def forward(self, plan: Plan, page_table: Ints) -> Tensor:
        page_size = self._layout.page_size
        num_requests = len(plan.decodes) + len(plan.chunks)
        shape = StepShape(plan.num_tokens, num_requests, -(-plan.max_kv_length // page_size))
        packed = torch.from_numpy(pack(plan, page_table, page_size, shape).packed).to(self._device)
        step = unpack(packed[: shape.num_forward], shape, page_size, plan)
        hidden: Tensor = self._model(step.batch, self._kv_caches)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, start: int, end: int) -> Tensor:
        return self._model.logits(hidden[start:end])


class XlaPass:
    """Logits come to the host, for XLA devices may lack float64."""

    def __init__(self, model: Decoder, kv_caches: list[KVCache], layout: Layout) -> None:
        self._model = model
        self._caches, self._pages = [tensor for cache in kv_caches for tensor in cache.tensors], kv_caches[0].pages
        self._page_size = layout.page_size
        self._shape = StepShape(max(layout.max_tokens, layout.max_requests), layout.max_requests, layout.table_width)
        self._forward = CompiledFunction(self._forward_eager)
        self._head = CompiledFunction(self._head_eager)

    @torch.no_grad()
    def forward(self, plan: Plan, page_table: Ints) -> Tensor:
        packed = pack(plan, page_table, self._page_size, self._shape).packed
        *self._caches, hidden = self._forward(torch.from_numpy(packed[: self._shape.num_forward]), *self._caches)
        return hidden

    @torch.no_grad()
    def logits(self, hidden: Tensor, start: int, end: int) -> Tensor:
        rows = np.full(LOGITS_ROWS, start, np.int32)
        rows[: end - start] = np.arange(start, end)
        (logits,) = self._head(hidden, torch.from_numpy(rows))
        return logits.cpu()[: end - start]

    def _forward_eager(self, ints: Tensor, *caches: Tensor) -> list[Tensor]:
        mark_as_donated(list(caches))
        kv_caches = split_layers(caches, self._model.config.num_layers, self._pages)
        hidden: Tensor = self._model(unpack(ints, self._shape, self._page_size, None).batch, kv_caches)
        return [*caches, hidden]

    def _head_eager(self, hidden: Tensor, rows: Tensor) -> list[Tensor]:
        return [self._model.logits(hidden[rows])]


def make_pass(model: Decoder, kv_caches: list[KVCache], layout: Layout, device: torch.device) -> Pass:
    """The pass of a device."""
    if device.type == "xla":
        return XlaPass(model, kv_caches, layout)
    return EagerPass(model, kv_caches, layout, device)
