"""What ops take as one argument: the tensors of a step, a layer's cache, and how tokens are chosen.

A step is flat and ragged, T tokens of R requests.

Rows are ordered: requests that decode (one token each) first, then those with a chunk of their prompt. On XLA T and
R are padded to buckets; a padded token has slot 0 (page 0 belongs to nobody), position 0 and the last row's index.
Where all rows decode, CPU and CUDA may pad too: with rows of one token in slot 0, which are like any other.

      tokens of row r:  [query_start[r], query_start[r + 1])
      its context:      [0, kv_length[r])     of which the last ones are these tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of a forward pass. Page p holds slots [p * page_size, (p + 1) * page_size)."""

    tokens: Tensor  # [T] int32
    positions: Tensor  # [T] int32, from 0
    slot: Tensor  # [T] int32, where this token's key and value go
    row: Tensor  # [T] int32, the request row that each token belongs to
    rope_length: Tensor  # [T] int32, max(prompt length, position + 1): what dynamic rope scaling looks at
    query_start: Tensor  # [R + 1] int32
    kv_length: Tensor  # [R] int32, 0 in padded rows
    page_table: Tensor  # [R, max_pages] int32
    page_size: int
    # What the host knows without asking the device; None where shapes must not depend on it (XLA).
    num_decodes: int | None = None  # rows [0, num_decodes) have one token each
    max_decode_kv_length: int | None = None  # at least that of the longest of those rows
    prefills: tuple[tuple[int, int, int, int], ...] | None = None  # (row, first token, end token, kv_length)


class KernelPages(NamedTuple):
    """Pages in a layout of a kernel's own: everything of a page is one blob of rows of 128 words of 32 bits."""

    dtype: str  # of the keys and values in them: bfloat16, int8, float8_e4m3fn
    num_rows: int
    num_tokens: int
    num_cores: int  # of a TPU that the kernel runs on; 0: plain operations over the same pages, for other devices


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of one layer, in P pages; ops write all tensors in place.

    With a scale, what is stored is `data * scale`: int8 in [-127, 127], or float8_e4m3fn. Each token and KV head has
    a scale of its own, so that a row depends on nothing but itself.
    """

    data: Tensor  # [2, P, page_size, K, D]: keys, values; with `pages` int32 [P, num_rows, 128], scales included
    scale: Tensor | None = None  # [2, P, page_size, K] float32; None: data is what is stored
    pages: KernelPages | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is allocated."""
        return (self.data,) if self.scale is None else (self.data, self.scale)


def split_layers(tensors: Sequence[Tensor], num_layers: int, pages: KernelPages | None) -> list[KVCache]:
    """The caches that have these tensors, layer by layer."""
    size = len(tensors) // num_layers
    layers = [tensors[at : at + size] for at in range(0, len(tensors), size)]
    return [KVCache(layer[0], layer[1] if size > 1 else None, pages) for layer in layers]


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Parameters of the rows that sample."""

    temperature: Tensor  # [R] float32, 0 is greedy
    top_k: Tensor  # [R] int32, 0 keeps all
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    uniform: Tensor  # [R] float32 in [0, 1)

    def first(self, count: int) -> SamplingTensors:
        """The first `count` rows."""
        values = (self.temperature, self.top_k, self.top_p, self.min_p, self.uniform)
        return SamplingTensors(*(value[:count] for value in values))
