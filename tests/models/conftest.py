"""A tiny random model of every case, ours and transformers', with the same weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.testing import TINY, PagedDriver, save_random_checkpoint, tiny_config


@dataclass(frozen=True)
class Case:
    """Our model and the reference."""

    folder: Path
    ours: Decoder
    theirs: Any

    def logits(self, prompt: list[int]) -> Tensor:
        """[tokens, vocab] of the reference."""
        self._forget_length()
        with torch.inference_mode():
            result: Tensor = self.theirs(torch.tensor([prompt])).logits[0]
        return result

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The reference's continuation."""
        ids = torch.tensor([prompt])
        # transformers 4.57's Qwen2-MoE masks a windowed cache wrongly: its own logits differ without the cache.
        use_cache = self.ours.config.architecture != "Qwen2MoeForCausalLM"
        self._forget_length()
        with torch.inference_mode():
            result = self.theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                use_cache=use_cache,
            )
        continuation: list[int] = result[0, len(prompt) :].tolist()
        return continuation

    def _forget_length(self) -> None:
        """transformers' dynamic scaling keeps the frequencies of the longest prompt that it has seen."""
        for module in self.theirs.modules():
            if hasattr(module, "original_inv_freq"):
                module.inv_freq = module.original_inv_freq
                module.max_seq_len_cached = module.original_max_seq_len

    def driver(self, kv_cache_dtype: torch.dtype | None = None) -> PagedDriver:
        """A fresh cache."""
        return PagedDriver(self.ours, kv_cache_dtype=kv_cache_dtype)


@pytest.fixture(scope="module", params=TINY)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save_random_checkpoint(tiny_config(request.param), folder)
    checkpoint = Checkpoint.open(folder)
    ours = load_model(checkpoint, ModelConfig.from_dict(checkpoint.config), torch.float32, torch.device("cpu"))
    assert isinstance(ours, Decoder)
    yield Case(folder, ours, theirs)


@pytest.fixture
def prompt() -> list[int]:
    """Longer than the windows, the pages and the original rope lengths of the cases."""
    ids: list[int] = torch.randint(3, 160, (45,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids
