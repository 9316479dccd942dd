"""A random tiny llama and what the evaluation makes of it, without a tokenizer: token ids are the text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from torchinfer.evaluation.inputs import Inputs
from torchinfer.evaluation.passes import Layout
from torchinfer.evaluation.variants import load_scheme
from torchinfer.evaluation.windows import make_windows
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.testing import save_random_checkpoint, tiny_config

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tiny:
    """Ours and transformers'."""

    checkpoint: Checkpoint
    config: ModelConfig
    theirs: Any

    def load(self) -> Decoder:
        return load_scheme("none", self.checkpoint, self.config, torch.float32, CPU, 64 << 20, False)

    def inputs(self, num_tokens: int, context: int, stride: int, prefix: tuple[int, ...] = ()) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.config.vocab_size, (num_tokens,), generator=generator).tolist()
        windows = make_windows(num_tokens, context, stride, len(prefix))
        pairs = {"none": ("float32",)}
        dtype = torch.float32
        return Inputs(
            self.checkpoint, self.config, dtype, CPU, pairs, list(prefix), ids, num_tokens, windows, context, stride
        )


def make_tiny(name: str, folder: Path) -> Tiny:
    theirs = save_random_checkpoint(tiny_config(name), folder)
    checkpoint = Checkpoint.open(folder)
    return Tiny(checkpoint, ModelConfig.from_dict(checkpoint.config), theirs)


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def layout() -> Layout:
    """Steps of 24 tokens for windows of 40: chunks end inside of windows and steps hold parts of several."""
    return Layout.of(page_size=8, max_tokens=24, context=40)
