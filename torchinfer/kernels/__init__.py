"""The door: every op that has a device-specific port, with its contract.

A caller imports ops from here and nothing of `kernels/` directly. `PORTS` says which backends have an op of their
own; all others run `kernels/reference`, plain PyTorch, which is also the truth that ports are tested against.
`TORCHINFER_KERNELS=reference` forces the reference everywhere, to bisect a wrong result.

Letters: T tokens, R request rows, H query heads, K key-value heads, D head size, P pages, N rows, E experts.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchinfer.batch import Batch, KVCache, SamplingTensors
from torchinfer.errors import ConfigError
from torchinfer.layer_parts import AttentionParts, FusedAttention, FusedMLP, MLPParts
from torchinfer.quantized_weight import PreparedWeight, QuantizedWeight

logger = logging.getLogger(__name__)

BACKENDS = {"cpu": "cpu", "cuda": "cuda", "xla": "tpu"}  # torch device type -> folder of kernels/
PORTS: dict[str, tuple[str, ...]] = {
    "linear": ("cpu", "tpu", "cuda"),
    "rms_norm": ("cpu", "cuda"),
    "layer_norm": ("cpu",),
    "rotary_embedding": ("cpu", "cuda"),
    "gated_activation": ("cpu", "cuda"),
    "write_kv_pages": ("cpu", "tpu", "cuda"),
    "paged_attention": ("cpu", "tpu", "cuda"),
    "grouped_matmul": ("cpu", "tpu", "cuda"),
    "grouped_gated_matmul": ("cpu", "tpu", "cuda"),
    "gated_linear": ("tpu",),
    "quantized_matmul": ("cuda",),
    "linear_of_norm": ("cuda",),
    "linear_of_gated": ("cuda",),
    "rotate_and_write": ("cuda",),
    "dequantize": (),
    "greedy": ("cpu",),
    "sample": ("cpu", "cuda"),
    "quantize_matrix": ("cpu",),
}
# Without a port two ops of the door, one after the other.
COMPOSED = ("linear_of_norm", "linear_of_gated", "gated_linear", "rotate_and_write")
PREPARING = {"packed_weight": ("cpu", "cuda"), "fused_layer": ("cpu",)}  # layouts of matrices; calls for half a layer
_folders: dict[str, str] = {}
_loaded: dict[str, dict[str, Callable[..., Tensor]]] = {}


def load_ports(device_type: str) -> dict[str, Callable[..., Tensor]]:
    """Import every op's implementation for a device type, once; log those that fall back to the reference."""
    if device_type not in _loaded:
        backend = _find_folder(device_type)
        table = {}
        for op, backends in PORTS.items():
            if op in COMPOSED and backend not in backends:
                continue
            folder = backend if backend in backends else "reference"
            table[op] = getattr(importlib.import_module(f"torchinfer.kernels.{folder}.{op}"), op)
        fallbacks = [op for op, backends in PORTS.items() if backend not in backends and op in table]
        logger.info("kernels for %s: reference for %s", device_type, ", ".join(fallbacks) or "none")
        _loaded[device_type] = table
    return _loaded[device_type]


def _find_folder(device_type: str) -> str:
    """The folder of a device's ports; reference if it has none, or none that work here."""
    if device_type not in _folders:
        folder = BACKENDS.get(device_type, "reference")
        is_unwanted = os.environ.get("TORCHINFER_KERNELS") == "reference" and folder != "tpu"
        is_missing = (folder == "cpu" and not _has_cpu_library()) or (folder == "cuda" and not _has_triton())
        if is_unwanted or is_missing:
            folder = "reference"
        _folders[device_type] = folder
    return _folders[device_type]


def _has_cpu_library() -> bool:
    library = importlib.import_module("torchinfer.kernels.cpu.library")
    try:
        return library.open_library() is not None
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _has_triton() -> bool:
    try:
        problem = importlib.import_module("torchinfer.kernels.cuda.probe").problem()
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        problem = "Triton is not installed: install torchinfer[cuda]"
    if problem is not None:
        logger.warning("PyTorch computes in place of the kernels for CUDA, many times slower: %s", problem)
    return problem is None


def _port(op: str, x: Tensor) -> Callable[..., Tensor]:
    return load_ports(x.device.type)[op]


