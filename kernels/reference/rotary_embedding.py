"""Rotary position embedding (arXiv 2104.09864)."""

import torch
from torch import Tensor


def rotary_embedding(
    x: Tensor,  # [T, heads, D]
    cos: Tensor,  # [T, F] float32
    sin: Tensor,  # [T, F] float32
    is_interleaved: bool,
) -> Tensor:
    """See the door. Computed in float32, rounded once."""
    num_rotated = 2 * cos.shape[-1]
    rotated = x[..., :num_rotated].float()
    cos, sin = cos[:, None], sin[:, None]
    if is_interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, -1)
    new_first = torch.addcmul(first * cos, second, sin, value=-1)
    new_second = torch.addcmul(second * cos, first, sin)
    if is_interleaved:
        result = torch.stack((new_first, new_second), -1).flatten(-2).to(x.dtype)
    else:
        result = torch.cat((new_first, new_second), -1).to(x.dtype)
    if num_rotated == x.shape[-1]:
        return result
    return torch.cat((result, x[..., num_rotated:]), -1)
