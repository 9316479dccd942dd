"""Rotation of queries and keys, and keys and values into their slots: two ops of the door, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from torchinfer.kernels.reference.rotary_embedding import rotary_embedding
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages

if TYPE_CHECKING:
    from torchinfer.batch import KVCache


def rotate_and_write(
    query_key: Tensor,  # [T, H + K, D]
    value: Tensor,  # [T, K, D]
    cos: Tensor,  # [T, F] float32
    sin: Tensor,  # [T, F] float32
    is_interleaved: bool,
    kv_cache: KVCache,  # written in place
    slot: Tensor,  # [T] int32
) -> Tensor:  # [T, H, D]
    """See the door."""
    num_kv_heads = value.shape[1]
    rotated = rotary_embedding(query_key, cos, sin, is_interleaved)
    write_kv_pages(rotated[:, -num_kv_heads:], value, kv_cache, slot)
    return rotated[:, :-num_kv_heads]
