"""Tokens drawn from logits that stay in on-chip memory, without a sort, eight rows at a time.

A threshold is the smallest number t so that what is above it weighs less than a limit: tokens count for top-k, their
probabilities for top-p. It is found by halving the range of float32's 2**32 patterns, and the token by halving that of
ids: each step is a pass over the row, in one order of summation, so that sums grow with what is summed. Source: arXiv
1904.09751 (top-p), 2407.01082 (min-p); the halving of patterns is T5X's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchinfer.kernels.tpu.page_layout import LANES, SUBLANES, round_up

CHUNK = 2048  # numbers of a row in the registers
CHUNKS_AT_ONCE = 4  # in a round of a loop
VMEM_LIMIT_BYTES = 60 * 2**20  # of 128 MiB a core on v5e, 64 MiB on v5p
MAX_VOCABULARY = VMEM_LIMIT_BYTES // (4 * 4 * SUBLANES) // CHUNK * CHUNK - CHUNK  # two blocks of logits, two of ours
PASSES = 32 + 32 + 17 + 5  # over a row: two thresholds, the token, and all else
TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM = range(5)  # columns of `parameters`
Ref = Any  # a memory reference of Pallas


def sample_tokens(logits: Array, parameters: Array, *, interpret: Any = False) -> Array:
    """See the door's sample.

    logits: [R, V] float32; parameters: [R, 5] float32: temperature (0: greedy), top_k (0: all), top_p, min_p, and a
    number in [0, 1). Returns int32 [R].
    """
    num_rows, size = logits.shape
    if size > MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {size} does not fit on the chip, which holds {MAX_VOCABULARY}")
    width = round_up(size, CHUNK)
    out: Array = pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=(-(-num_rows // SUBLANES),),
        in_specs=[
            pl.BlockSpec((SUBLANES, parameters.shape[1]), lambda row: (row, 0)),
            pl.BlockSpec((SUBLANES, size), lambda row: (row, 0)),
        ],
        out_specs=pl.BlockSpec((SUBLANES, LANES), lambda row: (row, 0)),
        out_shape=jax.ShapeDtypeStruct((num_rows, LANES), jnp.int32),
        scratch_shapes=[pltpu.VMEM((SUBLANES, width), jnp.float32) for _ in ("scaled", "weight")],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT_BYTES + 2**21
        ),
        cost_estimate=pl.CostEstimate(
            flops=3 * PASSES * num_rows * size, transcendentals=num_rows * size, bytes_accessed=4 * num_rows * size
        ),
        name="sample_tokens",
        interpret=interpret,
    )(parameters, logits)
    return out[:, 0]


def _kernel(parameters: Ref, logits: Ref, out: Ref, scaled: Ref, weight: Ref, *, size: int) -> None:
    def column(index: int) -> Array:
        return parameters[:, index : index + 1]

    is_greedy = column(TEMPERATURE) == 0
    highest = _scale(logits, scaled, jnp.where(is_greedy, 1.0, column(TEMPERATURE)), size)
    weigh = functools.partial(_keep, scaled, weight)
    weigh(lambda x, _: jnp.exp(x - highest))
    count = jnp.where(column(TOP_K) == 0, jnp.inf, column(TOP_K))
    least = _threshold(scaled, None, count, highest)
    mass = weigh(lambda x, old: jnp.where(x >= least, old, 0.0))
    mass = jnp.where(column(TOP_P) >= 1, jnp.inf, column(TOP_P) * mass)
    least = jnp.maximum(least, _threshold(scaled, weight, mass, highest))
    least = jnp.maximum(least, highest + jnp.log(column(MIN_P)))
    total = weigh(lambda x, old: jnp.where(x >= least, old, 0.0))
    target = column(UNIFORM) * total

    def is_beyond(last: Array) -> Array:
        return _sum(scaled, lambda at: jnp.where(_ids(at) <= last, weight[:, at], 0.0)) > target

    index = _bisect(jnp.zeros((SUBLANES, 1), jnp.int32), jnp.full((SUBLANES, 1), size - 1), size, is_beyond)
    # Rounding can put the target onto the total, and there is no total if a number is not finite.
    is_found = (total > target) & ~is_greedy
    out[...] = jnp.broadcast_to(jnp.where(is_found, index, _first(scaled, highest, size)), out.shape)


def _for_each_chunk(width: int, step: Callable[[Any, Array], Array], start: Array) -> Array:
    def at_chunk(number: Any, before: Array) -> Array:
        start = number * CHUNK
        return step(pl.ds(start if isinstance(start, int) else pl.multiple_of(start, CHUNK), CHUNK), before)

    def some(number: Array, before: Array) -> Array:
        for each in range(CHUNKS_AT_ONCE):
            before = at_chunk(number * CHUNKS_AT_ONCE + each, before)
        return before

    rounds, rest = divmod(width // CHUNK, CHUNKS_AT_ONCE)
    result = jax.lax.fori_loop(0, rounds, some, start)
    for each in range(rest):
        result = at_chunk(rounds * CHUNKS_AT_ONCE + each, result)
    return result


def _ids(at: Any) -> Array:
    return at.start + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, CHUNK), 1)


def _scale(logits: Ref, scaled: Ref, temperature: Array, size: int) -> Array:
    """Logits over the temperature, -inf behind the vocabulary -> the highest of a row [8, 1]."""
    whole = size // CHUNK * CHUNK

    def step(at: Any, before: Array) -> Array:
        scaled[:, at] = logits[:, at] / temperature
        return jnp.maximum(before, scaled[:, at])

    highest = _for_each_chunk(whole, step, jnp.full((SUBLANES, CHUNK), -jnp.inf))
    if whole < size:
        scaled[:, whole:] = jnp.full((SUBLANES, CHUNK), -jnp.inf)
        scaled[:, whole:size] = logits[:, whole:size] / temperature
        highest = jnp.maximum(highest, scaled[:, whole:])
    return jnp.max(highest, 1, keepdims=True)


def _sum(ref: Ref, term: Callable[[Any], Array]) -> Array:
    """The sum over a row [8, 1] of what is computed for each chunk."""
    sums = _for_each_chunk(ref.shape[1], lambda at, before: before + term(at), jnp.zeros((SUBLANES, CHUNK)))
    return jnp.sum(sums, 1, keepdims=True)


def _keep(scaled: Ref, weight: Ref, change: Callable[[Array, Array], Array]) -> Array:
    """Change all weights; their sum."""

    def term(at: Any) -> Array:
        weight[:, at] = change(scaled[:, at], weight[:, at])
        return weight[:, at]

    return _sum(scaled, term)


def _threshold(scaled: Ref, weight: Ref | None, limit: Array, highest: Array) -> Array:
    """The least number so that what is above it, counted or weighed, is less than the limit; -inf if nothing limits."""

    def found() -> Array:
        def is_less(key: Array) -> Array:
            least = _from_key(key)
            return (
                _sum(scaled, lambda at: jnp.where(scaled[:, at] > least, 1.0 if weight is None else weight[:, at], 0.0))
                < limit
            )

        lowest = _to_key(jnp.full_like(highest, -jnp.inf))
        return _from_key(_bisect(lowest, _to_key(highest), 2**32, is_less))

    is_limited = jnp.max(jnp.where(limit < jnp.inf, 1.0, 0.0)) > 0  # not NaN, which is one row's own
    return jax.lax.cond(is_limited, found, lambda: jnp.full_like(highest, -jnp.inf))


def _bisect(low: Array, high: Array, size: int, is_true: Callable[[Array], Array]) -> Array:
    """The least of `size` whole numbers from `low` for which it is true; `high`, if for none below."""

    def step(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # does not overflow
        found = is_true(middle)
        return jnp.where(found, low, jnp.minimum(middle + 1, high)), jnp.where(found, middle, high)

    return jax.lax.fori_loop(0, (size - 1).bit_length(), step, (low, high))[1]


def _to_key(number: Array) -> Array:
    """float32 -> int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(number, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_key(key: Array) -> Array:
    return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def _first(scaled: Ref, highest: Array, size: int) -> Array:
    """The first id of the highest number, or of one that is none."""

    def step(at: Any, before: Array) -> Array:
        x = scaled[:, at]
        return jnp.minimum(before, jnp.where((x == highest) | (x != x), _ids(at), size - 1))

    first = _for_each_chunk(scaled.shape[1], step, jnp.full((SUBLANES, CHUNK), size - 1))
    return jnp.min(first.astype(jnp.float32), 1, keepdims=True).astype(jnp.int32)  # lanes are compared in float32 only
