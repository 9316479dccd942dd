"""How many requests fit beside a model's weights."""

from __future__ import annotations

from dataclasses import dataclass

from torchinfer.planner.accelerators import Accelerator
from torchinfer.planner.footprint import Footprint

WEIGHT_SHARE = 0.8  # the rule: of a chip's memory at most this for weights, the rest for the cache
MOST_REQUESTS = 2**20


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of each chip. Exactly: all memory that weights and activations leave. By the rule: 20 % of the memory."""

    memory_bytes: int
    weight_bytes: int
    activation_bytes: int  # of a step with `num_requests`
    cache_bytes: int  # what is left, in whole pages
    num_tokens: int
    num_requests: int
    request_bytes: int  # of the cache of one
    rule_tokens: int
    rule_requests: int

    @property
    def weight_share(self) -> float:
        return self.weight_bytes / self.memory_bytes

    @property
    def keeps_rule(self) -> bool:
        return self.weight_share <= WEIGHT_SHARE

    @property
    def needed_bytes(self) -> int:
        """With one request."""
        return self.weight_bytes + self.activation_bytes + self.request_bytes


def capacity(footprint: Footprint, accelerator: Accelerator, context: int, chunk: int) -> Capacity:
    """Requests of `context` tokens that fit, in steps of `chunk` tokens, or one for each request if that is more.

    Page 0 is nobody's, as in the engine.
    """

    def left(num_requests: int) -> int:
        activations = footprint.activation_bytes(max(chunk, num_requests), num_requests)
        return accelerator.memory_bytes - footprint.weight_bytes - activations - footprint.page_bytes

    request = footprint.request_bytes(context)
    low, high = 0, MOST_REQUESTS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left(middle) >= middle * request else (low, middle - 1)
    pages = max(left(max(low, 1)), 0) // footprint.page_bytes
    by_rule = int((1 - WEIGHT_SHARE) * accelerator.memory_bytes)
    return Capacity(
        memory_bytes=accelerator.memory_bytes,
        weight_bytes=footprint.weight_bytes,
        activation_bytes=footprint.activation_bytes(max(chunk, low), max(low, 1)),
        cache_bytes=(pages + 1) * footprint.page_bytes if pages else 0,
        num_tokens=pages * footprint.page_size,
        num_requests=low,
        request_bytes=request,
        rule_tokens=by_rule // footprint.page_bytes * footprint.page_size,
        rule_requests=by_rule // request,
    )
