"""Half a decoder layer in one call of the CPU library: src/layer.h.

The structures of a layer are filled once, and copied for each call, so that threads do not share one.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchinfer.kernels.cpu.gated_activation import KINDS
from torchinfer.kernels.cpu.library import CACHE_DTYPES, DTYPES, check, loaded, require
from torchinfer.kernels.cpu.packed_weight import PackedWeight
from torchinfer.kernels.cpu.paged_attention import MOST_HEAD_SIZE, require_batch, require_cache

if TYPE_CHECKING:
    from torchinfer.batch import Batch, KVCache
    from torchinfer.layer_parts import AttentionParts, MLPParts, Projection


class StepStruct(ctypes.Structure):
    """StepBatch of src/isa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slot", "query_start", "kv_length", "page_table")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "table_width", "page_size")),
    )


class AttentionLayerStruct(ctypes.Structure):
    """AttentionLayer of src/isa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("step", "x", "y", "cosine", "sine", "cache", "scale")),
        *((name, ctypes.c_int64) for name in ("frequencies", "pages")),
        *((name, ctypes.c_void_p) for name in ("qkv", "output", "qkv_bias", "output_bias")),
        *((name, ctypes.c_void_p) for name in ("norm", "query_norm", "key_norm", "output_norm")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_size", "window")),
        *((name, ctypes.c_float) for name in ("score_scale", "soft_cap", "epsilon", "offset")),
        *((name, ctypes.c_int32) for name in ("is_interleaved", "dtype", "cache_dtype")),
    )


class MlpLayerStruct(ctypes.Structure):
    """MlpLayer of src/isa.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("gate_up", "down", "gate_up_bias", "down_bias", "norm", "output_norm")),
        *((name, ctypes.c_float) for name in ("epsilon", "offset")),
        *((name, ctypes.c_int32) for name in ("kind", "dtype")),
    )


def fuse_attention(parts: AttentionParts) -> FusedAttention | None:
    """See the door.

    Raises:
        ValueError: the parts do not fit together.
    """
    vectors = (parts.query_norm, parts.key_norm, parts.output_norm)
    if not _can_fuse(parts.norm, (parts.qkv, parts.output), vectors) or parts.head_dim > MOST_HEAD_SIZE:
        return None
    heads, kv_heads, size = parts.num_heads, parts.num_kv_heads, parts.head_dim
    rule = (
        f"{heads} heads of {size} numbers are a multiple of {kv_heads} KV heads, a window is at least 1, a cap above 0"
    )
    is_fit = heads > 0 and kv_heads > 0 and heads % kv_heads == 0 and size > 0
    require(is_fit and (parts.window is None or parts.window > 0), rule)
    require(parts.soft_cap is None or parts.soft_cap > 0, rule)
    hidden_size = parts.qkv.weight.shape[-1]
    _require_projection("qkv", parts.qkv, (heads + 2 * kv_heads) * size, hidden_size)
    _require_projection("output", parts.output, hidden_size, heads * size)
    _require_vectors(hidden_size, {"norm": parts.norm, "output_norm": parts.output_norm})
    _require_vectors(size, {"query_norm": parts.query_norm, "key_norm": parts.key_norm})
    return FusedAttention(parts)


def fuse_mlp(parts: MLPParts) -> FusedMLP | None:
    """See the door.

    Raises:
        ValueError: the parts do not fit together.
    """
    if not _can_fuse(parts.norm, (parts.gate_up, parts.down), (parts.output_norm,)):
        return None
    hidden_size, inner_size = parts.gate_up.weight.shape[-1], parts.down.weight.shape[-1]
    _require_projection("gate_up", parts.gate_up, 2 * inner_size, hidden_size)
    _require_projection("down", parts.down, hidden_size, inner_size)
    _require_vectors(hidden_size, {"norm": parts.norm, "output_norm": parts.output_norm})
    return FusedMLP(parts)


def _can_fuse(norm: Tensor, projections: tuple[Projection, ...], vectors: tuple[Tensor | None, ...]) -> bool:
    """Whether all is in one dtype that the library has, in order of its memory."""
    held = [norm, *vectors, *(projection.bias for projection in projections)]
    are_alike = all(t is None or (t.dtype == norm.dtype and t.is_contiguous()) for t in held)
    weights = [projection.weight for projection in projections]
    are_packed = all(isinstance(w, PackedWeight) and w.dtype in (None, norm.dtype) for w in weights)
    return norm.dtype in DTYPES and are_alike and are_packed


def _require_projection(name: str, projection: Projection, num_outputs: int, num_inputs: int) -> None:
    found = projection.weight.shape
    require(found == (num_outputs, num_inputs), f"{name} is [{num_outputs}, {num_inputs}], not {list(found)}")
    _require_vectors(num_outputs, {f"the bias of {name}": projection.bias})


def _require_vectors(size: int, vectors: dict[str, Tensor | None]) -> None:
    for name, vector in vectors.items():
        if vector is not None:
            require(vector.shape == (size,) and vector.is_cpu, f"{name} is [{size}]", vector)


