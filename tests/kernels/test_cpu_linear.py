"""Linear layers of the CPU library: every format on every level, against float64 and against themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torchinfer import kernels
from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.grouped_matmul import grouped_matmul
from torchinfer.kernels.cpu.linear import linear
from torchinfer.kernels.cpu.packed_weight import can_prepare, prepare
from torchinfer.kernels.reference.quantized_matmul import quantized_matmul
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight
from torchinfer.testing import assert_close, exact_product

pytestmark = pytest.mark.skipif(library.open_library() is None, reason="the CPU library is not built")
PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = [*PLAIN, *SCHEMES]
# Rows, inputs, outputs. Inputs are padded to 8 (int8, int4), 2 (bf16, e4m3fn) or whole groups; outputs to 64.
SHAPES = [(1, 128, 64), (5, 63, 65), (33, 500, 130), (0, 128, 4), (7, 384, 1), (12, 1, 70), (2, 2050, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_weight(name: str, rows: int, columns: int, seed: int = 0) -> Tensor | QuantizedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
    if name in PLAIN:
        return weight.to(PLAIN[name])
    return SCHEMES[name].weight(dict(SCHEMES[name].pack(weight)), columns, ())


def make_input(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)).to(dtype)


def exact(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """float64, with inputs rounded as the weight asks."""
    if isinstance(weight, Tensor):
        return x.double() @ weight.double().T
    return exact_product(x, weight)


def fits(name: str, columns: int) -> bool:
    return not name.startswith("int4") or not SCHEMES[name].problems((1,), columns)


def input_dtype(name: str) -> torch.dtype:
    return PLAIN.get(name, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_float64(level, name, shape, dtype):
    num_tokens, columns, rows = shape
    if not fits(name, columns) or PLAIN.get(name, dtype) != dtype:
        pytest.skip("no such weight")
    weight, x = make_weight(name, rows, columns), make_input(num_tokens, columns, dtype)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(8)).to(dtype)
    prepared = prepare(weight)
    assert prepared is not None and prepared.shape == (rows, columns)
    actual = linear(x, prepared, None)
    assert actual.dtype == dtype and actual.shape == (num_tokens, rows)
    assert_close(actual, exact(x, weight))
    assert_close(linear(x, prepared, bias), exact(x, weight) + bias.double())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_bits_alone_and_among_others(level, num_threads, name):
    x, prepared = make_input(45, 384, input_dtype(name)), prepare(make_weight(name, 130, 384))
    alone = torch.cat([linear(row[None], prepared, None) for row in x])
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 45):
        assert torch.equal(linear(x[:rows], prepared, None), alone[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "fp8_block", "fp8_block_w8a8", "int4_g32", "int4_w4a8"])
def test_a_row_of_planes_has_the_same_bits_alone_and_among_others(level, name, dtype):
    x, prepared = make_input(9, 384, dtype), prepare(make_weight(name, 70, 384))
    alone = torch.cat([linear(row[None], prepared, None) for row in x])
    for rows in (2, 3, 5, 9):
        assert torch.equal(linear(x[:rows], prepared, None), alone[:rows]), rows


def test_more_rows_than_a_pass_takes(level):
    x, prepared = make_input(1030, 64, torch.float32), prepare(make_weight("int8_w8a8", 66, 64))
    together = linear(x, prepared, None)
    assert torch.equal(together[1020:], linear(x[1020:], prepared, None))
    assert_close(together, exact(x, make_weight("int8_w8a8", 66, 64)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [63, 500, 2048])
def test_integers_times_integers_have_the_reference_s_bits(level, columns, dtype):
    weight, x = make_weight("int8_w8a8", 130, columns), make_input(19, columns, dtype)
    x[3] = 0
    x[4] *= 1e-4
    assert torch.equal(linear(x, prepare(weight), None), quantized_matmul(x, weight))


def test_the_largest_integers_do_not_overflow(level):
    columns = 40_000
    values = torch.full((2, columns), 127, dtype=torch.int8)
    values[1] = -127
    weight = QuantizedWeight(values, torch.ones(2, 1), 1, columns)
    x = torch.ones(1, columns)
    assert linear(x, prepare(weight), None).tolist() == [[127.0 * columns, -127.0 * columns]]


def test_every_code_of_e4m3fn_is_read_right(level):
    codes = torch.arange(256, dtype=torch.uint8)
    weight = QuantizedWeight(codes[:, None].view(torch.float8_e4m3fn), torch.ones(256, 1), 1, 1)
    actual = linear(torch.ones(1, 1), prepare(weight), None)[0]
    assert torch.equal(actual.nan_to_num(1e9), codes.view(torch.float8_e4m3fn).float().nan_to_num(1e9))


def test_inputs_are_rounded_to_e4m3fn_as_torch_does(level):
    x = torch.cat([torch.linspace(-448, 448, 4001), torch.linspace(-0.04, 0.04, 4001)])
    weight = QuantizedWeight(torch.eye(1).to(torch.float8_e4m3fn), torch.ones(1, 1), 1, 1, "fp8")
    prepared = prepare(replace(weight, input_scale=torch.ones(1)))
    expected = x.to(torch.float8_e4m3fn).float()
    assert torch.equal(linear(x[:, None], prepared, None)[:, 0], expected)


def test_int8_inputs_with_a_given_scale_are_left_to_the_reference():
    # They may become -128, which the library's planes do not have.
    assert prepare(replace(make_weight("int8_w8a8", 70, 128), input_scale=torch.tensor([0.01]))) is None


def test_a_given_input_scale_cuts_off_what_is_beyond_it(level):
    weight = replace(make_weight("fp8_w8a8", 70, 128), input_scale=torch.tensor([0.01]))
    x = make_input(4, 128, torch.float32)
    assert_close(linear(x, prepare(weight), None), exact(x, weight))


@pytest.mark.parametrize("bits", [0x7FC0, 0x7FFF, -0x0001, 0x7F81])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_input_scale_hides_nothing_that_is_not_a_number(level, dtype, bits):
    weight = replace(make_weight("fp8_w8a8", 70, 128), input_scale=torch.ones(1))
    x = make_input(3, 128, torch.bfloat16)
    x.view(torch.int16)[1, 77] = bits
    assert linear(x.to(dtype), prepare(weight), None).isnan().all(1).tolist() == [False, True, False]


def test_zeros_of_groups(level):
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (70, 64), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 16, (70, 4), generator=generator).to(torch.uint8)
    weight = QuantizedWeight(values, torch.rand(70, 4, generator=generator), 1, 32, zero=zero)
    for dtype in DTYPES:
        x = make_input(5, 128, dtype)
        largest = exact(x, weight).abs().max()
        assert_close(linear(x, prepare(weight), None).double() / largest, exact(x, weight) / largest, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_a_number_stays_in_its_row(level, name):
    x = make_input(4, 384, input_dtype(name))
    x[1, 200], x[2, 0] = torch.nan, torch.inf
    actual = linear(x, prepare(make_weight(name, 65, 384)), None)
    assert actual.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_a_number_stays_in_its_output(level, dtype):
    weight = make_weight("float32", 130, 63).to(dtype)
    weight[64, 62] = torch.nan
    actual = linear(make_input(3, 63, dtype), prepare(weight), None)
    assert actual.isnan().any(0).nonzero().flatten().tolist() == [64]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_around_the_tensors_is_read_or_written(level, name):
    wide = torch.full((9, 300), torch.nan, dtype=input_dtype(name))
    wide[2:7, 20:148] = make_input(5, 128, wide.dtype)
    weight = make_weight(name, 65, 128)
    assert_close(linear(wide[2:7, 20:148], prepare(weight), None), exact(wide[2:7, 20:148], weight))
    assert_close(linear(wide[2:7, 20:148].T.contiguous().T, prepare(weight), None), exact(wide[2:7, 20:148], weight))


@pytest.mark.parametrize("name", NAMES)
def test_packing_in_place_gives_the_same(name):
    weight, x = make_weight(name, 128, 384), make_input(3, 384, input_dtype(name))
    expected = linear(x, prepare(weight), None)
    memory = weight if isinstance(weight, Tensor) else weight.values
    prepared = prepare(weight, may_overwrite=True)
    assert prepared is not None
    assert (prepared.values.data_ptr() == memory.data_ptr()) == (memory.data_ptr() % 64 == 0)
    assert torch.equal(linear(x, prepared, None), expected)


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_packed_in_place_each_in_its_part(name):
    weight, x = stack([make_weight(name, 64, 128, seed) for seed in range(3)]), make_input(9, 128, input_dtype(name))
    sizes = torch.tensor([4, 0, 5], dtype=torch.int32)
    expected = grouped_matmul(x, prepare(weight), sizes)
    assert torch.equal(grouped_matmul(x, prepare(weight, may_overwrite=True), sizes), expected)


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 0], [8, 0, 0], [1, 2, 0], [40, 1, 20]])
@pytest.mark.parametrize("name", NAMES)
def test_experts_equal_each_expert_alone(level, name, sizes):
    experts = [make_weight(name, 70, 128, seed) for seed in range(3)]
    prepared = prepare(stack(experts))
    x = make_input(sum(sizes) + 2, 128, input_dtype(name))
    actual = grouped_matmul(x, prepared, torch.tensor(sizes, dtype=torch.int32))
    start = 0
    for expert, size in zip(experts, sizes, strict=True):
        assert torch.equal(actual[start : start + size], linear(x[start : start + size], prepare(expert), None))
        start += size
    assert actual[start:].count_nonzero() == 0


def stack(experts: list) -> Tensor | QuantizedWeight:
    if isinstance(experts[0], Tensor):
        return torch.stack(experts)
    values = torch.stack([expert.values.view(torch.uint8) for expert in experts]).view(experts[0].values.dtype)
    return replace(experts[0], values=values, scale=torch.stack([expert.scale for expert in experts]))


def test_the_door_prepares_and_multiplies():
    weight, x = make_weight("int8", 70, 63), make_input(3, 63)
    prepared = kernels.prepare(weight)
    assert prepared is not None
    assert_close(kernels.linear(x, prepared), exact(x, weight))
    assert_close(kernels.linear(x, weight, torch.ones(70, dtype=x.dtype)), exact(x, weight) + 1)


def test_what_has_no_kernel_is_left_as_it_is():
    weight = make_weight("int4_g32", 8, 64)
    assert not can_prepare(replace(weight, group_index=torch.zeros(1, 64, dtype=torch.int32)))
    assert not can_prepare(replace(weight, column_block=8))
    assert not can_prepare(torch.ones(4, 8, dtype=torch.float16))
    assert prepare(torch.ones(4, 70_000)) is None
    two_scales = replace(make_weight("int8_w8a8", 8, 64), input_scale=torch.ones(2), part_rows=(4, 4))
    assert not can_prepare(two_scales)


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.ones(2, 64), None),
        (torch.ones(2, 63, dtype=torch.bfloat16), None),
        (torch.ones(2, 63, dtype=torch.float64), None),
        (torch.ones(63), None),
        (torch.ones(2, 63), torch.ones(69)),
        (torch.ones(2, 63), torch.ones(70, dtype=torch.bfloat16)),
    ],
    ids=["inputs", "dtype", "float64", "one dimension", "bias", "dtype of bias"],
)
def test_what_does_not_fit_is_refused(x, bias):
    prepared = prepare(make_weight("float32", 70, 63))
    with pytest.raises(ValueError, match="got torch"):
        linear(x, prepared, bias)


def test_misaligned_memory_is_refused():
    odd = torch.from_numpy(torch.zeros(4 * 126 + 1, dtype=torch.uint8)[1:].numpy().view("float32")).view(2, 63)
    with pytest.raises(ValueError, match="not aligned"):
        linear(odd, prepare(make_weight("float32", 70, 63)), None)


@pytest.mark.parametrize("sizes", [[2, 2], [5, 0, 0], [-1, 2, 0]], ids=["count", "sum", "negative"])
def test_sizes_that_do_not_fit_are_refused(sizes):
    prepared = prepare(torch.ones(3, 5, 8))
    with pytest.raises(ValueError):
        grouped_matmul(torch.ones(4, 8), prepared, torch.tensor(sizes, dtype=torch.int32))
