"""Half a layer in one call of the CPU library: the same bits as its ops one by one."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from torchinfer.batch import Batch, KVCache
from torchinfer.kernels.cpu import library
from torchinfer.models.block import Block
from torchinfer.models.config import ModelConfig, RopeConfig
from torchinfer.models.layers import prepare_matrices
from torchinfer.models.rope import Rope
from torchinfer.testing import Row, make_batch

pytestmark = pytest.mark.skipif(library.open_library() is None, reason="the CPU library was not built here")
PAGE_SIZE = 4
NUM_PAGES = 16
VARIANTS = {  # of ModelConfig, and of Block
    "llama": ({}, {}),
    "gates in whole blocks": ({"intermediate_size": 192, "mlp_bias": True}, {}),
    "biases": ({"attention_bias": True, "output_bias": True, "mlp_bias": True}, {}),
    "qwen3": ({"has_qk_norm": True}, {}),
    "gemma": ({"activation": "gelu_tanh"}, {"norm_offset": 1.0}),
    "gemma2": ({"attention_soft_cap": 5.0, "windows": (6,)}, {"norm_offset": 1.0, "is_sandwich": True}),
    "partial": ({"rope": RopeConfig(rotary_dim=12, theta=100.0, is_interleaved=True)}, {}),
}


def make_config(**changes: object) -> ModelConfig:
    sizes = {"vocab_size": 32, "hidden_size": 72, "num_layers": 1, "num_heads": 6, "num_kv_heads": 2, "head_dim": 20}
    facts = {
        "architecture": "LlamaForCausalLM",
        "intermediate_size": 100,
        "context_length": 64,
        "norm_epsilon": 1e-5,
        "activation": "silu",
        "rope": RopeConfig(rotary_dim=20, theta=100.0),
        "windows": (None,),
        "tie_embeddings": True,
        "attention_scale": 20**-0.5,
    }
    return ModelConfig(**{**sizes, **facts, **changes})


def make_block(variant: str, dtype: torch.dtype) -> tuple[Block, Rope]:
    changes, options = VARIANTS[variant]
    config = make_config(**changes)
    block = Block(config, 0, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5).to(dtype)
    for module in block.modules():
        prepare_matrices(module, None)
    return block, Rope(config.rope)


def make_cache(dtype: torch.dtype) -> KVCache:
    shape = (2, NUM_PAGES, PAGE_SIZE, 2, 20)
    generator = torch.Generator().manual_seed(2)
    if dtype in (torch.int8, torch.float8_e4m3fn):
        data = torch.randn(shape, generator=generator) * 30
        return KVCache(data.to(dtype), torch.rand(shape[:-1], generator=generator) / 30)
    return KVCache(torch.randn(shape, generator=generator).to(dtype))


def make_step(num_padded_tokens: int = 0) -> Batch:
    """A decode across a page's border, a first token, and a chunk of a prompt: 7 tokens."""
    rows = [Row([1], 8, [3, 5, 1], 1), Row([2], 0, [2], 1), Row([3, 4, 5, 6, 7], 3, [7, 4], 1)]
    return make_batch(rows, PAGE_SIZE, num_padded_tokens=num_padded_tokens)


def run(block: Block, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache, batch: Batch) -> tuple[Tensor, KVCache]:
    cache = KVCache(*(tensor.clone() for tensor in cache.tensors))
    return block(x, rope, cache, batch), cache


@pytest.mark.parametrize(
    ("variant", "dtype", "cache_dtype"),
    [
        *product(VARIANTS, [torch.float32, torch.bfloat16], [torch.int8]),
        *product(["llama"], [torch.bfloat16], [torch.bfloat16, torch.float8_e4m3fn]),
        ("llama", torch.float32, torch.float32),
    ],
    ids=str,
)
def test_fused_is_one_by_one(level: str, variant: str, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    block, rope_layer = make_block(variant, dtype)
    batch, cache = make_step(), make_cache(cache_dtype)
    x = torch.randn(len(batch.tokens), 72, generator=torch.Generator().manual_seed(3)).to(dtype)
    before, rope = x.clone(), rope_layer(batch)
    expected, expected_cache = run(block, x, rope, cache, batch)
    block.fuse()
    assert block._fused_attention is not None and block._fused_mlp is not None
    for _ in range(2):  # the second call has another cache and a template that was used
        found, found_cache = run(block, x, rope, cache, batch)
        assert torch.equal(found, expected)
        for a, b in zip(found_cache.tensors, expected_cache.tensors, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert torch.equal(x, before)


def test_what_does_not_fit_is_refused_and_nothing_written() -> None:
    block, rope_layer = make_block("llama", torch.float32)
    block.fuse()
    batch, cache = make_step(), make_cache(torch.float32)
    x, rope = torch.randn(len(batch.tokens), 72), rope_layer(batch)
    data = cache.data.clone()
    outside = make_batch([Row([1], 8, [3, 5, NUM_PAGES], 1)], PAGE_SIZE)
    cases = [
        (x[:-1], rope, cache, batch),
        (x.bfloat16(), rope, cache, batch),
        (x[:, ::2].repeat(1, 2).t().contiguous().t(), rope, cache, batch),
        (x, (rope[0][:-1], rope[1]), cache, batch),
        (x, rope, KVCache(cache.data[:, :, :2].contiguous()), batch),
        (x[:1], rope_layer(outside), cache, outside),
    ]
    for arguments in cases:
        with pytest.raises(ValueError):
            block(*arguments)
    assert torch.equal(cache.data, data)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_tokens_that_pad_a_step_leave_what_the_last_of_them_wrote(num_threads: int, cache_dtype: torch.dtype) -> None:
    block, rope_layer = make_block("llama", torch.float32)
    # Threads take 82 tokens at a time, here: the last one by itself, which is done before those in front of it are.
    batch, cache = make_step(82 * 8 + 1 - 7), make_cache(cache_dtype)
    x = torch.randn(len(batch.tokens), 72, generator=torch.Generator().manual_seed(3))
    rope = rope_layer(batch)
    expected, expected_cache = run(block, x, rope, cache, batch)
    block.fuse()
    for _ in range(10):
        found, found_cache = run(block, x, rope, cache, batch)
        assert torch.equal(found, expected)
        for a, b in zip(found_cache.tensors, expected_cache.tensors, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_step_without_tokens_gives_nothing() -> None:
    block, rope_layer = make_block("gemma2", torch.float32)
    block.fuse()
    library.configure()  # new threads, whose memory nobody has used
    rows, cache = make_step(), make_cache(torch.float32)
    names = ("tokens", "positions", "slot", "row", "rope_length", "kv_length", "page_table")
    batch = replace(rows, query_start=rows.query_start[:1], **{name: getattr(rows, name)[:0] for name in names})
    before = cache.data.clone()
    assert block(torch.empty(0, 72), rope_layer(batch), cache, batch).shape == (0, 72)
    assert torch.equal(cache.data, before)
