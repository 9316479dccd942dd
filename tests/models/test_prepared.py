"""Models whose matrices are in the layout of the CPU library compute what they computed before."""

import pytest
import torch

from torchinfer import kernels
from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.quantization import SCHEMES
from torchinfer.testing import TINY, PagedDriver, assert_close, save_random_checkpoint, tiny_config

pytestmark = pytest.mark.skipif(
    kernels.prepare(torch.ones(1, 1)) is None, reason="the CPU library is not built, or not wanted"
)


def load(folder, dtype=torch.float32, **options) -> Decoder:
    checkpoint = Checkpoint.open(folder)
    return load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), dtype, torch.device("cpu"), **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_random_checkpoint(tiny_config("llama"), folder)
    return folder


def test_logits_and_greedy_ids_equal_transformers(case, prompt):
    ours = load(case.folder)
    ours.prepare()
    assert_close(PagedDriver(ours).step({"a": prompt})["a"], case.logits(prompt))
    assert PagedDriver(ours).greedy({"a": prompt}, 20)["a"] == case.greedy(prompt, 20)


def test_the_number_of_parameters_stays(case):
    ours = load(case.folder)
    before = ours.num_parameters()
    ours.prepare()
    ours.prepare()  # what is prepared stays so
    assert ours.num_parameters() == before


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_models_keep_their_logits(llama, prompt, scheme, dtype):
    if scheme in ("int4", "int4_g64", "int4_w4a8", "fp8_block", "fp8_block_w8a8"):
        pytest.skip("its groups are larger than the tiny model's layers")
    ours = load(llama, dtype, quantization=scheme)
    expected = PagedDriver(ours).step({"a": prompt})["a"]
    ours.prepare()
    scale = expected.abs().max()
    assert_close(PagedDriver(ours).step({"a": prompt})["a"] / scale, expected / scale, dtype)


def test_a_table_that_is_also_the_head_keeps_its_rows(tmp_path):
    name = next(name for name in TINY if tiny_config(name).tie_word_embeddings)
    save_random_checkpoint(tiny_config(name), tmp_path)
    ours = load(tmp_path)
    before = ours.embedding.weight.clone()
    ours.prepare()
    assert ours.prepared_head is not None
    assert torch.equal(ours.embedding.weight, before)


def test_float16_stays_with_the_reference(llama, prompt):
    ours = load(llama, torch.float16)
    expected = PagedDriver(ours).step({"a": prompt})["a"]
    ours.prepare()
    assert isinstance(ours.layers[0].mlp.down.weight, torch.nn.Parameter)
    assert torch.equal(PagedDriver(ours).step({"a": prompt})["a"], expected)
