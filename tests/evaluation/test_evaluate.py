"""Measuring: transformers and arithmetic in float64 as the truth, on the same windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from torchinfer import kernels
from torchinfer.device import count_compilations, resolve_device
from torchinfer.evaluation.driver import Driver
from torchinfer.evaluation.evaluate import Result, evaluate, measure
from torchinfer.evaluation.inputs import Inputs
from torchinfer.evaluation.metrics import TokenScores
from torchinfer.evaluation.options import EvaluationOptions
from torchinfer.evaluation.passes import Layout, make_pass
from torchinfer.evaluation.store import ReferenceStore
from torchinfer.evaluation.variants import allocate_caches, load_scheme, weight_bytes
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.models.decoder import Decoder

from .conftest import Tiny, make_tiny

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"


def perturb(model: torch.nn.Module) -> None:
    """Do what a bad quantization would do."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def pair(reference: Decoder, model: Decoder, inputs: Inputs, layout: Layout) -> tuple[TokenScores, TokenScores, Result]:
    """Scores of both, and the second one's result."""
    with ReferenceStore(inputs.num_scored, inputs.model_config.vocab_size, "float32", None) as store:
        first, _ = measure(reference, "none", "float32", inputs, layout, store, None)
        second, result = measure(model, "none", "float32", inputs, layout, store, first)
    return first, second, result


def logits_of(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    """What transformers' model predicts each scored token from, [num_scored, vocab] float64, window by window."""
    rows = []
    for window in inputs.windows:
        tokens = inputs.prefix[: window.num_prefix] + inputs.token_ids[window.start : window.end]
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0].double()
        rows.append(logits[window.context_of(window.first) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("name", "stride", "max_tokens"),
    [("llama", 17, 24), ("llama", 39, 24), ("qwen3-moe", 39, 100), ("mistral", 17, 24), ("gemma2", 39, 100)],
)
def test_nll_is_that_of_transformers_on_the_same_windows(name, stride, max_tokens, tmp_path):
    tiny = make_tiny(name, tmp_path)
    inputs = tiny.inputs(num_tokens=131, context=40, stride=stride)
    layout = Layout.of(page_size=8, max_tokens=max_tokens, context=40)
    scores, result = measure(tiny.load(), "none", "float32", inputs, layout, None, None)
    expected = torch.log_softmax(logits_of(tiny.theirs, inputs), -1)
    targets = torch.tensor(inputs.token_ids[1:])
    np.testing.assert_allclose(scores.nll, -expected.gather(-1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    assert result.overall.num_tokens == 130


def test_perplexity_is_the_exponential_of_transformers_own_loss(tiny: Tiny, layout: Layout):
    inputs = tiny.inputs(num_tokens=40, context=40, stride=39)
    ids = torch.tensor([inputs.token_ids])
    with torch.inference_mode():
        loss = tiny.theirs(ids, labels=ids).loss
    result = measure(tiny.load(), "none", "float32", inputs, layout, None, None)[1]
    assert result.overall.perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [24, 600])
def test_no_token_is_computed_twice(max_tokens, tiny: Tiny):
    inputs = tiny.inputs(num_tokens=1200, context=250, stride=249)
    layout = Layout.of(page_size=8, max_tokens=max_tokens, context=250)
    caches = allocate_caches("float32", tiny.config, layout.num_pages, 8, torch.float32, inputs.device)
    driver = Driver(make_pass(tiny.load(), caches, layout, inputs.device), layout, inputs.device)
    num_scored = sum(len(scored.logits) for scored in driver.score(inputs.windows, [], inputs.token_ids))
    assert num_scored == 1199
    assert driver.num_tokens == sum(window.num_tokens for window in inputs.windows)


def test_windows_begin_with_the_prefix(tiny: Tiny, layout: Layout):
    inputs = tiny.inputs(num_tokens=90, context=40, stride=20, prefix=(1,))
    scores, _ = measure(tiny.load(), "none", "float32", inputs, layout, None, None)
    expected = torch.log_softmax(logits_of(tiny.theirs, inputs), -1)
    np.testing.assert_allclose(
        scores.nll, -expected.gather(-1, torch.tensor(inputs.token_ids)[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )


def test_a_model_has_kl_0_and_the_same_top1_as_itself(tiny: Tiny, layout: Layout):
    inputs = tiny.inputs(num_tokens=131, context=40, stride=17)
    first, second, result = pair(tiny.load(), tiny.load(), inputs, layout)
    assert second.kl.tolist() == [0.0] * 130
    assert result.overall.top1.mean == 1.0
    assert np.array_equal(first.nll, second.nll)


def test_kl_and_top1_of_another_model_are_those_of_transformers_in_float64(tmp_path: Path, layout: Layout):
    tiny = make_tiny("llama", tmp_path / "reference")
    inputs = tiny.inputs(num_tokens=131, context=40, stride=17)
    p = torch.log_softmax(logits_of(tiny.theirs, inputs), -1)
    perturb(tiny.theirs)
    q = torch.log_softmax(logits_of(tiny.theirs, inputs), -1)
    tiny.theirs.save_pretrained(tmp_path / "perturbed")
    other = Checkpoint.open(tmp_path / "perturbed")
    _, scores, result = pair(tiny.load(), replace(tiny, checkpoint=other).load(), inputs, layout)
    expected = (p.exp() * (p - q)).sum(-1).numpy()
    np.testing.assert_allclose(scores.kl, expected, rtol=1e-3, atol=1e-5)
    assert result.overall.kl.mean == pytest.approx(expected.mean(), rel=1e-4)
    share = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result.overall.top1.mean == pytest.approx(share)
    assert 0 < share < 1


def test_a_tied_table_counts_once_among_the_bytes_of_weights(tmp_path: Path):
    model = make_tiny("llama-tied", tmp_path).load()
    assert weight_bytes(model) == 4 * sum(parameter.numel() for parameter in model.parameters())
    model.register_buffer("scale", torch.zeros(3, dtype=torch.int8))
    assert weight_bytes(model) == 4 * sum(parameter.numel() for parameter in model.parameters()) + 3


def test_1000_tokens_of_cache_have_keys_and_values_of_every_layer(tiny: Tiny, layout: Layout):
    inputs = tiny.inputs(num_tokens=41, context=40, stride=39)
    result = measure(tiny.load(), "none", "float32", inputs, layout, None, None)[1]
    assert result.kv_bytes_per_1000_tokens == 1000 * 2 * 3 * 2 * 16 * 4  # layers, heads, head size, bytes


def test_the_reference_is_the_model_as_stored_and_positions_cover_all_tokens(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return 1\n" * 40, encoding="utf-8")
    options = EvaluationOptions(
        model=MODEL, text=text, context=64, max_tokens=200, device="cpu", dtype="float32", progress=False
    )
    found = evaluate(options)
    assert [(r.scheme, r.kv, r.is_reference) for r in found.results] == [("none", "float32", True)]
    buckets = found.results[0].by_context
    assert sum(bucket.summary.num_tokens for bucket in buckets) == found.facts["num_scored_tokens"] == 199
    assert (buckets[0].first, buckets[-1].last) == (1, 63)
    assert found.results[0].prefill_tokens_per_second > 0 < found.results[0].decode_tokens_per_second


@pytest.mark.xla
def test_xla_gives_the_scores_of_the_cpu_in_two_programs(tiny: Tiny, layout: Layout):
    inputs = tiny.inputs(num_tokens=131, context=40, stride=17)
    expected, _ = measure(tiny.load(), "none", "float32", inputs, layout, None, None)
    device = resolve_device("xla")
    kernels.load_ports("xla")
    on_xla = replace(inputs, device=device)
    model = load_scheme("none", tiny.checkpoint, tiny.config, torch.float32, device, 64 << 20, False)
    before = count_compilations()
    scores, _ = measure(model, "none", "float32", on_xla, layout, None, None)
    np.testing.assert_allclose(scores.nll, expected.nll, rtol=1e-4, atol=1e-4)
    assert count_compilations() - before <= 2 + 1  # the caches' zeros
