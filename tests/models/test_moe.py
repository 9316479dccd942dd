"""Routing, dropless and with a capacity, against token-by-token float64."""

import math

import pytest
import torch

from torchinfer.models.config import MoEConfig
from torchinfer.models.moe import MoE
from torchinfer.testing import assert_close

HIDDEN, EXPERTS, TOP_K = 12, 4, 2


def make_layer(mode="dropless", factor=1.25, is_normalized=True):
    config = MoEConfig(
        num_experts=EXPERTS,
        top_k=TOP_K,
        intermediate_size=7,
        is_normalized=is_normalized,
        mode=mode,
        capacity_factor=factor,
    )
    layer = MoE(HIDDEN, config, "silu")
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return layer


def make_input(num_tokens, num_padded=0):
    is_live = torch.arange(num_tokens + num_padded) < num_tokens
    return torch.randn(num_tokens + num_padded, HIDDEN, generator=torch.Generator().manual_seed(1)), is_live


def choices(layer, x):
    scores = torch.softmax(x.double() @ layer.router.weight.double().T, -1)
    weights, experts = scores.topk(TOP_K)
    if layer.config.is_normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts.tolist()


def by_hand(layer, x, capacity=math.inf):
    """First choices of all tokens in order, then second choices; what finds its expert full is dropped."""
    weights, experts = choices(layer, x)
    result = torch.zeros(x.shape, dtype=torch.float64)
    load, num_dropped = [0] * EXPERTS, 0
    for choice in range(TOP_K):
        for token in range(len(x)):
            expert = experts[token][choice]
            load[expert] += 1
            if load[expert] > capacity:
                num_dropped += 1
                continue
            gate, up = (layer.experts.gate_up[expert].double() @ x[token].double()).chunk(2)
            inner = gate / (1 + torch.exp(-gate)) * up
            result[token] += weights[token, choice] * (layer.experts.down[expert].double() @ inner)
    return result, num_dropped


@pytest.mark.parametrize("is_normalized", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 63])
def test_dropless_computes_every_token(num_tokens, is_normalized):
    layer = make_layer(is_normalized=is_normalized)
    x, is_live = make_input(num_tokens)
    assert_close(layer(x, is_live), by_hand(layer, x)[0], torch.float32)


@pytest.mark.parametrize("factor", [0.3, 0.75, 1.0, 1.25])
@pytest.mark.parametrize("num_tokens", [1, 10, 33])
def test_capacity_drops_in_order_and_counts(num_tokens, factor):
    layer = make_layer("capacity", factor)
    x, is_live = make_input(num_tokens)
    expected, num_dropped = by_hand(layer, x, math.ceil(TOP_K * num_tokens / EXPERTS * factor))
    assert_close(layer(x, is_live), expected, torch.float32)
    assert layer.num_dropped.item() == num_dropped
    assert num_dropped > 0 or factor > 1 or num_tokens == 1


def test_dropped_tokens_add_up_over_steps():
    layer = make_layer("capacity", 0.5)
    x, is_live = make_input(20)
    layer(x, is_live)
    once = layer.num_dropped.item()
    layer(x, is_live)
    assert layer.num_dropped.item() == 2 * once > 0


def test_ample_capacity_equals_dropless():
    x, is_live = make_input(33)
    layer = make_layer("capacity", 4.0)
    assert torch.equal(layer(x, is_live), make_layer()(x, is_live))
    assert layer.num_dropped.item() == 0


@pytest.mark.parametrize("mode", ["dropless", "capacity"])
def test_padded_tokens_are_routed_nowhere_and_take_no_capacity(mode):
    layer = make_layer(mode, 0.5)
    x, is_live = make_input(10, num_padded=6)
    padded = layer(x, is_live)
    dropped = layer.num_dropped.item()
    alone = make_layer(mode, 0.5)
    assert_close(padded[:10], alone(x[:10], make_input(10)[1]))
    assert padded[10:].count_nonzero() == 0
    assert dropped == alone.num_dropped.item()


def test_counter_is_int64_and_no_part_of_a_checkpoint():
    layer = make_layer()
    assert layer.num_dropped.dtype == torch.int64
    assert "num_dropped" not in layer.state_dict()
