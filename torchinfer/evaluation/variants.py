"""The weight schemes and cache dtypes that can be compared: their names, and how a model and a cache of each is made.

The only file of the evaluation that knows how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchinfer.kv_cache.tensors import allocate, page_bytes
from torchinfer.loader import LoadOptions, load_model
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder

UNQUANTIZED = "none"
SCHEMES = (UNQUANTIZED,)


def cache_dtypes(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the cache dtypes that a model of `dtype` can have; the first is its own."""
    return (str(dtype).removeprefix("torch."),)


def load_scheme(
    scheme: str,
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_memory: int,
    progress: bool,
) -> Decoder:
    """The model with its weights in a scheme."""
    assert scheme in SCHEMES, scheme
    options = LoadOptions(memory=load_memory)
    return load_model(checkpoint, model_config, dtype, device, options=options, progress=progress)


def allocate_caches(
    cache_dtype: str,
    model_config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    """One cache a layer, as `Decoder.forward` takes them."""
    assert cache_dtype in cache_dtypes(dtype), cache_dtype
    return allocate(model_config, num_pages, page_size, dtype, device)


def cache_bytes_per_1000_tokens(cache_dtype: str, model_config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Keys, values and what a cache dtype needs beside them, over all layers."""
    assert cache_dtype in cache_dtypes(dtype), cache_dtype
    return 1000 * page_bytes(model_config, page_size, dtype) // page_size


def weight_bytes(model: Decoder) -> int:
    """Bytes of parameters and persistent buffers, what is shared counted once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