def has_port(op: str, x: Tensor) -> bool:
    """Whether x's device has one of the composed ops in one pass."""
    return op in load_ports(x.device.type)


def _port_of_composed(op: str, x: Tensor, weight: object) -> Callable[..., Tensor] | None:
    """None where the ops that it is made of are called: without a port, and where nothing is rounded to 8 bits."""
    if isinstance(weight, Tensor) or (isinstance(weight, QuantizedWeight) and weight.activations == "none"):
        return None
    return load_ports(x.device.type).get(op)


def prepare(
    weight: Tensor | QuantizedWeight, may_overwrite: bool = False, num_cores: int | None = None
) -> PreparedWeight | None:
    """Bring a matrix [O, I], or experts' [E, O, I], into the layout that the device's kernels stream, once.

    None where the device has no such layout or no kernel for the matrix, which then stays as it is. With
    `may_overwrite` the result may lie in the memory of `weight`, which is not to be read any more. `num_cores` are
    those of a TPU, for which matrices without memory can be prepared, too; with 0 XLA computes the same without
    kernels.
    """
    if num_cores is not None:
        module = importlib.import_module("torchinfer.kernels.tpu.packed_weight")
        packed: PreparedWeight | None = module.prepare(weight, num_cores)
        return packed
    values = weight if isinstance(weight, Tensor) else weight.values
    module = _preparing_module(values, "packed_weight")
    return None if module is None else module.prepare(weight, may_overwrite)


def fuse_attention(parts: AttentionParts) -> FusedAttention | None:
    """One call for half a layer, if the device has it: the same bits as its ops one by one."""
    module = _preparing_module(parts.norm, "fused_layer")
    return None if module is None else module.fuse_attention(parts)


def fuse_mlp(parts: MLPParts) -> FusedMLP | None:
    """As `fuse_attention`, for the other half."""
    module = _preparing_module(parts.norm, "fused_layer")
    return None if module is None else module.fuse_mlp(parts)


def _preparing_module(where: Tensor, name: str) -> Any:
    """That module of the folder for a tensor's device; None where the folder prepares nothing by itself."""
    folder = _find_folder(where.device.type)
    return importlib.import_module(f"torchinfer.kernels.{folder}.{name}") if folder in PREPARING[name] else None


def load_page_attention() -> None:
    """Import what computes over caches with `pages`: jax, and the kernel."""
    load_ports("xla")["attend_and_write"] = importlib.import_module(
        "torchinfer.kernels.tpu.attention_op"
    ).attend_and_write


def load_sampler() -> None:
    """Let the TPU's kernel draw tokens on XLA, where the reference would sort: jax is imported."""
    load_ports("xla")["sample"] = importlib.import_module("torchinfer.kernels.tpu.sample_op").sample
    logger.info("kernels for xla: the TPU's for sample")


