"""Store keys and values as rows of one dimension: along the second one, as the reference does it, XLA transposes
the whole cache to write a token, and back."""

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
    data, scale = kv_cache.data, kv_cache.scale
    rows = torch.cat((key, value))
    index = torch.cat((slot, slot + data.shape[1] * data.shape[2])).long()
    slots = data.view(-1, *data.shape[3:])  # [2 * P * page_size, K, D]
    if scale is None:
        slots.index_copy_(0, index, rows.to(data.dtype))
        return
    quantized, row_scale = quantize_rows(rows, data.dtype)
    slots[index] = quantized  # index_copy_ has no float8 on the CPU, where tests run this
    scale.view(-1, scale.shape[3]).index_copy_(0, index, row_scale)
