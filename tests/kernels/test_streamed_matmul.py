"""The TPU's matmul kernel in Pallas' TPU interpreter against the references: formats, shapes, experts, races."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from torchinfer.kernels.reference.dequantize import dequantize
from torchinfer.kernels.reference.grouped_gated_matmul import grouped_gated_matmul
from torchinfer.kernels.reference.grouped_matmul import grouped_matmul
from torchinfer.kernels.reference.quantize_rows import quantize_rows
from torchinfer.kernels.reference.quantized_matmul import DTYPES, quantized_matmul
from torchinfer.kernels.tpu.packed_weight import PackedWeight, prepare
from torchinfer.kernels.tpu.word_layout import NUMBERS_IN_WORD
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight

jax = pytest.importorskip("jax")
from jax import numpy as jnp  # noqa: E402
from jax._src.pallas.mosaic import interpret  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from torchinfer.kernels.tpu import matmul_plan  # noqa: E402
from torchinfer.kernels.tpu.matmul_plan import MatmulConfig, make_config, plan_visits  # noqa: E402
from torchinfer.kernels.tpu.streamed_matmul import streamed_matmul  # noqa: E402
from torchinfer.kernels.tpu.word_unpacking import numbers_of  # noqa: E402

# Of the largest value: int8 and int4 have inputs of 15 bits, all others of 8.
TOLERANCES = {"int8": 2**-12, "int4": 2**-12, "fp8": 2**-7, "bfloat16": 2**-7}
STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
)


def random_weight(name: str, rows: int, columns: int) -> QuantizedWeight:
    weight = torch.randn(rows, columns) * torch.rand(rows, 1) / columns**0.5
    return SCHEMES[name].weight(dict(SCHEMES[name].pack(weight)), columns, ())


def random_experts(name: str, num_experts: int, rows: int, columns: int) -> torch.Tensor | QuantizedWeight:
    if name == "bfloat16":
        return (torch.randn(num_experts, rows, columns) / columns**0.5).to(torch.bfloat16)
    experts = [random_weight(name, rows, columns) for _ in range(num_experts)]
    values = torch.stack([expert.values.view(torch.uint8) for expert in experts]).view(experts[0].values.dtype)
    return replace(experts[0], values=values, scale=torch.stack([expert.scale for expert in experts]))


def config_of(
    weight: PackedWeight, num_rows: int, activation: str | None = None, planes: int | None = None, **options: Any
) -> MatmulConfig:
    numbers = weight.words.shape[1] * NUMBERS_IN_WORD[weight.name]
    shape = (weight.words.shape[0], numbers, weight.shape[-2])
    planes = planes or (2 if weight.name in ("int8", "int4") else 1)
    return make_config(weight.name, shape, weight.scale.shape[1], num_rows, planes, activation, **options)


def run(
    x: torch.Tensor,
    weight: PackedWeight,
    sizes: list[int] | None,
    config: MatmulConfig,
    input_scale: torch.Tensor | None = None,
) -> Any:
    """The kernel's result in float32, of as many cores as share the blocks, which all run at the same time."""
    function = jax.jit(streamed_matmul, static_argnames=("config", "interpret"))
    tensors = (weight.words, weight.scale, None if sizes is None else torch.tensor(sizes, dtype=torch.int32))
    arrays = [None if each is None else jnp.asarray(each.numpy()) for each in (*tensors, input_scale, weight.shift)]
    numbers = jnp.asarray(x.float().numpy(), jnp.dtype(str(x.dtype).removeprefix("torch.")))
    strict = replace(STRICT, num_cores_per_device=config.used_cores)
    result = np.asarray(function(numbers, *arrays, config=config, interpret=strict))
    assert interpret.races is not None and not interpret.races.races_found
    assert result.dtype == jnp.dtype(config.result_dtype)
    return result.astype(np.float32)


def assert_near(actual: Any, expected: torch.Tensor, name: str) -> None:
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), 1e-6)
    assert np.abs(actual - expected.numpy()).max() <= TOLERANCES[name.partition("_")[0]] * scale


@pytest.mark.parametrize(
    ("name", "num_rows", "columns", "rows"),
    [
        ("int8", 1, 128, 300),
        ("int8", 63, 192, 130),
        ("int4", 17, 256, 129),
        ("int4_g32", 9, 160, 60),  # a group of 32 pads
        ("int4_g64", 33, 192, 40),
        ("fp8", 5, 64, 260),
        ("fp8_block", 3, 320, 200),
        ("int8", 130, 100, 40),  # two tiles of rows
    ],
)
def test_a_product_of_float_inputs_equals_the_reference(name: str, num_rows: int, columns: int, rows: int) -> None:
    weight, x = random_weight(name, rows, columns), torch.randn(num_rows, columns) * torch.rand(num_rows, 1) * 9
    prepared = prepare(weight, num_cores=1)
    assert prepared is not None
    config = config_of(prepared, num_rows)
    assert rows < 128 or config.num_blocks > 1
    assert_near(run(x, prepared, None, config), quantized_matmul(x, weight), name)