class FusedAttention:
    """AttentionParts; holds what its structure points to."""

    def __init__(self, parts: AttentionParts) -> None:
        self._parts = parts
        self._dtype, self._hidden_size = parts.norm.dtype, parts.qkv.weight.shape[1]
        self._template = AttentionLayerStruct(
            **_projection("qkv", parts.qkv),
            **_projection("output", parts.output),
            norm=parts.norm.data_ptr(),
            query_norm=_pointer(parts.query_norm),
            key_norm=_pointer(parts.key_norm),
            output_norm=_pointer(parts.output_norm),
            heads=parts.num_heads,
            kv_heads=parts.num_kv_heads,
            head_size=parts.head_dim,
            window=parts.window or 0,
            score_scale=parts.scale,
            soft_cap=parts.soft_cap or 0.0,
            epsilon=parts.epsilon,
            offset=parts.offset,
            is_interleaved=parts.is_interleaved,
            dtype=DTYPES[parts.norm.dtype],
        )
        self._with_cache: tuple[KVCache, AttentionLayerStruct] | None = None  # the last one

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], kv_cache: KVCache, batch: Batch) -> Tensor:
        """[T, hidden] -> [T, hidden].

        Raises:
            ValueError: tensors do not fit together, or a row's context is not in its pages; nothing was written then.
        """
        template = self._template_with(kv_cache)
        require(batch.page_size == kv_cache.data.shape[2], f"the batch has pages of {batch.page_size}", kv_cache.data)
        step = step_of(batch)
        _require_x(x, self._dtype, self._hidden_size, step.tokens)
        cos, sin = rope
        is_fit = cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
        is_fit = is_fit and cos.ndim == 2 and cos.shape == sin.shape and len(cos) == step.tokens
        is_fit = is_fit and cos.is_cpu and sin.is_cpu
        require(is_fit, "cos and sin are contiguous float32 [T, F]", cos, sin)
        result = torch.empty_like(x)
        task = AttentionLayerStruct.from_buffer_copy(template)
        task.step, task.x, task.y = ctypes.addressof(step), x.data_ptr(), result.data_ptr()
        task.cosine, task.sine, task.frequencies = cos.data_ptr(), sin.data_ptr(), cos.shape[1]
        check(loaded().torchinfer_cpu_attention_layer(ctypes.byref(task)))
        return result

    def _template_with(self, kv_cache: KVCache) -> AttentionLayerStruct:
        last = self._with_cache  # read once: another thread may put its own there meanwhile
        if last is not None and last[0] is kv_cache:
            return last[1]
        data, parts = kv_cache.data, self._parts
        is_fit = data.ndim == 5 and data.shape[0] == 2 and data.shape[3:] == (parts.num_kv_heads, parts.head_dim)
        require(is_fit and data.dtype in CACHE_DTYPES, "a cache is [2, P, page_size, K, D]", data)
        require_cache(kv_cache)
        template = AttentionLayerStruct.from_buffer_copy(self._template)
        template.cache, template.scale = data.data_ptr(), _pointer(kv_cache.scale)
        template.pages, template.cache_dtype = data.shape[1], CACHE_DTYPES[data.dtype]
        self._with_cache = kv_cache, template
        return template


class FusedMLP:
    """MLPParts; holds what its structure points to."""

    def __init__(self, parts: MLPParts) -> None:
        self._parts = parts
        self._dtype, self._hidden_size = parts.norm.dtype, parts.gate_up.weight.shape[1]
        self._template = MlpLayerStruct(
            **_projection("gate_up", parts.gate_up),
            **_projection("down", parts.down),
            norm=parts.norm.data_ptr(),
            output_norm=_pointer(parts.output_norm),
            epsilon=parts.epsilon,
            offset=parts.offset,
            kind=KINDS[parts.activation],
            dtype=DTYPES[parts.norm.dtype],
        )

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden].

        Raises:
            ValueError: x is not of that shape, not contiguous or in another dtype.
        """
        _require_x(x, self._dtype, self._hidden_size, len(x))
        result = torch.empty_like(x)
        task = MlpLayerStruct.from_buffer_copy(self._template)
        task.x, task.y, task.tokens = x.data_ptr(), result.data_ptr(), len(x)
        check(loaded().torchinfer_cpu_mlp_layer(ctypes.byref(task)))
        return result


_last_step: tuple[Batch, StepStruct] | None = None


def step_of(batch: Batch) -> StepStruct:
    """The batch as the library takes it; all layers of a step ask for the same one."""
    global _last_step
    last = _last_step
    if last is not None and last[0] is batch:
        return last[1]
    slot = batch.slot
    is_fit = slot.ndim == 1 and slot.dtype == torch.int32 and slot.is_contiguous() and slot.is_cpu
    require(is_fit, "slot is contiguous int32 [T]", slot)
    require_batch(batch)
    step = StepStruct(
        slot.data_ptr(),
        batch.query_start.data_ptr(),
        batch.kv_length.data_ptr(),
        batch.page_table.data_ptr(),
        len(slot),
        len(batch.kv_length),
        batch.page_table.shape[1],
        batch.page_size,
    )
    _last_step = batch, step
    return step


def _require_x(x: Tensor, dtype: torch.dtype, hidden_size: int, num_tokens: int) -> None:
    is_fit = x.dtype == dtype and x.shape == (num_tokens, hidden_size) and x.is_contiguous() and x.is_cpu
    if not is_fit:
        require(False, f"the layer takes x [{num_tokens}, {hidden_size}] in {dtype}", x)


def _projection(name: str, projection: Projection) -> dict[str, int | None]:
    weight = projection.weight
    assert isinstance(weight, PackedWeight), "_can_fuse() lets nothing else through"
    return {name: ctypes.addressof(weight.struct), f"{name}_bias": _pointer(projection.bias)}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
