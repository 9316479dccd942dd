"""The attention kernel as a torch op: XLA:CPU against the reference, and its graph compiled for a TPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from torchinfer import aot
from torchinfer.batch import KernelPages, KVCache
from torchinfer.device import mark_as_donated, resolve_device
from torchinfer.kernels.reference.paged_attention import paged_attention
from torchinfer.kernels.reference.write_kv_pages import write_kv_pages
from torchinfer.testing import Row, assert_close, make_batch
from torchinfer.xla_program import CompiledFunction

pytestmark = pytest.mark.xla
pytest.importorskip("torch_xla")
jax = pytest.importorskip("jax")
import numpy as np  # noqa: E402
from jax import numpy as jnp  # noqa: E402

from torchinfer.kernels.tpu import attention_op  # noqa: E402
from torchinfer.kernels.tpu.page_layout import PAGE_SIZE, PageLayout  # noqa: E402
from torchinfer.kernels.tpu.page_packing import unpack_pages  # noqa: E402

# (new tokens, tokens in the cache)
STEPS = [[(1, 0), (130, 0), (5, 0)], [(1, 1), (1, 130), (0, 5), (9, 0)]]
PAGES = [[1], [2, 3], [4], [5]]


def empty_cache(layout: PageLayout, num_pages: int) -> KVCache:
    shape = (2, num_pages, PAGE_SIZE, layout.num_kv_heads, layout.head_dim)
    data = torch.zeros(shape).to(attention_op.DTYPES[layout.dtype])
    return KVCache(data, None if layout.dtype == "bfloat16" else torch.zeros(shape[:-1]))


def step_batch(step):
    rows = [Row([0] * new, old, pages, new + old) for (new, old), pages in zip(step, PAGES, strict=False)]
    return make_batch(rows, PAGE_SIZE, is_static=True, num_padded_tokens=2, num_padded_rows=1)


@pytest.mark.parametrize(
    ("dtype", "size", "window", "soft_cap"),
    [("int8", 64, None, None), ("float8_e4m3fn", 80, 7, None), ("bfloat16", 128, None, 1.5)],
)
def test_two_steps_on_xla_equal_the_reference(dtype, size, window, soft_cap):
    device = resolve_device("xla")
    layout = PageLayout(2, size, dtype)
    pages = torch.zeros(layout.shape(6), dtype=torch.int32, device=device)
    cache = empty_cache(layout, 6)

    def forward(query, key, value, pages, query_start, kv_length, page_table):
        mark_as_donated([pages])
        cache = KVCache(pages, None, KernelPages(dtype, layout.num_rows, PAGE_SIZE, num_cores=0))
        batch = replace(step_batch(STEPS[0]), query_start=query_start, kv_length=kv_length, page_table=page_table)
        return [pages, attention_op.attend_and_write(query, key, value, cache, batch, size**-0.5, window, soft_cap)]

    attend = CompiledFunction(forward)

    for step in STEPS:
        batch = step_batch(step)
        num_tokens = len(batch.tokens)
        query, key, value = torch.randn(num_tokens, 4, size), *torch.randn(2, num_tokens, 2, size)
        tables = batch.query_start, batch.kv_length, batch.page_table
        pages, actual = attend(query, key, value, pages, *tables)
        actual = actual.cpu()
        write_kv_pages(key[:-2], value[:-2], cache, batch.slot[:-2])
        expected = paged_attention(query, cache, batch, size**-0.5, window, soft_cap)
        assert_close(actual[:-2], expected[:-2])
        assert (actual[-2:] == 0).all()
    data, _ = unpack_pages(jnp.asarray(pages.cpu().numpy()), layout)
    np.testing.assert_array_equal(np.asarray(data.astype(jnp.float32)), cache.data.float().numpy())


@pytest.mark.libtpu
@pytest.mark.parametrize(("dtype", "topology"), [("int8", "v5e:1x1"), ("bfloat16", "v5p:1x1x1")])
def test_a_graph_with_the_kernel_compiles_for_a_tpu_and_writes_the_cache_in_place(dtype, topology):
    import torch_xla.core.xla_builder as xla_builder
    import torch_xla.core.xla_model as xla_model

    resolve_device("xla")
    layout, num_rows, num_pages = PageLayout(8, 128, dtype), 16, 100

    def placeholder(*shape, dtype=torch.int32):
        return xla_builder.create_placeholder_tensor(shape, dtype)

    numbers = [placeholder(num_rows, heads, 128, dtype=torch.bfloat16) for heads in (32, 8, 8)]
    pages = placeholder(*layout.shape(num_pages))
    tables = placeholder(num_rows + 1), placeholder(num_rows), placeholder(num_rows, 8)
    num_cores = aot.CHIPS[topology[:3]].num_cores
    outputs = torch.ops.torchinfer.ragged_paged_attention(
        *numbers, pages, *tables, dtype, 128**-0.5, None, None, num_cores
    )
    text = xla_model.get_stablehlo(list(outputs))
    main = text[text.index("@main(") :]
    names = main[: main.index("->")].split("%arg")[1:]
    at = next(index for index, name in enumerate(names) if "x".join(map(str, layout.shape(num_pages))) in name)
    compiled = aot.compile_hlo(text, topology, donate=(at,))
    assert "tpu_custom_call" in compiled.hlo
    assert compiled.alias_bytes == num_pages * layout.page_bytes
    assert compiled.temporary_bytes < layout.page_bytes * num_pages // 10


def test_the_fake_has_the_shapes_of_the_result():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, pages = torch.empty(3, 4, 64), torch.empty(3, 2, 64), torch.empty(5, 264, 128, dtype=torch.int32)
        ints = torch.empty(2, dtype=torch.int32)
        outputs = torch.ops.torchinfer.ragged_paged_attention(
            query, key, key, pages, ints, ints, ints, "int8", 1.0, None, None, 0
        )
    assert [(each.shape, each.dtype) for each in outputs] == [(x.shape, x.dtype) for x in (query, pages)]
