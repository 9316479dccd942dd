"""The weight schemes and cache dtypes that can be compared: their names, and how a model and a cache of each is made.

The only file of the evaluation that knows how.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from torchinfer import quantization
from torchinfer.batch import KVCache
from torchinfer.device import dtype_name, tensor_cores
from torchinfer.errors import ConfigError
from torchinfer.kv_cache.tensors import (
    DTYPES,
    allocate,
    kernel_pages,
    page_bytes,
    resolve_cache_dtype,
    resolve_page_size,
)
from torchinfer.loader import LoadOptions, load_model
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.schemes import choose_schemes
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder

UNQUANTIZED = "none"
SCHEMES = (UNQUANTIZED, *quantization.SCHEMES)


def cache_dtypes(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the cache dtypes that a model of `dtype` can have; the first is its own."""
    own = dtype_name(dtype)
    return (own, *(name for name in DTYPES if name != own))


def scheme_problems(schemes: Iterable[str], model_config: ModelConfig, device: torch.device) -> list[str]:
    """Why a model cannot be held in some of these schemes."""
    found = []
    with torch.device("meta"):
        model = build_model(model_config)
    for scheme in schemes:
        try:
            choose_schemes(model, scheme, device)
        except ConfigError as error:
            found.append(str(error))
    return found


def load_scheme(
    scheme: str,
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    load_memory: int | None,
    progress: bool,
) -> Decoder:
    """The model with its weights in a scheme."""
    assert scheme in SCHEMES, scheme
    options = LoadOptions(memory=load_memory)
    request = None if scheme == UNQUANTIZED else scheme
    return load_model(checkpoint, model_config, dtype, device, options=options, quantization=request, progress=progress)


def allocate_caches(
    cache_dtype: str,
    model_config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KVCache]:
    """One cache a layer, as `Decoder.forward` takes them."""
    stored = resolve_cache_dtype(cache_dtype, dtype, device)
    pages = kernel_pages(model_config, stored, tensor_cores(device))
    return allocate(model_config, num_pages, page_size, stored, device, pages)


def one_page_size(
    page_size: int | None, cache_dtypes: Iterable[str], model_config: ModelConfig, device: torch.device
) -> int:
    """A page size for caches of all these dtypes.

    Raises:
        ConfigError: the device's attention kernel takes pages of another size for one of them.
    """
    cores = tensor_cores(device)
    found = [kernel_pages(model_config, DTYPES[name], cores) for name in cache_dtypes]
    return resolve_page_size(page_size, next((pages for pages in found if pages is not None), None))


def cache_bytes_per_1000_tokens(
    cache_dtype: str, model_config: ModelConfig, page_size: int, device: torch.device
) -> int:
    """Keys, values and what a cache dtype and its pages need beside them, over all layers."""
    pages = kernel_pages(model_config, DTYPES[cache_dtype], tensor_cores(device))
    return 1000 * page_bytes(model_config, page_size, DTYPES[cache_dtype], pages) // page_size


def weight_bytes(model: Decoder) -> int:
    """Bytes of parameters and persistent buffers, what is shared counted once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
