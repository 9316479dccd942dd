import pytest
import torch

from torchinfer.batch import KVCache
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages as reference
from torchinfer.kernels.tpu.write_kv_pages import write_kv_pages as static
from torchinfer.testing import poisoned_cache

LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
each_port = pytest.mark.parametrize("port", [reference, static])
each_scaled_dtype = pytest.mark.parametrize("dtype", LARGEST)


@each_port
def test_each_token_lands_in_its_slot_and_nothing_else_changes(port):
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3, 5, 7, generator=generator)
    cache = torch.full((2, 4, 8, 5, 7), torch.nan)
    slot = torch.tensor([9, 31, 8], dtype=torch.int32)
    port(key, value, KVCache(cache), slot)
    flat = cache.view(2, 32, 5, 7)
    assert torch.equal(flat[0, slot], key)
    assert torch.equal(flat[1, slot], value)
    assert flat.isnan().sum() == flat.numel() - 2 * key.numel()


@each_port
def test_padded_tokens_share_slot_zero(port):
    key = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    cache = torch.zeros(2, 2, 4, 2, 3)
    port(key, key, KVCache(cache), torch.tensor([5, 0, 0, 0], dtype=torch.int32))
    assert torch.equal(cache[0, 1, 1], key[0])
    assert cache[:, 1, [0, 2, 3]].count_nonzero() == 0


def write(port, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Write [N, K, D] as keys, and their negative as values: what the cache holds, data and scales as float64."""
    cache = poisoned_cache((2, -(-len(rows) // 8) + 1, 8, *rows.shape[1:]), dtype)
    slot = torch.arange(8, 8 + len(rows), dtype=torch.int32)
    port(rows, -rows, cache, slot)
    data, scale = (stored.double().flatten(1, 2)[:, slot] for stored in cache.tensors)
    assert torch.equal(data[0], -data[1]) and torch.equal(scale[0], scale[1])
    return data[0], scale[0]


@each_scaled_dtype
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_port
def test_a_scaled_row_is_within_half_a_step_of_what_was_written(port, dtype, rows_dtype):
    rows = torch.randn(37, 3, 63, generator=torch.Generator().manual_seed(0)).to(rows_dtype)
    data, scale = write(port, rows, dtype)
    error = (data * scale[..., None] - rows.double()).abs() / scale[..., None]
    # Half a step of integers; of float8, three bits after the first, and 2 ** -10 in the subnormal range.
    allowed = torch.full_like(data, 0.5) if dtype == torch.int8 else (data.abs() / 16).clamp(min=2**-10)
    assert (error <= allowed * (1 + 1e-4)).all()


@each_scaled_dtype
@each_port
def test_the_largest_value_of_a_row_becomes_the_largest_of_the_dtype(port, dtype):
    data, scale = write(port, torch.randn(37, 3, 63, generator=torch.Generator().manual_seed(0)), dtype)
    assert torch.equal(data.abs().amax(-1), torch.full_like(scale, LARGEST[dtype]))


@each_scaled_dtype
@each_port
def test_a_row_of_zeros_stays_zeros(port, dtype):
    data, scale = write(port, torch.zeros(3, 2, 16), dtype)
    assert data.count_nonzero() == 0
    assert (scale > 0).all() and scale.isfinite().all()


@each_scaled_dtype
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e36])
@each_port
def test_tiny_and_huge_rows_keep_their_relative_error(port, dtype, size):
    rows = torch.randn(37, 3, 63, generator=torch.Generator().manual_seed(0))
    expected, _ = write(port, rows, dtype)
    data, scale = write(port, rows * size, dtype)
    assert (data * scale[..., None] - rows.double() * size).abs().max() < 0.2 * size
    # Rounding of rows * size moves a value to the other side of a tie at most.
    assert (data - expected).count_nonzero() < 10


@each_scaled_dtype
@each_port
def test_a_row_too_small_for_a_scale_becomes_zeros_not_nan(port, dtype):
    data, scale = write(port, torch.full((2, 2, 16), 1e-42), dtype)
    assert (data * scale[..., None]).abs().max() <= 1.2e-38


@each_scaled_dtype
@each_port
def test_what_is_stored_depends_on_the_row_alone(port, dtype):
    rows = torch.randn(37, 3, 63, generator=torch.Generator().manual_seed(0))
    data, scale = write(port, rows, dtype)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    for part in order.split(5):
        some, some_scale = write(port, rows[part], dtype)
        assert torch.equal(some, data[part]) and torch.equal(some_scale, scale[part])


@each_scaled_dtype
@each_port
def test_writing_a_scaled_row_changes_no_other_slot(port, dtype):
    cache = poisoned_cache((2, 3, 4, 2, 10), dtype)
    port(*torch.randn(2, 1, 2, 10), cache, torch.tensor([6], dtype=torch.int32))
    assert cache.scale.isnan().sum() == cache.scale.numel() - 2 * 2
    changed = (cache.data.float() != 127) if dtype == torch.int8 else ~cache.data.float().isnan()
    assert changed.flatten(1, 2)[:, [*range(6), *range(7, 12)]].count_nonzero() == 0


@each_scaled_dtype
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@each_port
def test_a_broken_row_does_not_look_sound(port, dtype, broken):
    rows = torch.ones(1, 2, 16)
    rows[0, :, 3] = broken
    cache = KVCache(torch.zeros(2, 1, 4, 2, 16).to(dtype), torch.zeros(2, 1, 4, 2))
    port(rows, rows, cache, torch.tensor([1], dtype=torch.int32))
    assert not cache.scale[:, 0, 1].isfinite().any()