@pytest.mark.parametrize("input_scale", [None, 0.02])
@pytest.mark.parametrize("name", ["int8_w8a8", "int4_w4a8", "fp8_w8a8"])
def test_a_product_of_inputs_of_8_bits_equals_the_reference(name: str, input_scale: float | None) -> None:
    """With a scale for each row, or one for all, which cuts some inputs off."""
    weight, x = random_weight(name, 200, 256), torch.randn(9, 256) * torch.rand(9, 1) * 9
    weight = replace(weight, input_scale=None if input_scale is None else torch.tensor([input_scale]))
    prepared = prepare(weight, num_cores=1)
    assert prepared is not None
    numbers, scale = quantize_rows(x, DTYPES[weight.activations], weight.input_scale)
    numbers = numbers.to(torch.bfloat16) if weight.activations == "fp8" else numbers
    actual = run(numbers, prepared, None, config_of(prepared, 9, planes=1), scale.expand(9))
    assert_near(actual, quantized_matmul(x, weight), "int8")  # exact but for the order of sums


def test_two_planes_hold_more_of_float32_inputs_than_bfloat16() -> None:
    weight, x = random_weight("fp8", 140, 192), torch.randn(9, 192)
    prepared = prepare(weight, num_cores=1)
    assert prepared is not None
    assert_near(run(x, prepared, None, config_of(prepared, 9, planes=2)), quantized_matmul(x, weight), "int8")


def test_results_of_bfloat16_are_those_of_float32_rounded() -> None:
    """Also where an expert's rows join those of others in a tile."""
    sizes, weight, x = [3, 0, 20, 1, 0], random_experts("int8", 5, 144, 128), torch.randn(40, 128)
    prepared = prepare(weight, num_cores=1)
    assert prepared is not None
    config = config_of(prepared, 40)
    whole = torch.from_numpy(run(x, prepared, sizes, config))
    rounded = run(x, prepared, sizes, replace(config, result_dtype="bfloat16"))
    np.testing.assert_array_equal(rounded, whole.to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize(("name", "columns"), [("int4", 256), ("int4_g32", 96)])
def test_zeros_of_a_scheme_are_subtracted(name: str, columns: int) -> None:
    weight = random_weight(name, 40, columns)
    weight = replace(weight, zero=torch.randint(0, 16, weight.scale.shape, dtype=torch.uint8))
    prepared, x = prepare(weight, num_cores=1), torch.randn(4, columns)
    assert prepared is not None and prepared.shift is not None
    assert_near(run(x, prepared, None, config_of(prepared, 4)), quantized_matmul(x, weight), "int4")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("int8", [3, 0, 20, 1, 0]),  # an expert in three tiles, rows of nobody
        ("int8", [0, 0, 0, 40, 0]),
        ("int4", [8, 8, 8, 8, 8]),
        ("fp8", [0, 9, 0, 20, 2]),
        ("fp8", [0, 0, 0, 0, 0]),
        ("bfloat16", [1, 1, 0, 0, 1]),
    ],
)
def test_experts_equal_the_reference_and_rows_of_nobody_are_zero(name: str, sizes: list[int]) -> None:
    weight, x = random_experts(name, 5, 144, 128), torch.randn(40, 128)
    prepared = prepare(weight, num_cores=1)
    assert prepared is not None
    x[sum(sizes) :] = torch.nan
    actual = run(x, prepared, sizes, config_of(prepared, 40))
    x = x.to(torch.bfloat16) if name == "bfloat16" else x
    assert_near(actual, grouped_matmul(x, weight, torch.tensor(sizes)).float(), name)
    assert (actual[sum(sizes) :] == 0).all()


