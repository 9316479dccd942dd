"""KV cache dtypes: bytes per token, tokens in the same memory, and the error of attention over what is stored.

OMP_NUM_THREADS=1 python benchmarks/kv_cache.py

Errors are against float64 attention over keys and values before they were stored: root mean square, relative to that
of the output. Two KV heads, eight query heads, one token that decodes, float32; values are normal, keys too, or with
four channels that are eight times larger, as real models have them. The scale is float32, or rounded to bfloat16
before the row is divided by it, or after.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from torchinfer import kernels
from torchinfer.batch import KVCache
from torchinfer.kv_cache.tensors import DTYPES, SCALED
from torchinfer.testing import Row, make_batch, poisoned_cache

HEADS, KV_HEADS, PAGE_SIZE = 8, 2, 16
LENGTHS = (128, 512, 2048, 8192)


def bytes_per_token(dtype: torch.dtype, head_dim: int, scale_bytes: int = 4) -> int:
    """Of one layer and one KV head, keys and values."""
    return 2 * (head_dim * dtype.itemsize + (scale_bytes if dtype in SCALED else 0))


def make_context(length: int, head_dim: int, outlier: float, generator: torch.Generator) -> Tensor:
    """Keys and values [2, length, K, D] float32."""
    context = torch.randn(2, length, KV_HEADS, head_dim, generator=generator)
    context[0, ..., :: head_dim // 4] *= outlier
    return context


def truth(query: Tensor, context: Tensor, scale: float) -> Tensor:
    """[1, H, D] float64: attention of the last token over all."""
    key, value = context.double().repeat_interleave(HEADS // KV_HEADS, 2).transpose(1, 2)  # [H, L, D] each
    weights = (key @ query[0, :, :, None].double() * scale).softmax(1)
    return (weights * value).sum(1)[None]


def with_bfloat16_scales(context: Tensor, cache: KVCache, rounded: str, slot: Tensor) -> None:
    """Write once more with scales in bfloat16, rounded before or after the division."""
    assert cache.scale is not None
    kernels.write_kv_pages(context[0], context[1], cache, slot)
    float_scale = cache.scale.view(2, -1, KV_HEADS)[:, slot]
    scale = float_scale.bfloat16().float()
    if rounded == "before":
        largest = 127 if cache.data.dtype == torch.int8 else 448
        scaled = (context / scale[..., None]).clamp(-largest, largest)
        data = (scaled.round() if cache.data.dtype == torch.int8 else scaled).to(cache.data.dtype)
        cache.data.view(torch.int8).view(2, -1, *data.shape[2:])[:, slot] = data.view(torch.int8)
    cache.scale.view(2, -1, KV_HEADS)[:, slot] = scale


def error(name: str, length: int, head_dim: int, outlier: float, rounded: str | None, seeds: int) -> float:
    """Of attention with one dtype, root mean square relative to the truth's."""
    squares = torch.zeros(2, dtype=torch.float64)
    num_pages = -(-length // PAGE_SIZE)
    batch = make_batch([Row([0], length - 1, range(1, num_pages + 1), length)], PAGE_SIZE)
    slot = torch.arange(PAGE_SIZE, PAGE_SIZE + length, dtype=torch.int32)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        context = make_context(length, head_dim, outlier, generator)
        query = torch.randn(1, HEADS, head_dim, generator=generator)
        cache = poisoned_cache((2, num_pages + 1, PAGE_SIZE, KV_HEADS, head_dim), DTYPES[name])
        if rounded is None:
            kernels.write_kv_pages(context[0], context[1], cache, slot)
        else:
            with_bfloat16_scales(context, cache, rounded, slot)
        expected = truth(query, context, head_dim**-0.5)
        actual = kernels.paged_attention(query, cache, batch, scale=head_dim**-0.5).double()
        squares += torch.stack(((actual - expected).square().mean(), expected.square().mean()))
    return float((squares[0] / squares[1]).sqrt())


def measure_errors(head_dim: int, outlier: float, seeds: int) -> dict[str, list[float]]:
    """By dtype and the rounding of its scale, one error for each length."""
    errors = {}
    for name, dtype in DTYPES.items():
        ways = {"": None, ", bf16 scale": "before", ", bf16 scale after": "after"} if dtype in SCALED else {"": None}
        for suffix, rounded in ways.items():
            found = [error(name, length, head_dim, outlier, rounded, seeds) for length in LENGTHS]
            errors[name + suffix] = found
            print(f"{name + suffix:24s}", " ".join(f"{value:.2e}" for value in found))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=16)
    args = parser.parse_args()
    base = bytes_per_token(torch.bfloat16, args.head_dim)
    print(f"bytes of a token, a layer and a KV head of {args.head_dim}; tokens in the memory of one in bfloat16")
    tokens = {name: base / bytes_per_token(dtype, args.head_dim) for name, dtype in DTYPES.items()}
    for name, dtype in DTYPES.items():
        print(f"{name:10s} {bytes_per_token(dtype, args.head_dim):5d}  {tokens[name]:.3f}")
    small = bytes_per_token(torch.int8, args.head_dim, scale_bytes=2)
    print(f"{'scale bf16':10s} {small:5d}  {base / small:.3f}")
    errors = {}
    for outlier in (1.0, 8.0):
        print(f"relative error, some key channels times {outlier:g}; context {', '.join(map(str, LENGTHS))}; floor: 0")
        errors[f"outlier {outlier:g}"] = measure_errors(args.head_dim, outlier, args.seeds)
    result = {"benchmark": "kv_cache", "head_dim": args.head_dim, "tokens": tokens, "lengths": LENGTHS}
    print(json.dumps(result | {"errors": errors}))


if __name__ == "__main__":
    main()
