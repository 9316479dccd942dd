import pytest
import torch

from torchinfer import kernels
from torchinfer.testing import assert_close


def by_hand(x, angles, is_interleaved):
    """Each pair as a complex number, turned by its angle."""
    half = angles.shape[-1]
    result = x.double().clone()
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if is_interleaved else (i, half + i)
        pair = torch.complex(x[..., first].double(), x[..., second].double())
        turned = pair * torch.polar(torch.ones_like(angles[:, i]), angles[:, i])[:, None]
        result[..., first], result[..., second] = turned.real, turned.imag
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "size", "rotated"), [(1, 1, 2, 2), (63, 5, 24, 24), (4, 3, 24, 10)])
def test_equals_complex_rotation(tokens, heads, size, rotated, is_interleaved, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, heads, size, generator=generator).to(dtype)
    angles = torch.randn(tokens, rotated // 2, generator=generator, dtype=torch.float64) * 10
    actual = kernels.rotary_embedding(x, angles.cos().float(), angles.sin().float(), is_interleaved)
    assert actual.dtype == dtype
    assert_close(actual, by_hand(x, angles, is_interleaved))


def test_values_beyond_the_rotated_part_pass_through():
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    actual = kernels.rotary_embedding(x, torch.zeros(3, 4), torch.ones(3, 4), False)
    assert torch.equal(actual[..., 8:], x[..., 8:])
