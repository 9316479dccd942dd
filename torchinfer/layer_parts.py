"""What half a layer of a decoder consists of: plain data that a device may fuse into one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from torchinfer.batch import Batch, KVCache
from torchinfer.quantized_weight import PreparedWeight


@dataclass(frozen=True, slots=True)
class Projection:
    """A prepared matrix [O, I] and its bias [O]."""

    weight: PreparedWeight
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParts:
    """y = x + output_norm(output(attention(qkv(norm(x))))), the norms as `kernels.rms_norm` has them."""

    norm: Tensor  # [hidden]
    qkv: Projection  # [(H + 2 K) D, hidden]
    query_norm: Tensor | None  # [D], of each head before its rotation
    key_norm: Tensor | None
    output: Projection  # [hidden, H D]
    output_norm: Tensor | None  # [hidden]
    epsilon: float
    offset: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    soft_cap: float | None
    window: int | None
    is_interleaved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPParts:
    """y = x + output_norm(down(activation(gate) * up)), with gate and up from gate_up(norm(x))."""

    norm: Tensor  # [hidden]
    gate_up: Projection  # [2 F, hidden]
    down: Projection  # [hidden, F]
    output_norm: Tensor | None  # [hidden]
    epsilon: float
    offset: float
    activation: str


class FusedAttention(Protocol):
    """AttentionParts in one call."""

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], kv_cache: KVCache, batch: Batch) -> Tensor:
        """[T, hidden] -> [T, hidden], with this step's keys and values written into kv_cache."""


class FusedMLP(Protocol):
    """MLPParts in one call."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
