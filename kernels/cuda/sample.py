"""Tokens drawn from logits in Triton: one launch, a program for each row, no sort.

A row is read once. What is kept of each block of it, the largest logit and the sum of the weights, gives the block in
which the token lies, and that one is read again. Filters are a threshold on the logits, for which a row is swept
several times, from the second cache: each time only blocks that have a logit above the one that is asked about.
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
NEAR: tl.constexpr = tl.constexpr(10.0)  # logits below the largest that are asked about first: improbable, e^-10
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))


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
        sample_kernel[(num_rows,)](
            logits,
            *(t.contiguous() for t in fields),
            params.top_k.contiguous(),
            ids,
            size,
            logits.stride(0),
            BLOCK=block,
            BLOCKS=max(2, triton.next_power_of_2(triton.cdiv(size, block))),  # Triton sorts no single number
            num_warps=8,
        )
    return ids


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
    BLOCKS: tl.constexpr,
) -> None:
    """A program draws the token of a row."""
    own = tl.program_id(0)
    row = logits + own.to(tl.int64) * stride
    temperature = tl.load(temperatures + own)
    chosen, tops, sums = read_once(row, size, temperature, BLOCK, BLOCKS)
    if temperature != 0.0:
        largest = tl.max(tops, 0)
        masses = sums * weight_of(tops, largest, temperature)
        total = tl.sum(masses, 0)
        # A row without a distribution: the total is NaN, or logits over the temperature are infinite.
        if (total > 0.0) & (tl.abs(divide(largest, temperature)) < INFINITY):
            top_k, top_p, min_p = tl.load(top_ks + own), tl.load(top_ps + own), tl.load(min_ps + own)
            threshold = threshold_of(row, size, temperature, tops, total, top_k, top_p, min_p, BLOCK, BLOCKS)
            if threshold > -INFINITY:
                masses = kept_masses(row, size, temperature, tops, threshold, BLOCK, BLOCKS)
            chosen = draw(row, size, temperature, tops, threshold, masses, tl.load(uniforms + own), BLOCK, BLOCKS)
    tl.store(ids + own, chosen)


@triton.jit
def read_once(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The first of the largest logits, NaN above all; of each block [BLOCKS] the largest, minus infinity where there is
    no block, and with a temperature the sum of the weights in relation to the block's largest."""
    block = tl.arange(0, BLOCKS)
    tops, sums = tl.full([BLOCKS], -INFINITY, tl.float32), tl.zeros([BLOCKS], tl.float32)
    largest_key, chosen = tl.cast(LEAST_KEY, tl.int32), tl.cast(0, tl.int32)
    for start in tl.range(0, size, BLOCK, num_stages=3):  # two blocks are on their way while one is looked at
        index = start + tl.arange(0, BLOCK)
        x = tl.load(row + index, mask=index < size, other=-INFINITY)
        key = tl.where(index < size, key_of(x), LEAST_KEY)
        block_key = tl.max(key, 0)
        if block_key > largest_key:
            largest_key = block_key
            chosen = tl.min(tl.where(key == block_key, index, size), 0)
        top = number_of(block_key)
        tops = tl.where(block == start // BLOCK, top, tops)
        if temperature != 0.0:
            weights = weight_of(x, tl.where(top == -INFINITY, 0.0, top), temperature)
            sums = tl.where(block == start // BLOCK, tl.sum(weights, 0), sums)
    return chosen, tops, sums


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """int32 in the order of float32; NaN is above all, as for torch's argmax, and -0 is 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def number_of(key: tl.tensor) -> tl.tensor:
    """float32 that has this key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """exp((x - largest) / temperature), without a division of each x."""
    return tl.exp2((x - largest) * divide(tl.cast(LOG2_E, tl.float32), temperature))


@triton.jit
def threshold_of(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    tops: tl.tensor,  # [BLOCKS]: the largest logit of each block
    total: tl.tensor,  # of the weights
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """The least logit over the temperature that filters keep; minus infinity if they keep all."""
    largest = tl.max(tops, 0)
    least = divide(largest, temperature) + tl.log(min_p)
    # Logits are looked for as they are, not over the temperature: a bit below the least one that min_p keeps.
    bound = least * temperature - tl.abs(least * temperature) * 1e-6
    bound = tl.where(divide(bound, temperature) <= least, bound, -INFINITY)
    kept, threshold = total, tl.cast(-INFINITY, tl.float32)
    if (top_k > 0) & (top_k < size):
        ranked = tl.sort(tops, descending=True)
        low = tl.max(tl.where(tl.arange(0, BLOCKS) == top_k - 1, ranked, -INFINITY), 0)
        low = tl.where(top_p < 1.0, low, tl.maximum(low, bound))
        threshold, count = search(row, size, temperature, tops, low, top_k, False, BLOCK, BLOCKS)
        if top_p < 1.0:
            # Of several that equal the last of the top_k, top_p counts as many as top_k does.
            mass, _, _ = sweep(row, size, temperature, tops, threshold, True, BLOCK, BLOCKS)
            kept = mass + weight_of(threshold, largest, temperature) * (top_k - count)
    if top_p < 1.0:
        low = tl.maximum(threshold, bound)
        threshold, _ = search(row, size, temperature, tops, low, top_p * kept, True, BLOCK, BLOCKS)
    return tl.maximum(divide(threshold, temperature), least)


@triton.jit
def search(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    tops: tl.tensor,
    low: tl.tensor,  # the result is not below it
    limit: tl.tensor,
    IS_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The least logit above which there is less than `limit` of what `sweep` adds up, and how much there is.

    A sum over fewer logits is never larger, rounding included, so halving is exact. Both ends become logits of the row,
    and it ends where they are the same one.
    """
    high, found = tl.max(tops, 0), tl.cast(0.0, tl.float32)  # nothing is above the largest
    middle = tl.maximum(high - NEAR * temperature, low * 0.5 + high * 0.5)
    while low < high:
        middle = tl.where(middle < high, tl.maximum(middle, low), low)  # whatever rounding does, one of them moves
        amount, below, above = sweep(row, size, temperature, tops, middle, IS_MASS, BLOCK, BLOCKS)
        if amount < limit:
            high, found = below, amount
        else:
            low = above
        middle = low * 0.5 + high * 0.5
    return tl.maximum(low, high), found


@triton.jit
def sweep(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    tops: tl.tensor,
    middle: tl.tensor,
    IS_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """How many logits are above `middle`, or if IS_MASS their weights; the largest that is not, the smallest that is.

    Blocks without one above are not read.
    """
    amount, largest = tl.zeros([BLOCK], tl.float32), tl.max(tops, 0)
    below, above = tl.full([BLOCK], -INFINITY, tl.float32), tl.full([BLOCK], INFINITY, tl.float32)
    is_read = tops > middle
    block = next_block(is_read, -1, BLOCKS)
    while block < BLOCKS:
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(row + index, mask=index < size, other=-INFINITY)
        is_above = x > middle
        weights = weight_of(x, largest, temperature) if IS_MASS else 1.0
        amount += tl.where(is_above, weights, 0.0)
        below = tl.maximum(below, tl.where(is_above, -INFINITY, x))
        above = tl.minimum(above, tl.where(is_above, x, INFINITY))
        block = next_block(is_read, block, BLOCKS)
    skipped = tl.max(tl.where(is_read, -INFINITY, tops), 0)
    return tl.sum(amount, 0), tl.maximum(tl.max(below, 0), skipped), tl.min(above, 0)


@triton.jit
def next_block(is_wanted: tl.tensor, last: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """The first wanted block behind the last one; BLOCKS if there is none."""
    block = tl.arange(0, BLOCKS)
    return tl.min(tl.where(is_wanted & (block > last), block, BLOCKS), 0)


@triton.jit
def kept_masses(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    tops: tl.tensor,
    threshold: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """[BLOCKS]: the sum of the weights that filters leave in each block."""
    masses, largest = tl.zeros([BLOCKS], tl.float32), tl.max(tops, 0)
    is_read = divide(tops, temperature) >= threshold
    block = next_block(is_read, -1, BLOCKS)
    while block < BLOCKS:
        weights = kept_weights(row, block, size, temperature, largest, threshold, BLOCK)
        masses = tl.where(tl.arange(0, BLOCKS) == block, tl.sum(weights, 0), masses)
        block = next_block(is_read, block, BLOCKS)
    return masses


@triton.jit
def draw(
    row: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    tops: tl.tensor,
    threshold: tl.tensor,
    masses: tl.tensor,  # [BLOCKS]
    uniform: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """The first token with more than `uniform` of the kept weights up to it, itself included."""
    target = uniform * tl.sum(masses, 0)
    block = first_beyond(masses, 0.0, target, BLOCKS)
    before = tl.sum(tl.where(tl.arange(0, BLOCKS) < block, masses, 0.0), 0)
    weights = kept_weights(row, block, size, temperature, tl.max(tops, 0), threshold, BLOCK)
    return block * BLOCK + first_beyond(weights, before, target, BLOCK)


@triton.jit
def kept_weights(
    row: tl.tensor,
    block: tl.tensor,
    size: tl.tensor,
    temperature: tl.tensor,
    largest: tl.tensor,
    threshold: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Weights of a block, zero where filters leave the token out."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(row + index, mask=index < size, other=-INFINITY)
    return tl.where(divide(x, temperature) >= threshold, weight_of(x, largest, temperature), 0.0)


@triton.jit
def first_beyond(weights: tl.tensor, before: tl.tensor, target: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The first of the weights at which the running sum, from `before` on, is above the target.

    By rounding it may end below: then it is the last one that is not zero.
    """
    index = tl.arange(0, SIZE)
    is_beyond = before + tl.cumsum(weights, 0) > target
    first = tl.min(tl.where(is_beyond & (weights > 0.0), index, SIZE), 0)
    return tl.where(first < SIZE, first, tl.max(tl.where(weights > 0.0, index, 0), 0))
