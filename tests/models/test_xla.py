"""Models on an XLA device (XLA:CPU will do): compiled as one graph, equal to the CPU."""

import pytest
import torch

from torchinfer import kernels
from torchinfer.batch import split_layers
from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.testing import PagedDriver, Row, assert_close, make_batch, save_random_checkpoint, tiny_config
from torchinfer.xla_program import CompiledFunction

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")
NAMES = ["llama-dynamic", "gemma3", "gptj", "falcon-new", "qwen2-moe"]


@pytest.mark.parametrize("name", NAMES)
def test_padded_step_equals_cpu(name, tmp_path):
    save_random_checkpoint(tiny_config(name), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    config = ModelConfig.from_dict(checkpoint.config)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(3, 160, (length,), generator=generator).tolist() for length in (9, 40))
    model = load_model(checkpoint, config, torch.float32, torch.device("cpu"))
    expected = PagedDriver(model).step({"first": first, "second": second})
    device = torch.device("xla")
    kernels.load_ports("xla")
    on_device = load_model(checkpoint, config, torch.float32, device)
    rows = [Row(first, 0, [3, 1], 9), Row(second, 0, [2, 5, 4, 8, 7], 40)]
    batch = make_batch(rows, 8, num_padded_tokens=15, num_padded_rows=6, is_static=True, device=device)
    caches = PagedDriver(on_device, num_pages=10).kv_caches

    def forward(*tensors):
        return [*tensors, on_device(batch, split_layers(tensors, config.num_layers, None))]

    *_, hidden = CompiledFunction(forward)(*(tensor for cache in caches for tensor in cache.tensors))
    with torch.no_grad():
        logits = on_device.logits(hidden).cpu()
    assert hidden.cpu().isfinite().all()
    assert_close(logits[:49], torch.cat((expected["first"], expected["second"])))
