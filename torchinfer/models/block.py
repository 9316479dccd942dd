"""The block that most families are stacks of."""

from __future__ import annotations

from torch import Tensor

from torchinfer import kernels
from torchinfer.batch import Batch, KVCache
from torchinfer.layer_parts import AttentionParts, FusedAttention, FusedMLP, MLPParts, Projection
from torchinfer.models.config import ModelConfig
from torchinfer.models.layers import Attention, GatedMLP, Layer, Linear, RMSNorm
from torchinfer.models.moe import MoE


class Block(Layer):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `is_sandwich`, what is added has a norm too.

    The mlp is a gated feed-forward layer, or in the layers that the config says, a mixture of experts.
    """

    def __init__(self, config: ModelConfig, layer: int, norm_offset: float = 0.0, is_sandwich: bool = False) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_epsilon, norm_offset)

        self.attention_norm = norm()
        self.attention = Attention(config, layer, norm_offset)
        self.mlp_norm = norm()
        self.mlp: GatedMLP | MoE
        if config.moe is not None and layer in config.moe.layers:
            self.mlp = MoE(config.hidden_size, config.moe, config.activation)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias)
        self.attention_output_norm = norm() if is_sandwich else None
        self.mlp_output_norm = norm() if is_sandwich else None
        self._fused_attention: FusedAttention | None = None
        self._fused_mlp: FusedMLP | None = None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], kv_cache: KVCache, batch: Batch, rows: Tensor | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], or with `rows` [N], int, the results of these tokens only, [N, hidden]."""
        if self._fused_attention is not None:
            x = self._fused_attention(x, rope, kv_cache, batch)
        else:
            attended = self.attention(x, rope, kv_cache, batch, self.attention_norm)
            x = x + (attended if self.attention_output_norm is None else self.attention_output_norm(attended))
        x = x if rows is None else x[rows]
        if self._fused_mlp is not None:
            return self._fused_mlp(x)
        if isinstance(self.mlp, GatedMLP):
            fed = self.mlp(x, self.mlp_norm)
        else:  # experts and their router see the same normed values
            is_live = batch.slot >= batch.page_size
            fed = self.mlp(self.mlp_norm(x), is_live if rows is None else is_live[rows])
        return x + (fed if self.mlp_output_norm is None else self.mlp_output_norm(fed))

    def fuse(self) -> None:
        """Let each half be one call where the device has it; the matrices must have been prepared."""
        self._fused_attention = _fuse_attention(self.attention_norm, self.attention, self.attention_output_norm)
        if isinstance(self.mlp, GatedMLP):
            self._fused_mlp = _fuse_mlp(self.mlp_norm, self.mlp, self.mlp_output_norm)


def _fuse_attention(norm: RMSNorm, attention: Attention, output_norm: RMSNorm | None) -> FusedAttention | None:
    qkv, output = _projection(attention.qkv), _projection(attention.output)
    if qkv is None or output is None:
        return None
    parts = AttentionParts(
        norm=norm.weight,
        qkv=qkv,
        query_norm=_weight(attention.q_norm),
        key_norm=_weight(attention.k_norm),
        output=output,
        output_norm=_weight(output_norm),
        epsilon=norm.epsilon,
        offset=norm.offset,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scale,
        soft_cap=attention.soft_cap,
        window=attention.window,
        is_interleaved=attention.is_interleaved,
    )
    return kernels.fuse_attention(parts)


def _fuse_mlp(norm: RMSNorm, mlp: GatedMLP, output_norm: RMSNorm | None) -> FusedMLP | None:
    gate_up, down = _projection(mlp.gate_up), _projection(mlp.down)
    if gate_up is None or down is None:
        return None
    parts = MLPParts(
        norm=norm.weight,
        gate_up=gate_up,
        down=down,
        output_norm=_weight(output_norm),
        epsilon=norm.epsilon,
        offset=norm.offset,
        activation=mlp.activation,
    )
    return kernels.fuse_mlp(parts)


def _projection(linear: Linear) -> Projection | None:
    """None if its matrix was not prepared."""
    prepared = linear.prepared
    return None if prepared is None else Projection(prepared, linear.bias)


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
