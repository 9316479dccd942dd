"""Store keys and values in their slots of the paged cache, as they are or quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchinfer.batch import KVCache

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest value of a row becomes


def write_kv_pages(
    key: Tensor,  # [T, K, D]
    value: Tensor,  # [T, K, D]
    kv_cache: KVCache,  # written in place
    slot: Tensor,  # [T] int32
) -> None:
    """See the door. Padded tokens share slot 0, whose content nobody reads."""
    data, scale, rows = kv_cache.data, kv_cache.scale, torch.stack((key, value))
    slot = slot.long()
    if scale is None:
        data.view(2, -1, *data.shape[3:]).index_copy_(1, slot, rows.to(data.dtype))
        return
    quantized, row_scale = _quantize(rows, data.dtype)
    # As bytes: torch copies no float8 by index on the CPU.
    data.view(torch.int8).view(2, -1, *data.shape[3:]).index_copy_(1, slot, quantized.view(torch.int8))
    scale.view(2, -1, scale.shape[3]).index_copy_(1, slot, row_scale)


def _quantize(
    rows: Tensor,  # [2, T, K, D]
    dtype: torch.dtype,  # int8 or float8_e4m3fn
) -> tuple[Tensor, Tensor]:  # [2, T, K, D] of dtype, [2, T, K] float32
    """Each row of D values by its largest one. A row of zeros stays zeros; NaN and infinity make the scale so."""
    rows = rows.float()
    scale = (rows.abs().amax(-1) / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = rows / scale[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale
