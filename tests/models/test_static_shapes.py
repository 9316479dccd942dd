"""Whole models over the formulations with static shapes, padded, as XLA runs them."""

import pytest
import torch

from torchinfer import kernels
from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.testing import PagedDriver, Row, assert_close, make_batch, save_random_checkpoint, tiny_config


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each model counts as a recompilation of the same forward."""
    torch._dynamo.reset()


@pytest.fixture
def static_kernels(monkeypatch):
    """The ports of XLA on the CPU."""
    return lambda: monkeypatch.setitem(kernels._loaded, "cpu", kernels.load_ports("xla"))


@pytest.mark.parametrize("name", ["llama", "llama-dynamic", "gemma2", "gemma3", "gptj", "falcon-new", "qwen2-moe"])
def test_padded_static_step_equals_eager_and_traces_as_one_graph(name, static_kernels, tmp_path):
    save_random_checkpoint(tiny_config(name), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, 160, (length,), generator=generator).tolist() for length in (9, 40))
    expected = PagedDriver(model).step({"first": first, "second": second})
    static_kernels()
    rows = [Row(first, 0, [3, 1], 9), Row(second, 0, [2, 5, 4, 8, 7], 40)]
    batch = make_batch(rows, 8, num_padded_tokens=15, num_padded_rows=6, is_static=True)
    caches = PagedDriver(model, num_pages=10).kv_caches
    with torch.inference_mode():
        hidden = torch.compile(model, fullgraph=True, backend="eager")(batch, caches)
        logits = model.logits(hidden)
    assert hidden.isfinite().all()
    assert_close(logits[:49], torch.cat((expected["first"], expected["second"])))
