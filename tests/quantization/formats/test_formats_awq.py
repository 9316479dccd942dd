"""AWQ's GEMM layout, packed and dequantized by hand from what AutoAWQ documents."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.testing import assert_close

# Of eight outputs, the one in each four bits of a word, lowest bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(numbers: NDArray[np.int64]) -> Tensor:
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), dtype=np.int64)
    for word in range(words.shape[1]):
        for place, output in enumerate(ORDER):
            words[:, word] += numbers[:, 8 * word + output] << (4 * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


class Writer:
    """Quantizes a matrix [O, I] with a scale and a zero for each output and group."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.generator = np.random.default_rng(0)
        self.settings: dict[str, Any] = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["mlp.gate"],
        }

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        num_outputs, num_inputs = weight.shape
        group = num_inputs if self.group == -1 else self.group
        zeros = self.generator.integers(0, 16, (num_inputs // group, num_outputs))
        scales = self.generator.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
        numbers = np.zeros((num_inputs, num_outputs), dtype=np.int64)
        truth = np.zeros((num_outputs, num_inputs), dtype=np.float32)
        for i in range(num_inputs):
            zero, scale = zeros[i // group], scales[i // group].astype(np.float32)
            numbers[i] = np.clip(np.rint(weight[:, i].numpy() / scale).astype(np.int64) + zero, 0, 15)
            truth[:, i] = (numbers[i] - zero).astype(np.float32) * scale
        written = {".qweight": pack(numbers), ".qzeros": pack(zeros), ".scales": torch.from_numpy(scales)}
        return written, torch.from_numpy(truth)


@pytest.mark.parametrize("group", [32, -1])
def test_logits_equal_those_of_numbers_worked_out_by_hand(bed, group):
    writer = Writer(group)
    bed.quantize(writer, writer.settings)
    assert_close(bed.logits(), bed.expected_logits())


def test_experts_are_read(make_bed):
    bed = make_bed("qwen3-moe")
    writer = Writer(32)
    bed.quantize(writer, writer.settings)
    assert_close(bed.logits(), bed.expected_logits())


def test_the_file_of_older_tools_is_read(bed):
    writer = Writer(32)
    bed.quantize(writer, {})
    folder = bed.folder(key="unused")
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(old))
    assert_close(bed.logits_of(bed.load()), bed.expected_logits())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bits": 8}, "bits=8"),
        ({"version": "gemv"}, "version='gemv'"),
        ({"zero_point": False}, "zero_point=False"),
        ({"group_size": 24}, "24"),
        ({"fancy": 1}, "fancy=1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(bed, settings, expected):
    writer = Writer(32)
    bed.quantize(writer, {**writer.settings, **settings})
    bed.folder()
    with pytest.raises(CheckpointError) as caught:
        bed.load()
    assert expected in str(caught.value)


def test_outputs_that_are_reordered_here_are_refused(make_bed):
    bed = make_bed("falcon")
    writer = Writer(32)
    bed.quantize(writer, writer.settings)
    bed.folder()
    with pytest.raises(CheckpointError) as caught:
        bed.load()
    assert "query_key_value" in str(caught.value)
    assert "order" in str(caught.value)
