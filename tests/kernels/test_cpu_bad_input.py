"""What the CPU kernels cannot read is refused before its memory is handed out: sizes, dtypes, devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.fused_layer import fuse_attention, fuse_mlp
from torchinfer.kernels.cpu.grouped_matmul import grouped_matmul
from torchinfer.kernels.cpu.layer_norm import layer_norm
from torchinfer.kernels.cpu.linear import linear
from torchinfer.kernels.cpu.packed_weight import prepare
from torchinfer.kernels.cpu.quantize_matrix import quantize_matrix
from torchinfer.kernels.cpu.rms_norm import rms_norm
from torchinfer.kernels.cpu.rotary_embedding import rotary_embedding
from torchinfer.layer_parts import AttentionParts, MLPParts, Projection
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight

pytestmark = pytest.mark.skipif(library.open_library() is None, reason="the CPU library is not built")
HIDDEN, INNER, HEADS, KV_HEADS, SIZE = 64, 128, 4, 2, 16


def quantized(name: str, shape: tuple[int, ...]) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    scheme = SCHEMES[name]
    return scheme.weight(dict(scheme.pack(torch.randn(shape, generator=generator))), shape[-1], ())


ZEROS = torch.full((64, 4), 8, dtype=torch.uint8)
TABLES = [
    ("int8", {"scale": torch.ones(64, 1, dtype=torch.bfloat16)}, r"scales are float32 \[64, 1\]; got torch.bfloat16"),
    ("int8", {"scale": torch.ones(63, 1)}, r"scales are float32 \[64, 1\]; got torch.float32 \[63, 1\]"),
    ("int8", {"scale": torch.ones(64)}, r"scales are"),
    ("int8", {"scale": torch.ones(64, 1, device="meta")}, r"on meta"),
    ("int8", {"row_block": 0}, "a block has rows and columns"),
    ("int8", {"column_block": 0}, "a block has rows and columns"),
    ("int8", {"values": torch.ones(64, 128, dtype=torch.int8, device="meta")}, r"on meta"),
    ("fp8_block", {"scale": torch.ones(1, 2)}, r"scales are float32 \[1, 1\]"),
    ("int4_g32", {"scale": torch.ones(64, 3)}, r"scales are float32 \[64, 4\]"),
    ("int4_g32", {"zero": ZEROS.int()}, r"zeros are uint8 \[64, 4\]; got torch.int32"),
    ("int4_g32", {"zero": ZEROS[:, :3]}, r"zeros are uint8 \[64, 4\]"),
    ("int4_g32", {"zero": ZEROS.to("meta")}, r"on meta"),
    ("fp8_w8a8", {"input_scale": torch.ones(1, dtype=torch.float64)}, r"scale of inputs is float32 \[1\]"),
    ("fp8_w8a8", {"input_scale": torch.ones(1, device="meta")}, r"on meta"),
]


@pytest.mark.parametrize(("name", "changes", "words"), TABLES)
def test_tables_of_a_matrix_that_do_not_fit_it_are_refused(name, changes, words):
    weight = quantized(name, (64, 128))
    assert prepare(weight) is not None
    with pytest.raises(ValueError, match=words):
        prepare(replace(weight, **changes))


def test_scales_of_64_outputs_are_refused_for_640():
    with pytest.raises(ValueError, match=r"scales are float32 \[640, 1\]; got torch.float32 \[64, 1\]"):
        prepare(replace(quantized("int8", (640, 64)), scale=torch.ones(64, 1)))


def test_a_matrix_without_memory_is_refused():
    with pytest.raises(ValueError, match="on meta"):
        prepare(torch.ones(64, 64, device="meta"))


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (64,), (0, 64, 64)], ids=str)
def test_a_matrix_without_numbers_is_left_to_the_reference(shape):
    assert prepare(torch.ones(shape)) is None


def test_floats_with_scales_are_left_to_the_reference():
    assert prepare(QuantizedWeight(torch.ones(64, 64), torch.full((64, 1), 2.0), 1, 64)) is None


META = torch.ones(2, HIDDEN, device="meta")
ANGLES = torch.ones(2, 8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: linear(torch.ones(2, HIDDEN), prepare(torch.ones(8, HIDDEN)), torch.ones(8, device="meta")),
        lambda: linear(META, prepare(torch.ones(8, HIDDEN)), None),
        lambda: grouped_matmul(
            torch.ones(2, HIDDEN), prepare(torch.ones(2, 8, HIDDEN)), torch.ones(2, dtype=torch.int32, device="meta")
        ),
        lambda: rms_norm(META, torch.ones(HIDDEN), 1e-6, 0.0),
        lambda: layer_norm(META, torch.ones(HIDDEN), torch.ones(HIDDEN), 1e-6),
        lambda: rotary_embedding(torch.ones(2, 3, 16, device="meta"), ANGLES, ANGLES, False),
        lambda: quantize_matrix(
            torch.ones(4, 8), torch.empty(4, 8, dtype=torch.int8), torch.empty(4, 1, device="meta"), 1, 8
        ),
    ],
    ids=["bias", "linear", "sizes", "rms_norm", "layer_norm", "rotary", "scale"],
)
def test_tensors_on_another_device_are_refused(call):
    with pytest.raises(ValueError, match="on meta"):
        call()


@pytest.mark.parametrize("sizes", [[-3, 2], [3, 1], [-1, 0]], ids=str)
def test_sizes_of_groups_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="sum of at most N"):
        grouped_matmul(torch.ones(3, 64), prepare(torch.ones(2, 8, 64)), torch.tensor(sizes, dtype=torch.int32))


def test_a_single_row_may_have_any_stride():
    values, scale = torch.empty(1, 128, dtype=torch.int8), torch.empty(1, 1)
    quantize_matrix(torch.linspace(-1, 1, 128)[:, None].T, values, scale, 1, 128)
    assert values[0, [0, -1]].tolist() == [-127, 127]


def projection(outputs: int, inputs: int, num_bias: int | None = None) -> Projection:
    weight = prepare(torch.ones(outputs, inputs))
    assert weight is not None
    return Projection(weight, None if num_bias is None else torch.ones(num_bias))


def attention_parts(**changes: object) -> AttentionParts:
    outputs = (HEADS + 2 * KV_HEADS) * SIZE
    facts = {
        "norm": torch.ones(HIDDEN),
        "qkv": projection(outputs, HIDDEN, outputs),
        "query_norm": torch.ones(SIZE),
        "key_norm": torch.ones(SIZE),
        "output": projection(HIDDEN, HEADS * SIZE, HIDDEN),
        "output_norm": torch.ones(HIDDEN),
        "epsilon": 1e-6,
        "offset": 0.0,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": SIZE,
        "scale": 1.0,
        "soft_cap": None,
        "window": None,
        "is_interleaved": False,
    }
    return AttentionParts(**{**facts, **changes})


def mlp_parts(**changes: object) -> MLPParts:
    facts = {
        "norm": torch.ones(HIDDEN),
        "gate_up": projection(2 * INNER, HIDDEN, 2 * INNER),
        "down": projection(HIDDEN, INNER, HIDDEN),
        "output_norm": torch.ones(HIDDEN),
        "epsilon": 1e-6,
        "offset": 0.0,
        "activation": "silu",
    }
    return MLPParts(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": torch.ones(HIDDEN - 1)}, r"norm is \[64\]"),
        ({"output_norm": torch.ones(2)}, r"output_norm is \[64\]"),
        ({"query_norm": torch.ones(SIZE - 1)}, r"query_norm is \[16\]"),
        ({"key_norm": torch.ones(1, SIZE)}, r"key_norm is \[16\]"),
        ({"key_norm": torch.ones(SIZE, device="meta")}, r"on meta"),
        ({"qkv": projection(128, HIDDEN, 3)}, r"the bias of qkv is \[128\]"),
        ({"qkv": projection(127, HIDDEN)}, r"qkv is \[128, 64\], not \[127, 64\]"),
        ({"output": projection(HIDDEN, 64, 3)}, r"the bias of output is \[64\]"),
        ({"output": projection(HIDDEN, 63)}, r"output is \[64, 64\], not \[64, 63\]"),
        ({"num_kv_heads": 3}, "a multiple of 3 KV heads"),
        ({"window": 0}, "a window is at least 1"),
        ({"soft_cap": 0.0}, "a cap above 0"),
    ],
)
def test_parts_of_attention_that_do_not_fit_are_refused(changes, words):
    assert fuse_attention(attention_parts()) is not None
    with pytest.raises(ValueError, match=words):
        fuse_attention(attention_parts(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": torch.ones(HIDDEN + 1)}, r"norm is \[64\]"),
        ({"output_norm": torch.ones(2)}, r"output_norm is \[64\]"),
        ({"output_norm": torch.ones(HIDDEN, device="meta")}, r"on meta"),
        ({"gate_up": projection(2 * INNER, HIDDEN, 3)}, r"the bias of gate_up is \[256\]"),
        ({"gate_up": projection(2 * INNER - 2, HIDDEN)}, r"gate_up is \[256, 64\]"),
        ({"down": projection(HIDDEN, INNER, HIDDEN + 1)}, r"the bias of down is \[64\]"),
        ({"down": projection(HIDDEN - 1, INNER)}, r"down is \[64, 128\]"),
        ({"down": Projection(prepare(torch.ones(1, HIDDEN, INNER)), None)}, r"down is \[64, 128\], not \[1, 64, 128\]"),
    ],
)
def test_parts_of_a_feed_forward_layer_that_do_not_fit_are_refused(changes, words):
    assert fuse_mlp(mlp_parts()) is not None
    with pytest.raises(ValueError, match=words):
        fuse_mlp(mlp_parts(**changes))
