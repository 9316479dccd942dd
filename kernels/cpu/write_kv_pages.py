"""Keys and values into the paged cache, quantized on the way, in the CPU library."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cpu.library import CACHE_DTYPES, DTYPES, check, loaded, require, with_dense_rows
from torchinfer.kernels.cpu.paged_attention import require_cache
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages as reference

if TYPE_CHECKING:
    from torchinfer.batch import KVCache


class WriteKvStruct(ctypes.Structure):
    """WriteKv of src/isa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("key", "value", "cache", "scale", "slot")),
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "kv_heads", "head_size", "key_stride", "value_stride", "slots")
        ),
        *((name, ctypes.c_int32) for name in ("dtype", "cache_dtype")),
    )


def write_kv_pages(
    key: Tensor,  # [T, K, D]
    value: Tensor,  # [T, K, D]
    kv_cache: KVCache,  # written in place
    slot: Tensor,  # [T] int32
) -> None:
    """See the door.

    Raises:
        ValueError: tensors do not fit together, or a slot is not in the cache; nothing was written then.
    """
    data, scale = kv_cache.data, kv_cache.scale
    if key.dtype not in DTYPES or data.dtype not in CACHE_DTYPES:
        reference(key, value, kv_cache, slot)
        return
    key, value, slot = with_dense_rows(key), with_dense_rows(value), slot.contiguous()
    is_fit = key.ndim == 3 and key.shape == value.shape and key.dtype == value.dtype and key.is_cpu and value.is_cpu
    is_fit = is_fit and data.ndim == 5 and data.shape[0] == 2 and key.shape[1:] == data.shape[3:]
    require(is_fit, "write_kv_pages takes key and value [T, K, D], a cache [2, P, page_size, K, D]", key, value, data)
    require(slot.shape == key.shape[:1] and slot.dtype == torch.int32 and slot.is_cpu, "slot is int32 [T]", slot, key)
    require_cache(kv_cache)
    task = WriteKvStruct(
        key.data_ptr(),
        value.data_ptr(),
        data.data_ptr(),
        None if scale is None else scale.data_ptr(),
        slot.data_ptr(),
        *key.shape,
        key.stride(0),
        value.stride(0),
        data.shape[1] * data.shape[2],
        DTYPES[key.dtype],
        CACHE_DTYPES[data.dtype],
    )
    check(loaded().torchinfer_cpu_write_kv(ctypes.byref(task)))
