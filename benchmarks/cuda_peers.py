"""Decode attention as others compute it, over the same numbers as `cuda_cases.decode_case` in bf16.

torch's scaled_dot_product_attention and flex attention read a dense cache [requests, heads, tokens, size], which no
server has: no page is looked up. FlashInfer reads pages of 16 tokens; it is measured where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from cuda_cases import Case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HEADS = (32, 8)
WORKSPACE_BYTES = 128 << 20  # that FlashInfer asks for
PAGE_SIZE = 16
Call = Callable[[], object]


def peer_cases() -> list[Case]:
    """At the corners of figure 1."""
    sizes = ((1, 131072), (16, 4096), (16, 32768), (64, 4096), (64, 32768))
    return [peer_case(name, rows, length, 128, HEADS) for rows, length in sizes for name in peers()]


def tiny_peer_cases() -> list[Case]:
    """That the calls are right, without a compiler."""
    return [peer_case(name, 2, 70, 32, (2, 1)) for name in ("sdpa", "flex")]


def peers() -> dict[str, Callable[[int, int, int, tuple[int, int], str], Call]]:
    """Those that are here."""
    found = {"sdpa": sdpa, "flex": flex}
    return found | ({"flashinfer": flashinfer} if importlib.util.find_spec("flashinfer") else {})


def peer_case(name: str, rows: int, length: int, size: int, heads: tuple[int, int]) -> Case:
    """One token of each request at the end of its context."""
    call = peers()[name]
    num_bytes = 2 * rows * length * heads[1] * size * 2
    title = f"attention decode peer {name} bf16 head {size} batch {rows} context {length}"
    return Case(
        title,
        lambda device: call(rows, length, size, heads, device),
        num_bytes,
        4 * rows * length * heads[0] * size,
        "bf16",
    )


def dense(rows: int, length: int, size: int, heads: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values."""
    cache = torch.ones(2, rows, heads[1], length, size, dtype=torch.bfloat16, device=device)
    return torch.randn(rows, heads[0], 1, size, device=device).bfloat16(), *cache.unbind()


def sdpa(rows: int, length: int, size: int, heads: tuple[int, int], device: str) -> Call:
    """By the backend that torch chooses."""
    query, key, value = dense(rows, length, size, heads, device)
    return lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True)


def flex(rows: int, length: int, size: int, heads: tuple[int, int], device: str) -> Call:
    """Compiled where there is a GPU, for each shape by itself."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = dense(rows, length, size, heads, device)
    attend = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    return lambda: attend(query, key, value, enable_gqa=True)


def flashinfer(rows: int, length: int, size: int, heads: tuple[int, int], device: str) -> Call:
    """Its decode over pages, planned once."""
    import flashinfer as library

    pages = -(-length // PAGE_SIZE)
    cache = torch.ones(rows * pages, 2, PAGE_SIZE, heads[1], size, dtype=torch.bfloat16, device=device)
    query = torch.randn(rows, heads[0], size, device=device).bfloat16()
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    start = torch.arange(rows + 1, dtype=torch.int32, device=device) * pages
    table = torch.randperm(rows * pages, device=device).int()
    last = torch.full((rows,), length - (pages - 1) * PAGE_SIZE, dtype=torch.int32, device=device)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(start, table, last, *heads, size, PAGE_SIZE, **types)
    return lambda: wrapper.run(query, cache)
