"""GPTQ, packed and dequantized by hand, bit by bit, from the layout that AutoGPTQ and GPTQModel document."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchinfer.errors import CheckpointError
from torchinfer.loader import Checkpoint
from torchinfer.loader.published import hold_published
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.testing import assert_close

Ints = NDArray[np.int64]


def pack(numbers: Ints, bits: int, dim: int) -> Tensor:
    """Put numbers into words of 32 bits along a dimension, the first in the lowest bits."""
    if dim == 1:
        return pack(numbers.T, bits, 0).T.contiguous()
    per_word = 32 // bits
    words = np.zeros((numbers.shape[0] // per_word, numbers.shape[1]), dtype=np.int64)
    for row in range(numbers.shape[0]):
        words[row // per_word] += numbers[row] << (row % per_word * bits)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


class Writer:
    """Quantizes a matrix [O, I] with a scale and a zero for each output and group."""

    def __init__(self, bits: int, group: int, *, order: bool, symmetric: bool, v2: bool) -> None:
        self.bits, self.group, self.order, self.symmetric, self.v2 = bits, group, order, symmetric, v2
        self.generator = np.random.default_rng(0)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.order,
            "sym": self.symmetric,
            "checkpoint_format": "gptq_v2" if self.v2 else "gptq",
            "damp_percent": 0.01,
            "true_sequential": True,
            "meta": {"quantizer": ["by hand"]},
        }

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        num_outputs, num_inputs = weight.shape
        group = num_inputs if self.group == -1 else self.group
        index = np.arange(num_inputs) // group
        if self.order:
            index = self.generator.permutation(index)
        most = 2**self.bits - 1
        numbers = np.zeros((num_inputs, num_outputs), dtype=np.int64)
        # v1 stores one less, and has no way to write a zero of 0.
        zeros = self.generator.integers(0 if self.v2 else 1, most + 1, (num_inputs // group, num_outputs))
        zeros = np.full_like(zeros, (most + 1) // 2) if self.symmetric else zeros
        scales = self.generator.uniform(0.005, 0.05, zeros.shape).astype(np.float16)
        truth = np.zeros((num_outputs, num_inputs), dtype=np.float32)
        for i in range(num_inputs):
            zero, scale = zeros[index[i]], scales[index[i]].astype(np.float32)
            numbers[i] = np.clip(np.rint(weight[:, i].numpy() / scale).astype(np.int64) + zero, 0, most)
            truth[:, i] = (numbers[i] - zero).astype(np.float32) * scale
        written = {
            ".qweight": pack(numbers, self.bits, 0),
            ".qzeros": pack(zeros if self.v2 else zeros - 1, self.bits, 1),
            ".scales": torch.from_numpy(scales),
            ".g_idx": torch.from_numpy(index.astype(np.int32)),
            ".bias": torch.zeros(num_outputs, dtype=torch.float16),
        }
        return written, torch.from_numpy(truth)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group", "order", "symmetric", "v2"),
    [
        (32, False, True, False),
        (32, True, False, False),
        (32, True, False, True),
        (-1, False, False, False),
        (-1, True, False, True),
    ],
)
def test_logits_equal_those_of_numbers_worked_out_by_hand(bed, bits, group, order, symmetric, v2):
    writer = Writer(bits, group, order=order, symmetric=symmetric, v2=v2)
    if order and group == -1:
        writer.order = False  # one group has no order
        bed.quantize(writer, {**writer.settings, "desc_act": True})
    else:
        bed.quantize(writer, writer.settings)
    assert_close(bed.logits(), bed.expected_logits())


def test_zeros_of_format_v1_wrap_around_as_gptqmodel_writes_them(bed):
    # GPTQModel takes one from each zero by one subtraction of whole words: zeros of 0 borrow from their neighbours.
    writer = Writer(4, 32, order=False, symmetric=False, v2=True)
    bed.quantize(writer, {**writer.settings, "checkpoint_format": "gptq"})
    for name, tensor in bed.tensors.items():
        if name.endswith(".qzeros"):
            tensor -= 0x11111111
    assert_close(bed.logits(), bed.expected_logits())


def test_experts_are_read(make_bed):
    bed = make_bed("qwen3-moe")
    writer = Writer(4, 32, order=True, symmetric=False, v2=False)
    bed.quantize(writer, {**writer.settings, "dynamic": {"-:.*mlp.gate": {}}})
    assert_close(bed.logits(), bed.expected_logits())


def test_a_head_that_is_quantized_is_read(bed):
    writer = Writer(4, 32, order=False, symmetric=True, v2=False)
    bed.quantize(writer, {**writer.settings, "lm_head": True}, [*bed.layers(), "lm_head"])
    assert_close(bed.logits(), bed.expected_logits())


def test_a_bias_is_used_where_the_model_has_one(make_bed):
    bed = make_bed("llama-biases")
    writer = Writer(4, 32, order=False, symmetric=True, v2=False)
    biases = {name: tensor for name, tensor in bed.tensors.items() if name.endswith(".bias")}
    bed.quantize(writer, writer.settings)
    bed.tensors |= biases
    assert_close(bed.logits(), bed.expected_logits())


@pytest.fixture
def small(bed):
    """Quantized in four bits, groups in order."""
    writer = Writer(4, 32, order=False, symmetric=True, v2=False)
    bed.quantize(writer, writer.settings)
    return bed


def refusal(bed, settings: dict[str, Any] | None = None) -> str:
    bed.folder({**bed.settings, **(settings or {})})
    with pytest.raises(CheckpointError) as caught:
        bed.load()
    return str(caught.value)


def test_a_bias_that_is_not_zero_is_refused_where_the_model_has_none(small):
    small.tensors["model.layers.0.mlp.down_proj.bias"][3] = 0.5
    message = refusal(small)
    assert "model.layers.0.mlp.down_proj.bias" in message
    assert "0.5" in message


def test_ctrl_c_does_not_wait_for_storage_that_hangs_in_what_must_be_zeros(small, monkeypatch):
    checkpoint = Checkpoint.open(small.folder())
    with torch.device("meta"):
        model = build_model(ModelConfig.from_dict(checkpoint.config))
    whole, released, hanging = os.preadv, threading.Event(), []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if not hanging:
            os.kill(os.getpid(), signal.SIGINT)
        hanging.append(threading.current_thread())
        released.wait(20)
        return whole(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(KeyboardInterrupt):
        hold_published(model, checkpoint, torch.device("cpu"))
    checks = [thread for thread in threading.enumerate() if thread.name.startswith("check")]
    deadline = time.monotonic() + 5  # the pool forgets the thread that it was starting, which cannot be joined
    while any(thread.is_alive() for thread in checks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in checks)
    assert hanging and all(thread.is_alive() for thread in hanging)  # they are not what was waited for
    released.set()
    for thread in hanging:
        thread.join(10)


def test_groups_in_no_order_are_refused_without_act_order(small):
    index = small.tensors["model.layers.1.mlp.up_proj.g_idx"]
    index.copy_(index.flip(0))
    message = refusal(small)
    assert "model.layers.1.mlp.up_proj.g_idx" in message
    assert "desc_act" in message


def test_a_group_that_is_not_there_is_refused(small):
    small.tensors["model.layers.1.mlp.up_proj.g_idx"][5] = 7
    message = refusal(small, {"desc_act": True})
    assert "model.layers.1.mlp.up_proj.g_idx" in message
    assert "7" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bits": 3}, "bits=3"),
        ({"bits": 2}, "bits=2"),
        ({"bits": None}, "bits=None"),
        ({"group_size": 0}, "group_size=0"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format=True"),
        ({"desc_act": "yes"}, "desc_act='yes'"),
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, "'+:.*down_proj'"),
        ({"dynamic": 5}, "dynamic=5 must be an object"),
        ({"adapter": {"rank": 4}}, "adapter={'rank': 4}"),
        ({"quant_method": "aqlm"}, "'aqlm'"),
        ({"quant_method": None}, "quant_method=None"),
        ({"group_size": 48}, "48"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(small, settings, expected):
    assert expected in refusal(small, settings)


def test_all_problems_come_at_once(small):
    message = refusal(small, {"bits": 3, "magic": 1, "pack_dtype": "int16"})
    assert all(text in message for text in ("bits=3", "magic=1", "pack_dtype='int16'"))


def test_the_file_of_older_tools_is_read(small):
    settings = {name: value for name, value in small.settings.items() if name != "quant_method"}
    folder = small.folder(key="unused")
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert_close(small.logits_of(small.load()), small.expected_logits())
