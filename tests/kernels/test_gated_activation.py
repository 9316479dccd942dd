import math

import pytest
import torch

from torchinfer import kernels
from torchinfer.testing import assert_close

BY_HAND = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", BY_HAND)
@pytest.mark.parametrize("shape", [(1, 2), (7, 126)])
def test_equals_float64_by_hand(shape, activation, dtype):
    gate_up = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    expected = torch.tensor([[BY_HAND[activation](v) for v in row] for row in gate.tolist()]).double() * up
    assert_close(kernels.gated_activation(gate_up, activation), expected)