@pytest.mark.parametrize(
    ("name", "rows", "activation", "num_blocks"),
    [
        ("int8", 512, "silu", 2),
        ("bfloat16", 176, "gelu_tanh", 1),
        ("int8", 192, "silu", 1),  # halves that are no whole tiles
        ("int8", 60, "gelu", 1),
        ("int4", 192, "silu", 1),
        ("fp8", 192, "silu", 1),
    ],
)
def test_gate_up_and_activation_in_one_pass(name: str, rows: int, activation: str, num_blocks: int) -> None:
    sizes, weight, x = [7, 0, 2], random_experts(name, 3, rows, 128), torch.randn(10, 128)
    prepared = prepare(weight, num_cores=2)
    assert prepared is not None
    config = config_of(prepared, 10, activation, num_cores=2)
    assert (config.num_blocks, config.is_whole) == (num_blocks, num_blocks == 1)
    x = x.to(torch.bfloat16).float() if name == "bfloat16" else x
    if isinstance(weight, torch.Tensor):
        expected = grouped_gated_matmul(x, weight.float(), torch.tensor(sizes), activation)
    else:
        expected = grouped_gated_matmul(x, weight, torch.tensor(sizes), activation)
    assert_near(run(x, prepared, sizes, config), expected, name)


@pytest.mark.parametrize(("name", "sizes"), [("int8", None), ("int8", [100, 0, 190, 9]), ("bfloat16", [1, 299, 0, 0])])
def test_rows_that_do_not_fit_the_chip_pass_in_parts(monkeypatch, name: str, sizes: list[int] | None) -> None:
    """Of 300 rows; two cores, each of which keeps what it has of a part, one with a block more than there are."""
    monkeypatch.setattr(matmul_plan, "OPERAND_BYTES", 2 * 256 * 128 * 2)
    x = torch.randn(300, 128)
    weight = random_weight(name, 384, 128) if sizes is None else random_experts(name, 4, 384, 128)
    prepared = prepare(weight, num_cores=2)
    assert prepared is not None
    config = replace(config_of(prepared, 300, num_cores=2), block_outputs=128, tile_rows=64)
    assert (config.num_blocks, config.most_rows) == (3, 256)
    if sizes is None:
        expected = quantized_matmul(x, weight)
    else:
        x = x.to(torch.bfloat16).float() if name == "bfloat16" else x
        expected = grouped_matmul(x, weight.float() if name == "bfloat16" else weight, torch.tensor(sizes))
    assert_near(run(x, prepared, sizes, config), expected, name)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    prepared = prepare(random_weight("int8", 40, 128), num_cores=1)
    assert prepared is not None
    x = torch.randn(9, 128)
    together = run(x, prepared, None, config_of(prepared, 9))
    np.testing.assert_array_equal(run(x[4:5], prepared, None, config_of(prepared, 1)), together[4:5])


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_words_hold_the_numbers(name: str) -> None:
    weight = random_weight(name, 24, 128)
    prepared = prepare(weight, num_cores=1)
    assert prepared is not None
    numbers = np.asarray(numbers_of(jnp.asarray(prepared.words[0].numpy()), prepared.name))
    scale = prepared.scale[0].repeat_interleave(128 // prepared.scale.shape[1], 0).numpy()
    np.testing.assert_allclose((numbers * scale)[:, :24], dequantize(weight).T.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("outputs", "padded"), [(24, 128), (128, 128), (192, 256)])
def test_columns_of_words_and_scales_are_padded_with_zeros_to_whole_lanes(outputs: int, padded: int) -> None:
    """Others XLA would keep in another layout, and copy for the kernel."""
    prepared = prepare(random_experts("int8", 2, outputs, 100), num_cores=1)
    assert prepared is not None
    assert (prepared.words.shape, prepared.scale.shape) == ((2, 32, padded), (2, 1, padded))
    assert prepared.num_bytes == 2 * 33 * padded * 4
    assert not prepared.words[..., outputs:].any() and not prepared.scale[..., outputs:].any()


@pytest.mark.parametrize("num_rows", [1, 24, 300])
@pytest.mark.parametrize("seed", range(4))
def test_visits_meet_every_expert_row_once_and_fetch_each_matrix_once(num_rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    owner = np.sort(generator.integers(0, 12 if seed else 3, num_rows))  # 10 and 11 are nobody
    sizes = np.bincount(owner, minlength=12)[:10]
    config = make_config("int8", (10, 64, 128), 1, num_rows, 2)
    visits = np.asarray(plan_visits(jnp.asarray(sizes, jnp.int32), config))
    found = np.full(config.num_tiles * config.tile_rows, -1)
    for expert, tile, begin, end in visits.T:
        rows = slice(tile * config.tile_rows + begin, tile * config.tile_rows + end)
        assert (found[rows] == -1).all()
        found[rows] = expert
    np.testing.assert_array_equal(found[: sizes.sum()], owner[: sizes.sum()])
    assert (found[sizes.sum() :] == -1).all()
    assert (np.diff(visits[1]) >= 0).all() and len(visits.T) < config.num_tiles + 10
    fetched = [expert for at, expert in enumerate(visits[0]) if at == 0 or expert != visits[0, at - 1]]
    assert len(fetched) == max((sizes > 0).sum(), 1)
