"""Matrix products of row groups, each with its own matrix (arXiv 2211.15841)."""

from torch import Tensor
from torch.nn import functional


def grouped_matmul(
    x: Tensor,  # [N, I], rows sorted by group
    weight: Tensor,  # [E, O, I]
    group_sizes: Tensor,  # [E] int32
) -> Tensor:
    """See the door. Reads the sizes on the host: on an accelerator that is a synchronization."""
    result = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for group, size in enumerate(group_sizes.tolist()):
        if size:
            result[start : start + size] = functional.linear(x[start : start + size], weight[group])
        start += size
    return result
