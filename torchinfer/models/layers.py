"""The layers that models are built of. Parameters are empty until the loader fills them.

Letters: T tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchinfer import kernels
from torchinfer.batch import Batch, KVCache
from torchinfer.models.config import ModelConfig
from torchinfer.quantization.matrix import QuantizedMatrix
from torchinfer.quantized_weight import PreparedWeight, QuantizedWeight


class Layer(nn.Module):
    """A module whose call gives a tensor; nn.Module leaves that open."""

    __call__: Callable[..., Tensor]


class Linear(Layer):
    """x @ weight.T + bias. `outputs` names the parts of a merged matrix: {"q": 512, "k": 128, "v": 128}.

    `is_router`: small, and decides which experts see a token: never quantized.
    """

    MATRICES = ("weight",)  # what prepare_matrices may replace

    def __init__(
        self, in_features: int, outputs: int | Mapping[str, int], has_bias: bool = False, is_router: bool = False
    ) -> None:
        super().__init__()
        self.is_router = is_router
        sizes = [outputs] if isinstance(outputs, int) else list(outputs.values())
        names = [] if isinstance(outputs, int) else list(outputs)
        ends = list(accumulate(sizes))
        self.slots = {name: slice(end - size, end) for name, size, end in zip(names, sizes, ends, strict=bool(names))}
        self.weight: nn.Parameter | QuantizedMatrix | PreparedMatrix | PreparedWeight
        self.weight = nn.Parameter(torch.empty(ends[-1], in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(ends[-1]), requires_grad=False) if has_bias else None

    @property
    def prepared(self) -> PreparedWeight | None:
        """What the device's kernels made of the matrix, if they did."""
        return self.weight if is_prepared(self.weight) else None

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[N, in] -> [N, out], of norm(x) if there is a norm."""
        weight, bound = self.for_kernel(), self.input_bound
        if norm is not None and bound is None and not isinstance(weight, Tensor):
            return kernels.linear_of_norm(x, norm.weight, norm.epsilon, norm.offset, weight, self.bias)
        x = x if norm is None else norm(x)
        return kernels.linear(x if bound is None else x.clamp(-bound, bound), weight, self.bias)

    def gated(self, x: Tensor, activation: str, norm: RMSNorm | None = None) -> Tensor:
        """[N, in] -> [N, out / 2]: the gated activation of `forward`; in one pass where the device's kernels can."""
        weight = self.weight() if isinstance(self.weight, PreparedMatrix) else self.prepared
        if weight is None:
            return kernels.gated_activation(self(x, norm), activation)
        return kernels.gated_linear(x if norm is None else norm(x), weight, activation, self.bias)

    def of_gated(self, gate_up: Linear, activation: str, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[N, hidden] -> [N, out], of the gated activation of gate_up(x, norm)."""
        weight = self.for_kernel()
        if isinstance(weight, Tensor) or self.input_bound is not None or kernels.has_port("gated_linear", x):
            return self(gate_up.gated(x, activation, norm))
        return kernels.linear_of_gated(gate_up(x, norm), activation, weight, self.bias)

    def for_kernel(self) -> Tensor | QuantizedWeight | PreparedWeight:
        """The matrix as kernels take it."""
        is_held = isinstance(self.weight, (QuantizedMatrix, PreparedMatrix))
        return self.weight() if is_held else self.weight  # type: ignore[operator, return-value]

    @property
    def input_bound(self) -> float | None:
        """Beyond which inputs are cut off before they are rounded."""
        return self.weight.scheme.input_bound if isinstance(self.weight, QuantizedMatrix) else None


class PreparedMatrix(nn.Module):
    """A matrix as the TPU's kernels have it, with buffers on meta: what it is called with takes their place."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, torch.empty_like(tensor, device="meta"))
        self._empty = replace(weight, **dict(self.named_buffers()))

    def forward(self) -> PreparedWeight:
        """The matrix for a kernel."""
        weight: PreparedWeight = replace(self._empty, **dict(self.named_buffers()))
        return weight


def is_prepared(matrix: object) -> TypeGuard[Any]:
    """Whether a layer's matrix is what the device's kernels made of it. A tensor that is no parameter stands in for one
    where a model is called with other tensors."""
    return not isinstance(matrix, (nn.Module, Tensor))


def prepare_matrices(layer: nn.Module, num_cores: int | None) -> None:
    """Replace a layer's matrices by what its device's kernels make of them, each in its memory if it fits there.

    num_cores: of a TPU, see `kernels.prepare`.
    """
    for name in preparable(layer):
        matrix = getattr(layer, name)
        own = matrix() if isinstance(matrix, QuantizedMatrix) else matrix.data
        prepared = kernels.prepare(own, may_overwrite=True, num_cores=num_cores)
        if prepared is not None:
            delattr(layer, name)  # nn.Module does not let a parameter become anything else
            setattr(layer, name, prepared)


def preparable(layer: nn.Module) -> Iterator[str]:
    """The names of a layer's matrices that a device's kernels may have in a layout of theirs."""
    for name in getattr(layer, "MATRICES", ()):
        matrix = getattr(layer, name)
        if isinstance(matrix, QuantizedMatrix):
            # Inputs that are bounded are by the layer, which must know the scheme.
            if matrix.scheme.input_bound is None:
                yield name
        elif isinstance(matrix, nn.Parameter):  # not prepared before
            yield name


class Embedding(Layer):
    """Rows of a table. `first_row`, int32 [1]: of a chip that has those from there on; None where all rows are."""

    first_row: Tensor | None

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size), requires_grad=False)
        self.register_buffer("first_row", None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[T] int32 -> [T, size]; zeros for rows that others have."""
        if self.first_row is None:
            return functional.embedding(tokens, self.weight)
        row = tokens - self.first_row
        is_here = (row >= 0) & (row < self.weight.shape[0])
        return torch.where(is_here[:, None], functional.embedding(torch.where(is_here, row, 0), self.weight), 0)


class RMSNorm(Layer):
    """Root mean square norm over the last dimension; `offset` is added to the weight (1 in Gemma)."""

    def __init__(self, size: int, epsilon: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.epsilon, self.offset = epsilon, offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return kernels.rms_norm(x, self.weight, self.epsilon, self.offset)


class LayerNorm(Layer):
    """Mean and variance norm over the last dimension, with bias."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return kernels.layer_norm(x, self.weight, self.bias, self.epsilon)


class Attention(Layer):
    """Self-attention over the paged cache, with rotary embedding; q, k and v come out of one matrix."""

    def __init__(self, config: ModelConfig, layer: int, norm_offset: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {"q": query_size, "k": kv_size, "v": kv_size}
        self.qkv = Linear(config.hidden_size, parts, config.attention_bias)
        self.output = Linear(query_size, config.hidden_size, config.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_epsilon, norm_offset) if config.has_qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_epsilon, norm_offset) if config.has_qk_norm else None
        self.scale, self.soft_cap = config.attention_scale, config.attention_soft_cap
        self.window = config.windows[layer]
        self.is_interleaved = config.rope.is_interleaved

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv_cache: KVCache, batch: Batch, norm: RMSNorm | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], of norm(x) if there is one; writes this step's keys and values into kv_cache."""
        heads = self.qkv(x, norm).view(x.shape[0], -1, self.head_dim)  # [T, H + 2 K, D]
        query_key, value = heads.split_with_sizes((self.num_heads + self.num_kv_heads, self.num_kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = query_key.split_with_sizes((self.num_heads, self.num_kv_heads), 1)
            query_key = torch.cat((self.q_norm(query), self.k_norm(key)), 1)
        attended = kernels.rotate_and_attend(
            query_key,
            value,
            *rope,
            self.is_interleaved,
            kv_cache,
            batch,
            scale=self.scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        return self.output(attended.flatten(1))


class GatedMLP(Layer):
    """down(activation(gate(x)) * up(x)); gate and up come out of one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, has_bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, {"gate": intermediate_size, "up": intermediate_size}, has_bias)
        self.down = Linear(intermediate_size, hidden_size, has_bias)
        self.activation = activation

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden], of norm(x) if there is a norm."""
        return self.down.of_gated(self.gate_up, self.activation, x, norm)


class MLP(Layer):
    """down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.down(activate(self.up(x), self.activation))


def activate(x: Tensor, activation: str) -> Tensor:
    """silu, gelu or gelu_tanh of each value."""
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])
