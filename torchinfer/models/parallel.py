"""Blocks with LayerNorm whose attention and MLP see the same input, as in GPT-J and Falcon."""

from __future__ import annotations

from torch import Tensor

from torchinfer.batch import Batch, KVCache
from torchinfer.models.config import ModelConfig
from torchinfer.models.layers import MLP, Attention, Layer, LayerNorm


class Block(Layer):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm or two; without `norms_in_parallel` one after the other."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        has_mlp_norm = config.norms_in_parallel != 1
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_epsilon) if has_mlp_norm else None
        self.is_parallel = config.norms_in_parallel > 0

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv_cache: KVCache, batch: Batch, rows: Tensor | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], or with `rows` [N], int, the results of these tokens only, [N, hidden]."""
        normed = self.attention_norm(x)
        attended = self.attention(normed, rope, kv_cache, batch)
        if rows is not None:
            x, normed, attended = x[rows], normed[rows], attended[rows]
        if self.mlp_norm is None:
            return attended + self.mlp(normed) + x
        if self.is_parallel:
            return attended + self.mlp(self.mlp_norm(x)) + x
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))
