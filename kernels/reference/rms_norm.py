"""Root mean square normalization (arXiv 1910.07467)."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [D]
    epsilon: float,
    offset: float,
) -> Tensor:
    """See the door. Where the product is rounded differs between Llama and Gemma, and shows in bfloat16."""
    if x.dtype == torch.float32 and not offset:
        return functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    normalized = functional.rms_norm(x.float(), x.shape[-1:], None, epsilon)
    if offset:
        return (normalized * (weight.float() + offset)).to(x.dtype)
    return normalized.to(x.dtype) * weight
