"""Tokens drawn from logits in Triton: one launch, a program for each row, no sort.

Filters are a threshold on the logits. It is searched for among the integers whose order is that of float32, by counting
and summing what lies above: 32 passes over a row that the second cache holds, and only for rows that have a filter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchinfer.kernels.cuda.divide import divide
from torchinfer.kernels.cuda.launch import require, with_dense_columns

if TYPE_CHECKING:
    from torchinfer.batch import SamplingTensors

MOST_IN_BLOCK = 4096  # logits that a program looks at together
LEAST_KEY: tl.constexpr = tl.constexpr(-(2**31))


def sample(logits: Tensor, params: SamplingTensors, any_filter: bool) -> Tensor:
    """See the door. Each row finds out by itself whether it has a filter.

    Raises:
        ValueError: tensors do not fit together.
    """
    fields = (params.temperature, params.top_p, params.min_p, params.uniform)
    is_fit = logits.ndim == 2 and logits.dtype == torch.float32 and logits.shape[1] > 0
    is_fit = is_fit and all(t.shape == logits.shape[:1] and t.dtype == torch.float32 for t in fields)
    is_fit = is_fit and params.top_k.shape == logits.shape[:1] and params.top_k.dtype == torch.int32
    require(is_fit, "sample takes logits float32 [R, V], parameters float32 [R] and top_k int32 [R]", logits, *fields)
    logits = with_dense_columns(logits)
    num_rows, size = logits.shape
    ids = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows:
        block = min(MOST_IN_BLOCK, triton.next_power_of_2(size))
        reals = (t.contiguous() for t in fields)
        sample_kernel[(num_rows,)](
            logits, *reals, params.top_k.contiguous(), ids, size, logits.stride(0), BLOCK=block, num_warps=8
        )
    return ids


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """int32 in the order of float32; NaN is above all, as for torch's argmax, and -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def load_scaled(row: tl.tensor, index: tl.tensor, size: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """A block of logits over the temperature; minus infinity past the row's end."""
    return divide(tl.load(row + index, mask=index < size, other=float("-inf")), temperature)


@triton.jit
def above(
    key: tl.tensor,
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    largest: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """How many logits are above the one with this key, and the sum of their weights, exp(x - largest)."""
    count = tl.cast(0, tl.int32)
    mass = tl.cast(0.0, tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = load_scaled(row, index, size, temperature)
        is_above = (key_of(x) > key) & (index < size)
        count += tl.sum(is_above.to(tl.int32), 0)
        mass += tl.sum(tl.where(is_above, tl.exp(x - largest), 0.0), 0)
    return count, mass


@triton.jit
def threshold_of(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    largest: tl.tensor,
    most_above: tl.tensor,  # int32
    mass_above: tl.tensor,  # float32
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The least key above which there are fewer than `most_above` logits, with less than `mass_above` weight."""
    low = tl.cast(-(2**31), tl.int64)
    high = key_of(largest).to(tl.int64)  # nothing is above the largest
    while low < high:
        middle = (low + high) >> 1
        count, mass = above(middle.to(tl.int32), row, size, temperature, largest, BLOCK)
        if (count < most_above) & (mass < mass_above):
            high = middle
        else:
            low = middle + 1
    return high.to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_ps", "min_ps", "uniforms", "top_ks"])
def sample_kernel(
    logits: tl.tensor,  # [R, V]
    temperatures: tl.tensor,  # [R]
    top_ps: tl.tensor,  # [R]
    min_ps: tl.tensor,  # [R]
    uniforms: tl.tensor,  # [R]
    top_ks: tl.tensor,  # [R]
    ids: tl.tensor,  # [R], written
    size: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A program draws the token of a row."""
    own = tl.program_id(0)
    row = logits + own.to(tl.int64) * stride
    temperature = tl.load(temperatures + own)
    is_greedy = temperature == 0.0
    temperature = tl.where(is_greedy, 1.0, temperature)
    largest_key, largest, chosen = (
        tl.cast(LEAST_KEY, tl.int32),
        tl.cast(float("-inf"), tl.float32),
        tl.cast(0, tl.int32),
    )
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = load_scaled(row, index, size, temperature)
        key = tl.where(index < size, key_of(x), LEAST_KEY)
        block_key = tl.max(key, 0)
        if block_key > largest_key:
            largest_key = block_key
            chosen = tl.min(tl.where(key == block_key, index, size), 0)
        largest = tl.maximum(largest, tl.max(x, 0))
    if is_greedy == 0:
        top_k, top_p = tl.load(top_ks + own), tl.load(top_ps + own)
        limit = tl.where(top_k == 0, size, tl.minimum(top_k, size))
        threshold = tl.cast(LEAST_KEY, tl.int32)
        if limit < size:
            threshold = threshold_of(row, size, temperature, largest, limit, float("inf"), BLOCK)
        if top_p < 1.0:
            # Of several that equal the last of the top_k, top_p counts as many as top_k does.
            count, mass = above(threshold, row, size, temperature, largest, BLOCK)
            bits = tl.where(threshold < 0, threshold ^ 0x7FFFFFFF, threshold)
            last = tl.where(limit < size, tl.exp(bits.to(tl.float32, bitcast=True) - largest) * (limit - count), 0.0)
            threshold = tl.maximum(
                threshold, threshold_of(row, size, temperature, largest, size + 1, top_p * (mass + last), BLOCK)
            )
        least = largest + tl.log(tl.load(min_ps + own))
        drawn = draw(row, size, temperature, largest, threshold, least, tl.load(uniforms + own), BLOCK)
        chosen = tl.where(drawn < 0, chosen, drawn)
    tl.store(ids + own, chosen)


@triton.jit
def draw(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    largest: tl.tensor,
    threshold: tl.tensor,  # a key
    least: tl.tensor,  # a logit
    uniform: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The first token with more than `uniform` of the kept weights up to it, itself included; -1 if there is none."""
    total = tl.cast(0.0, tl.float32)
    for start in range(0, size, BLOCK):
        total += tl.sum(kept_weights(row, start, size, temperature, largest, threshold, least, BLOCK), 0)
    target, before, found = uniform * total, tl.cast(0.0, tl.float32), tl.cast(-1, tl.int32)
    for start in range(0, size, BLOCK):
        weights = kept_weights(row, start, size, temperature, largest, threshold, least, BLOCK)
        after = before + tl.sum(weights, 0)
        if (found < 0) & (after > target):
            index = start + tl.arange(0, BLOCK)
            # By rounding the running sum may end below the sum: then it is the block's last token that has weight.
            is_beyond = before + tl.cumsum(weights, 0) > target
            first = tl.min(tl.where(is_beyond & (weights > 0.0), index, size), 0)
            found = tl.where(first < size, first, tl.max(tl.where(weights > 0.0, index, 0), 0))
        before = after
    return found


@triton.jit
def kept_weights(
    row: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    largest: tl.tensor,
    threshold: tl.tensor,
    least: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """exp(x - largest) of a block, zero where a filter leaves the token out."""
    index = start + tl.arange(0, BLOCK)
    x = load_scaled(row, index, size, temperature)
    is_kept = (key_of(x) >= threshold) & (x >= least) & (index < size)
    return tl.where(is_kept | (x != x), tl.exp(x - largest), 0.0)
