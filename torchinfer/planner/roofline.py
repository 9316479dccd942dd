"""How long a step takes at least: the time of its bytes or of its operations, whichever is longer, and of what chips
send each other.

    memory        weights that the step needs, once; the cache of its requests; new keys and values
    compute       2 operations a weight and token; attention's 4 * heads * head_dim for each position that a token sees
    interconnect  two all-reduces a layer and one of the embeddings, [T, hidden]; an all-to-all of the logits, float32

Source of the model of time: Williams et al., "Roofline", CACM 52(4), 2009; of an all-reduce in a ring of n chips:
2 (n - 1) / n of the bytes through each chip (Patarasuk and Yuan, JPDC 69(2), 2009), and n hops of latency. In an
all-to-all each chip has 1 / n of the bytes, of which 1 / n goes to each other chip the shorter way around, n^2 / 4 hops
together: a quarter of the bytes through each chip, and n / 2 hops of latency.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchinfer.planner.accelerators import Accelerator
from torchinfer.planner.footprint import Footprint

LEFT_OUT = (
    "what kernels do not reach of these limits; activations that leave the chip's fast memory; sampling and the host; "
    "waiting for requests. Transfers between chips are counted as if nothing else went on meanwhile; a hop's latency "
    "is an assumption. Experts are chosen evenly and independently of each other."
)


@dataclass(frozen=True, slots=True)
class Step:
    """Work of one step on each chip, and the least time that it takes."""

    num_tokens: int
    num_requests: int  # whose next token is sampled
    memory_bytes: int
    flops: float
    interconnect_bytes: int  # that a chip sends, and passes on
    memory_seconds: float
    compute_seconds: float
    interconnect_seconds: float

    @property
    def seconds(self) -> float:
        """Memory and compute overlap, the interconnect is waited for."""
        return max(self.memory_seconds, self.compute_seconds) + self.interconnect_seconds

    @property
    def limit(self) -> str:
        """What takes longest: memory, compute or interconnect."""
        times = {
            "memory": self.memory_seconds,
            "compute": self.compute_seconds,
            "interconnect": self.interconnect_seconds,
        }
        return max(times, key=times.__getitem__)


def decode_step(footprint: Footprint, accelerator: Accelerator, batch: int, context: int) -> Step:
    """One new token for each of `batch` requests, each the last of `context` tokens."""
    seen = [batch * min(context, window or context) for window in footprint.config.windows]
    return _step(footprint, accelerator, batch, batch, seen, seen)


def prefill_steps(footprint: Footprint, accelerator: Accelerator, length: int, chunk: int) -> list[Step]:
    """One prompt of `length` tokens, alone, `chunk` tokens a step."""
    steps = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        read = [min(end, window + end - start if window else end) for window in footprint.config.windows]
        seen = [_seen(start, end, window) for window in footprint.config.windows]
        steps.append(_step(footprint, accelerator, end - start, int(end == length), read, seen))
    return steps


def _seen(start: int, end: int, window: int | None) -> int:
    """Positions that the tokens [start, end) see, summed: token i sees i + 1 of them, at most the window."""
    ramp = end if window is None else min(max(window, start), end)  # tokens before it see all
    return (start + 1 + ramp) * (ramp - start) // 2 + (end - ramp) * (window or 0)


def _step(
    footprint: Footprint,
    accelerator: Accelerator,
    num_tokens: int,
    num_requests: int,
    read: list[int],  # for each layer, positions of the cache that are read
    seen: list[int],  # for each layer, pairs of a token and a position
) -> Step:
    config = footprint.config
    flops = _matrix_flops(footprint, num_tokens, num_requests)
    attention = 4.0 * config.num_heads * config.head_dim * sum(seen)
    flops["bfloat16"] = flops.get("bfloat16", 0.0) + attention
    per_layer = footprint.kv_bytes_per_token / config.num_layers
    cache = int(per_layer * sum(read)) + num_tokens * footprint.kv_bytes_per_token
    memory = _weight_bytes(footprint, num_tokens, num_requests) + cache
    sent, seconds = _interconnect(footprint, accelerator, num_tokens, num_requests)
    return Step(
        num_tokens=num_tokens,
        num_requests=num_requests,
        memory_bytes=memory,
        flops=sum(flops.values()),
        interconnect_bytes=sent,
        memory_seconds=memory / accelerator.bytes_per_second,
        compute_seconds=sum(number / accelerator.peak(operands) for operands, number in flops.items()),
        interconnect_seconds=seconds,
    )


def touched_experts(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Experts that at least one of the tokens goes through, expected: each is missed by (1 - k / E) ** T."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def _weight_bytes(footprint: Footprint, num_tokens: int, num_requests: int) -> int:
    """Of weights that a step reads: all layers, the experts that its tokens choose, the head if somebody samples."""
    config, moe = footprint.config, footprint.config.moe
    share = {"layer": 1.0, "head": float(num_requests > 0)}
    if moe is not None:
        share["expert"] = touched_experts(moe.num_experts, moe.top_k, num_tokens) / moe.num_experts
    matrices = sum(share[product.kind] * product.num_bytes for product in footprint.products)
    return int(matrices) + num_tokens * config.hidden_size * footprint.itemsize


def _matrix_flops(footprint: Footprint, num_tokens: int, num_requests: int) -> dict[str, float]:
    """By the format of what is multiplied."""
    moe = footprint.config.moe
    rows = {"layer": float(num_tokens), "head": float(num_requests)}
    if moe is not None:
        rows["expert"] = num_tokens * moe.top_k / moe.num_experts
    flops: dict[str, float] = {}
    for product in footprint.products:
        flops[product.operands] = flops.get(product.operands, 0.0) + 2.0 * product.num_weights * rows[product.kind]
    return flops


def _interconnect(
    footprint: Footprint, accelerator: Accelerator, num_tokens: int, num_requests: int
) -> tuple[int, float]:
    """Bytes that a chip sends, and seconds."""
    chips = footprint.num_chips
    if chips == 1:
        return 0, 0.0
    share = (chips - 1) / chips
    num_reduces = 2 * footprint.config.num_layers + 1
    reduced = 2 * share * num_tokens * footprint.config.hidden_size * footprint.itemsize
    exchanged = (chips**2 // 4) / chips**2 * num_requests * footprint.vocab_size * 4
    sent = num_reduces * reduced + exchanged
    num_hops = num_reduces * chips + (chips / 2 if num_requests else 0)
    return int(sent), sent / accelerator.ring_bytes_per_second + num_hops * accelerator.hop_seconds


def price_per_million(tokens_per_second: float, usd_per_hour: float) -> float:
    """USD for a million tokens."""
    return usd_per_hour / 3600 / tokens_per_second * 1e6
