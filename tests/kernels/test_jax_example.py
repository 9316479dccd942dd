"""The examples in docs/design.md run as they stand, on a TPU or in Pallas' interpreter, and compute what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchinfer.batch import KVCache
from torchinfer.kernels.reference.paged_attention import paged_attention
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages
from torchinfer.testing import Row, make_batch

pytest.importorskip("jax")
DOCUMENT = Path(__file__).parents[2] / "docs" / "design.md"


def test_the_kernels_are_called_from_jax_as_the_document_does() -> None:
    section = DOCUMENT.read_text().partition("## The TPU's kernels from JAX")[2].partition("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(examples) == 2
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, str(DOCUMENT), "exec"), names)
    sums = names["weight"].sum(1).numpy()
    error = np.abs(np.asarray(names["y"]) - sums).max()
    assert names["y"].shape == (16, 384) and error < 0.03 * np.abs(sums).max()  # int8 weights
    np.testing.assert_allclose(np.asarray(names["result"])[0], attended(names), rtol=0, atol=2**-8)


def attended(names: dict[str, Any]) -> Any:
    """By the reference, [heads, size]."""
    cache = KVCache(names["cache"].clone(), names["cache_scale"].clone())
    batch = make_batch([Row([0], 200, [3, 1], 201)], 128)
    ones = torch.ones(1, 2, 64)
    write_kv_pages(ones, ones, cache, batch.slot)
    return paged_attention(torch.ones(1, 4, 64), cache, batch, 64**-0.5, None, None)[0].numpy()
