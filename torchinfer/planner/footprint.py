"""What a model takes on each of `n` chips that divide it by tensor parallelism; nothing is allocated.

Each chip holds a model of its own sizes (torchinfer/parallel.py), built from the same modules and schemes as the
engine's, on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torchinfer.batch import KernelPages
from torchinfer.kv_cache.tensors import kernel_pages, page_bytes, resolve_page_size
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.models.layers import Linear
from torchinfer.models.moe import Experts
from torchinfer.parallel import local_config, refuse_copy
from torchinfer.planner.source import ModelSource
from torchinfer.quantization import QuantizedMatrix

LOGIT_COPIES = 4  # float32 of each logit while tokens are sampled: scores, filtered, sorted, cumulated


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix, or all experts', on one chip."""

    kind: str  # layer, expert, head
    num_weights: int
    num_bytes: int
    stored: torch.dtype
    operands: str  # what is multiplied: bfloat16, int8, fp8


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on one chip, and what steps compute there."""

    config: ModelConfig  # of one chip: its heads, its intermediate size, its rows of the vocabulary
    num_chips: int
    vocab_size: int
    itemsize: int  # bytes of an activation
    weight_bytes: int
    embedding_bytes: int  # of them; a step reads one row a token, unless the table is also the head
    products: tuple[Product, ...]
    page_size: int
    page_bytes: int
    cache_itemsize: int
    pages: KernelPages | None  # in which the TPU's attention kernel holds the cache

    @property
    def kv_bytes_per_token(self) -> int:
        """Of all layers: a layer with a window stores as many tokens as the others."""
        return self.page_bytes // self.page_size

    def request_bytes(self, length: int) -> int:
        """Cache of a request with so many tokens, in whole pages."""
        return -(-length // self.page_size) * self.page_bytes

    def activation_bytes(self, num_tokens: int, num_requests: int) -> int:
        """Of the widest place of a step: in a layer, or where tokens are sampled."""
        config, moe = self.config, self.config.moe
        heads = config.num_heads + 2 * config.num_kv_heads
        attention = 2 * heads * config.head_dim  # as they come out of the matrix, and rotated
        inner = max(config.intermediate_size, 0 if moe is None else moe.top_k * moe.intermediate_size)
        widest = 4 * config.hidden_size + max(attention, 3 * inner)  # gate, up and their product
        layer = num_tokens * widest * self.itemsize
        rows = -(-num_requests // self.num_chips)  # that a chip draws ids from
        logits = rows * self.vocab_size * torch.float32.itemsize * LOGIT_COPIES
        return max(layer, logits)


def footprint(
    source: ModelSource,
    num_chips: int,
    cache_dtype: torch.dtype,
    page_size: int | None = None,
    num_cores: int | None = None,  # of a TPU chip; None: another device
) -> Footprint:
    """Of a model without `partition_problems`.

    Raises:
        ConfigError, UnsupportedModelError: a scheme does not fit the shapes on one chip, or the page size its kernel,
            or the head of several chips is a copy of the embeddings.
    """
    local = local_config(source.config, num_chips)
    pages = kernel_pages(local, cache_dtype, num_cores)
    page_size = resolve_page_size(page_size, pages)
    model = source.build(local)
    if num_chips > 1:
        refuse_copy(model)
    embedding = model.embedding.weight.numel() * source.dtype.itemsize
    return Footprint(
        config=local,
        num_chips=num_chips,
        vocab_size=source.config.vocab_size,
        itemsize=source.dtype.itemsize,
        weight_bytes=sum(_tensor_bytes(tensor, source.dtype) for tensor in _tensors(model)),
        embedding_bytes=embedding,
        products=tuple(_products(model, source.dtype)),
        page_size=page_size,
        page_bytes=page_bytes(local, page_size, cache_dtype, pages),
        cache_itemsize=cache_dtype.itemsize,
        pages=pages,
    )


def _tensors(model: Decoder) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, QuantizedMatrix):
            yield from module.buffers()


def _tensor_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Parameters are built in torch's default dtype and loaded in the model's; buffers have their scheme's."""
    return tensor.numel() * (dtype.itemsize if isinstance(tensor, nn.Parameter) else tensor.itemsize)


def _products(model: Decoder, dtype: torch.dtype) -> Iterator[Product]:
    for module in model.modules():
        if isinstance(module, Linear):
            yield _product("head" if module is model.head else "layer", module.weight, dtype)
        elif isinstance(module, Experts):
            yield _product("expert", module.gate_up, dtype)
            yield _product("expert", module.down, dtype)
    if model.head is None:
        yield _product("head", model.embedding.weight, dtype)


def _product(kind: str, weight: object, dtype: torch.dtype) -> Product:
    if isinstance(weight, QuantizedMatrix):
        activations = weight.scheme.activations
        num_bytes = sum(_tensor_bytes(tensor, dtype) for tensor in weight.buffers())
        operands = "bfloat16" if activations == "none" else activations
        return Product(kind, weight.numel(), num_bytes, weight.scheme.values, operands)
    assert isinstance(weight, torch.Tensor)
    return Product(kind, weight.numel(), _tensor_bytes(weight, dtype), dtype, "bfloat16")
