"""In bfloat16 our logits are as near to the float32 truth as transformers' are."""

import copy

import pytest
import torch

from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.testing import PagedDriver, save_random_checkpoint, tiny_config


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gemma2", "gemma3", "gptj", "falcon-7b", "mistral"])
def test_bfloat16_error_is_that_of_transformers(name, tmp_path):
    truth = save_random_checkpoint(tiny_config(name), tmp_path)
    theirs = copy.deepcopy(truth).to(torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    ours = load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.bfloat16, torch.device("cpu"))
    prompt = torch.randint(3, 160, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = truth(torch.tensor([prompt])).logits[0]
        their_error = (theirs(torch.tensor([prompt])).logits[0].float() - expected).square().mean().sqrt()
    our_error = (PagedDriver(ours).step({"a": prompt})["a"] - expected).square().mean().sqrt()
    assert our_error <= 1.2 * their_error
