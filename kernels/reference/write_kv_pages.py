"""Store keys and values in their slots of the paged cache, as they are or quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.reference.quantize_rows import quantize_rows

if TYPE_CHECKING:
    from torchinfer.batch import KVCache


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
    quantized, row_scale = quantize_rows(rows, data.dtype)
    # As bytes: torch copies no float8 by index on the CPU.
    data.view(torch.int8).view(2, -1, *data.shape[3:]).index_copy_(1, slot, quantized.view(torch.int8))
    scale.view(2, -1, scale.shape[3]).index_copy_(1, slot, row_scale)