def linear(x: Tensor, weight: Tensor | QuantizedWeight | PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """x times the transposed matrix, plus bias.

    x: [N, I]; weight: [O, I]; bias: [O] in x's dtype. Returns [N, O] in x's dtype. A matrix that was prepared gives
    each row the same bits whatever rows come with it; it takes x in its own dtype, or in any if it is quantized.
    """
    if isinstance(weight, QuantizedWeight):
        product = quantized_matmul(x, weight)
        return product if bias is None else product + bias
    return _port("linear", x)(x, weight, bias)


def linear_of_norm(
    x: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    offset: float,
    weight: Tensor | QuantizedWeight | PreparedWeight,
    bias: Tensor | None = None,
) -> Tensor:
    """`linear` of `rms_norm`; in fewer passes where inputs are rounded to 8 bits and the device can.

    The last bit of the norm may differ then, and an input that it decides about is the neighbour in 8 bits.
    x: [N, I]; norm_weight: [I]; weight: [O, I]. Returns [N, O].
    """
    port = _port_of_composed("linear_of_norm", x, weight)
    if port is None:
        return linear(rms_norm(x, norm_weight, epsilon, offset), weight, bias)
    product = port(x, norm_weight, epsilon, offset, weight)
    return product if bias is None else product + bias


def linear_of_gated(
    gate_up: Tensor, activation: str, weight: Tensor | QuantizedWeight | PreparedWeight, bias: Tensor | None = None
) -> Tensor:
    """`linear` of `gated_activation`, with its bits. gate_up: [N, 2 * F]; weight: [O, F]. Returns [N, O]."""
    port = _port_of_composed("linear_of_gated", gate_up, weight)
    if port is None:
        return linear(gated_activation(gate_up, activation), weight, bias)
    product = port(gate_up, activation, weight)
    return product if bias is None else product + bias


def gated_linear(x: Tensor, weight: PreparedWeight, activation: str, bias: Tensor | None = None) -> Tensor:
    """`gated_activation` of `linear`; in one pass, without rounding in between, where the device can.

    x: [N, I]; weight: [2 * F, I] holding gate in its first half, prepared; bias: [2 * F]. Returns [N, F] in x's dtype.
    """
    port = load_ports(x.device.type).get("gated_linear")
    if port is None or bias is not None:
        return gated_activation(linear(x, weight, bias), activation)
    return port(x, weight, activation)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (weight + offset) over the last dimension, in float32; returns x's dtype.

    x: [..., D]; weight: [D]. With offset 0 the normalized value is rounded to x's dtype before the multiplication
    (Llama), with offset 1 after it (Gemma). Source: arXiv 1910.07467; transformers' LlamaRMSNorm, GemmaRMSNorm.
    """
    return _port("rms_norm", x)(x, weight, epsilon, offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dimension, in float32; returns x's dtype.

    x: [..., D]; weight, bias: [D]. The variance is that of all D values, not of a sample. Source: arXiv 1607.06450.
    """
    return _port("layer_norm", x)(x, weight, bias, epsilon)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
    """Rotate the first 2 * F values of each head by position; the others pass through.

    x: [T, heads, D]; cos, sin: [T, F] float32. Interleaved pairs are (0, 1), (2, 3), ... (GPT-J); otherwise
    (0, F), (1, F + 1), ... (Llama). Source: arXiv 2104.09864.
    """
    return _port("rotary_embedding", x)(x, cos, sin, is_interleaved)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up, with gate_up: [N, 2 * F] holding gate in its first half. Returns [N, F].

    activation: silu, gelu, gelu_tanh.
    """
    return _port("gated_activation", gate_up)(gate_up, activation)


def write_kv_pages(key: Tensor, value: Tensor, kv_cache: KVCache, slot: Tensor) -> None:
    """Write each token's key and value into its slot, in place.

    key, value: [T, K, D]; slot: [T] int32. A cache with scales gets for each row of D values x, in float32,
    scale = max|x| / M, at least the smallest normal number, and data = x / scale rounded to the nearest (ties to
    even), M being 127 for int8 and 448 for float8_e4m3fn.
    """
    _port("write_kv_pages", key)(key, value, kv_cache, slot)


def rotate_and_write(
    query_key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool, kv_cache: KVCache, slot: Tensor
) -> Tensor:
    """`rotary_embedding` of queries and keys, then `write_kv_pages`, with their bits; in one pass where the device can.

    query_key: [T, H + K, D], queries first; value: [T, K, D]; cos, sin: [T, F] float32; slot: [T] int32.
    Returns the rotated queries [T, H, D].
    """
    port = load_ports(query_key.device.type).get("rotate_and_write")
    if port is not None:
        return port(query_key, value, cos, sin, is_interleaved, kv_cache, slot)
    query, key = _rotate(query_key, value, cos, sin, is_interleaved)
    write_kv_pages(key, value, kv_cache, slot)
    return query


def _rotate(query_key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> tuple[Tensor, Tensor]:
    """Queries [T, H, D] and keys [T, K, D], of as many heads as values have."""
    sizes = (query_key.shape[1] - value.shape[1], value.shape[1])
    query, key = rotary_embedding(query_key, cos, sin, is_interleaved).split_with_sizes(sizes, 1)
    return query, key


def paged_attention(
    query: Tensor,
    kv_cache: KVCache,
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of each token over its request's pages, softmax in float32.

    query: [T, H, D]; kv_cache: with this step's keys and values already written.
    A token at position p sees positions (p - window, p]. soft_cap c turns a score s into c * tanh(s / c).
    The scale of a key multiplies its scores before the soft cap, that of a value its probabilities after the softmax.
    Returns [T, H, D]; padded tokens hold arbitrary finite values.
    Source: arXiv 2309.06180 (paged), 2604.15464 (ragged); Gemma 2 for the soft cap.
    """
    return _port("paged_attention", query)(query, kv_cache, batch, scale, window, soft_cap)


def rotate_and_attend(
    query_key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    is_interleaved: bool,
    kv_cache: KVCache,
    batch: Batch,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """`rotate_and_write` of the step's queries, keys and values, then `paged_attention`.

    Over a cache with `pages` one sweep writes and attends, after `rotary_embedding`.
    query_key: [T, H + K, D], queries first; value: [T, K, D]. Returns [T, H, D].
    """
    if kv_cache.pages is not None:
        query, key = _rotate(query_key, value, cos, sin, is_interleaved)
        return _port("attend_and_write", query)(query, key, value, kv_cache, batch, scale, window, soft_cap)
    query = rotate_and_write(query_key, value, cos, sin, is_interleaved, kv_cache, batch.slot)
    return paged_attention(query, kv_cache, batch, scale=scale, window=window, soft_cap=soft_cap)


def grouped_matmul(x: Tensor, weight: Tensor | QuantizedWeight | PreparedWeight, group_sizes: Tensor) -> Tensor:
    """x's rows, sorted by group, each times the transposed weight of its group.

    x: [N, I]; weight: [E, O, I]; group_sizes: [E] int32 with sum at most N; rows past the sum return zeros.
    Returns [N, O]. Source: arXiv 2211.15841.
    """
    return _port("grouped_matmul", x)(x, weight, group_sizes)


def grouped_gated_matmul(
    x: Tensor, weight: Tensor | QuantizedWeight | PreparedWeight, group_sizes: Tensor, activation: str
) -> Tensor:
    """`gated_activation` of `grouped_matmul`: the first half of experts, in one pass where the device has it.

    x: [N, I]; weight: [E, 2 * F, I] holding gate in its first half. Returns [N, F].
    """
    return _port("grouped_gated_matmul", x)(x, weight, group_sizes, activation)


def quantized_matmul(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x times the transposed quantized matrix.

    x: [N, I], finite; weight: [O, I]. Where the weight asks for it, each row of x, or each `input_group` of a row, is
    rounded to nearest by its largest value, or by the weight's input_scale; integers are summed in int32, all else in
    float32. Returns [N, O] in x's dtype. Source: arXiv 2208.07339, 2209.05433 (e4m3), 2412.19437 (groups).
    """
    return _port("quantized_matmul", x)(x, weight)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The numbers that a quantized matrix stands for: float32 [O, I]."""
    return _port("dequantize", weight.values)(weight)


def greedy(logits: Tensor) -> Tensor:
    """The most probable token ids [R] int32 from logits [R, V] float32; the smallest id of equal ones."""
    return _port("greedy", logits)(logits)


def sample(logits: Tensor, params: SamplingTensors, *, any_filter: bool) -> Tensor:
    """Token ids [R] int32 from logits [R, V] float32, drawn with one number in [0, 1) for each row.

    The logits over the temperature are kept that top_k, then top_p among those, then min_p leave, and those equal to
    the last of them. The number picks the token by inversion of the cumulative distribution in vocabulary order, so an
    id does not depend on the batch. Rows with temperature 0, and those without a distribution (NaN, infinity), are
    greedy. `any_filter`: some row has top_k, top_p or min_p. Source: arXiv 1904.09751 (top-p), 2407.01082 (min-p).
    """
    return _port("sample", logits)(logits, params, any_filter)


def quantize_matrix(weight: Tensor, values: Tensor, scale: Tensor, row_block: int, column_block: int) -> None:
    """Quantize rows of a matrix by `row_block` outputs and `column_block` inputs that share a scale, in place.

    weight: float [R, I]; values: int8 or float8_e4m3fn [R, I], or uint8 [R, I / 2]; scale: float32
    [ceil(R / row_block), G]. Values are weight / scale, rounded to nearest (ties to even). The largest number of a
    block becomes 127 or 448; with 4 bits, where row_block is 1 and column_block divides I, the scale is that of some
    that gives the least squared error. Blocks of zeros get scale 1. What is not finite makes its scale so, too.
    Source: kernels/reference/quantize_matrix.py.
    """
    _port("quantize_matrix", weight)(weight, values, scale, row_block, column_block)
