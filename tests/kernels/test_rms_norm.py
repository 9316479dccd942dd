import pytest
import torch

from torchinfer import kernels
from torchinfer.testing import assert_close


def by_hand(x, weight, epsilon, offset):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 63), (5, 3, 24), (0, 8), (500, 1)])
def test_equals_float64_by_hand(shape, offset, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    actual = kernels.rms_norm(x, weight, 1e-6, offset)
    assert actual.dtype == dtype
    assert_close(actual, by_hand(x, weight, 1e-6, offset))


def test_equals_transformers_llama_in_bfloat16():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(48, 1e-5).to(torch.bfloat16)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    assert torch.equal(kernels.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_equals_transformers_gemma_in_bfloat16():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    norm = Gemma2RMSNorm(48, 1e-5).to(torch.bfloat16)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    assert torch.equal(kernels.rms_norm(x, norm.weight, 1e-5, 1.0), norm(x))
