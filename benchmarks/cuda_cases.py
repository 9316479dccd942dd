"""The calls that `cuda_kernels.py` measures, compiles or runs: each makes its tensors on a device, also on meta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchinfer.batch import Batch, KVCache, SamplingTensors
from torchinfer.quantization import SCHEMES, Scheme
from torchinfer.quantized_weight import QuantizedWeight

CACHES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "float32": torch.float32}
FEWER_BITS = ("bf16", "int8", "fp8")
LINEAR = {  # outputs, inputs
    "8b-qkv": (6144, 4096),
    "8b-output": (4096, 4096),
    "8b-gate_up": (28672, 4096),
    "8b-down": (4096, 14336),
    "70b/8-qkv": (1280, 8192),
    "70b/8-output": (8192, 1024),
    "70b/8-gate_up": (7168, 8192),
    "70b/8-down": (8192, 3584),
}
EXPERTS = (8, 28672, 4096)  # of Mixtral 8x7B, gate and up
ZEROS = Scheme(name="int4_zero", values=torch.uint8, column_block=128, has_zero=True)  # as AWQ and GPTQ have them
HELD = SCHEMES | {ZEROS.name: ZEROS}
MANY_ROWS = (1024, 2048, 8192)
# Whose products are compared with which ceiling; bf16 otherwise.
PEAKS = {"int8_w8a8": "int8", "fp8_w8a8": "fp8", "fp8_block_w8a8": "fp8"}


@dataclass(frozen=True)
class Case:
    """A call: `make` gives it, with tensors of its own on a device."""

    name: str
    make: Callable[[str], Callable[[], object]]
    num_bytes: int
    num_operations: int  # a multiply-add is two
    peak: str


def full_cases() -> list[Case]:
    """The figures of docs/benchmarks.md."""
    lengths = (4096, 32768, 131072)
    cases = [decode_case(rows, length, 128, name) for length in lengths for rows in (1, 16, 64) for name in FEWER_BITS]
    cases += [chunk_case(length, 128, name) for length in (2048, 8192) for name in FEWER_BITS]
    for shape in LINEAR:
        few, many = ("int8", "fp8", "int4", "int4_w4a8"), ("int8_w8a8", "fp8_w8a8", "fp8_block_w8a8")
        cases += [linear_case(shape, *LINEAR[shape], s, n) for s in few for n in (1, 16, 64)]
        cases += [linear_case(shape, *LINEAR[shape], s, n) for s in many for n in (16, *MANY_ROWS)]
    cases += [grouped_case(*EXPERTS, s, n) for s in ("bf16", "int8", "fp8", "int4") for n in (2, 8, 32, 16384)]
    return cases


def static_cases() -> list[Case]:
    """One for each way in which a kernel is compiled."""
    cases = [decode_case(8, 4096, size, name) for size, name in ((64, "bf16"), (256, "int8"))]
    cases += [decode_case(8, 4096, 128, name) for name in FEWER_BITS]
    cases += [decode_case(8, 4096, 64, "int8", 71, 1)]  # Falcon's, in tiles of 64 heads
    cases += [chunk_case(4096, size, name) for size, name in ((128, "bf16"), (128, "int8"), (256, "fp8"))]
    few, many = ("int8", "fp8", "int4", "fp8_block"), ("int8", "int4", "int8_w8a8", "fp8_w8a8", "fp8_block_w8a8")
    cases += [linear_case("8b-gate_up", *LINEAR["8b-gate_up"], s, n) for s in few for n in (1, 64)]
    cases += [linear_case("8b-gate_up", *LINEAR["8b-gate_up"], s, 4096) for s in many]
    cases += [
        linear_case("8b-output", *LINEAR["8b-output"], s, 64)
        for s in ("int8", "fp8_block", "int8_w8a8", "fp8_block_w8a8")
    ]
    cases += [grouped_case(*EXPERTS, s, n) for s, n in (("bf16", 16), ("int4", 16), ("bf16", 16384), ("fp8", 16384))]
    gate_up = ("8b-gate_up", *LINEAR["8b-gate_up"])
    cases += [linear_case(*gate_up, s, n) for s in ("int4_zero", "int4_w4a8") for n in (1, 4096)]
    cases += [linear_case(*gate_up, s, n) for s in ("fp8_w8a8", "fp8_block_w8a8") for n in (1, 64)]
    cases += [walking_case(*gate_up, s, 4096) for s in ("int8", "int8_w8a8", "fp8_w8a8", "fp8_block_w8a8")]
    return [*cases, *float32_cases(), *glue_cases(4096), *(rotate_case(16, name) for name in FEWER_BITS)]


def float32_cases() -> list[Case]:
    """What other dtypes are compared with: it need not be fast."""
    gate_up, dtype = ("8b-gate_up", *LINEAR["8b-gate_up"]), torch.float32
    cases = [linear_case(*gate_up, s, n, dtype) for s, n in (("int4", 1), ("int4_g64", 4096), ("int8", 64))]
    return [*cases, decode_case(8, 4096, 128, "float32"), chunk_case(4096, 128, "float32")]


def tiny_cases() -> list[Case]:
    """A case of each kind that an interpreter can run."""
    cases = [decode_case(2, 70, 32, "int8", heads=2, kv_heads=1), chunk_case(20, 32, "bf16", heads=2, kv_heads=1)]
    cases += [linear_case("tiny", 40, 128, scheme, 3) for scheme in ("int8", "int4", "int8_w8a8", "int4_zero")]
    cases += [walking_case("tiny", 40, 256, "fp8_block_w8a8", 130)]
    return [*cases, grouped_case(2, 40, 128, "bf16", 5), *glue_cases(64), rotate_case(3, "int8", 5, 1, 32)]


def decode_case(rows: int, length: int, size: int, cache: str, heads: int = 32, kv_heads: int = 8) -> Case:
    """One token of each row at the end of its context, whose pages lie scattered."""
    bytes_of_key = size * CACHES[cache].itemsize + (4 if CACHES[cache].itemsize == 1 else 0)
    make = attention(rows, rows, length, size, cache, (heads, kv_heads))
    num_bytes = 2 * rows * length * kv_heads * bytes_of_key
    group = "" if (heads, kv_heads) == (32, 8) else f" {heads}/{kv_heads} heads"
    name = f"attention decode {cache} head {size}{group} batch {rows} context {length}"
    return Case(name, make, num_bytes, 4 * rows * length * heads * size, "bf16")


def chunk_case(length: int, size: int, cache: str, heads: int = 32, kv_heads: int = 8) -> Case:
    """A prompt as a whole."""
    make = attention(length, 1, length, size, cache, (heads, kv_heads))
    num_bytes = 2 * length * size * 2 * (heads + kv_heads)
    return Case(
        f"attention prefill {cache} head {size} {length} tokens", make, num_bytes, 2 * length**2 * heads * size, "bf16"
    )


def attention(
    num_tokens: int, rows: int, length: int, size: int, cache: str, heads: tuple[int, int]
) -> Callable[[str], Callable[[], object]]:
    """A step of equal rows."""

    def make(device: str) -> Callable[[], object]:
        from torchinfer.kernels.cuda.paged_attention import paged_attention

        page_size, new = 16, num_tokens // rows
        pages = -(-length // page_size)
        shape = (2, rows * pages + 1, page_size, heads[1])
        scale = torch.full(shape, 0.01, device=device) if CACHES[cache].itemsize == 1 else None
        kv_cache = KVCache(torch.ones((*shape, size), dtype=CACHES[cache], device=device), scale)
        start = torch.arange(rows + 1, device=device, dtype=torch.int32) * new
        table = (torch.randperm(rows * pages, device=device) + 1).view(rows, pages).int()
        lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
        facts: Any = (rows, length, ()) if new == 1 else (0, 0, ((0, 0, num_tokens, length),))
        batch = Batch(*[start] * 6, lengths, table, page_size, *facts)
        query = torch.randn(num_tokens, heads[0], size, device=device)
        query = query if cache == "float32" else query.bfloat16()
        return lambda: paged_attention(query, kv_cache, batch, size**-0.5, None, None)

    return make


def linear_case(
    shape: str, outputs: int, inputs: int, scheme: str, rows: int, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """A quantized matrix."""

    def make(device: str) -> Callable[[], object]:
        from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul

        weight, x = prepared(scheme, (outputs, inputs), device), torch.ones(rows, inputs, device=device, dtype=dtype)
        return lambda: quantized_matmul(x, weight)

    num_bytes = HELD[scheme].num_bytes(outputs, inputs) + 2 * rows * (inputs + outputs)
    operations = 2 * rows * outputs * inputs
    of_dtype = "" if dtype == torch.bfloat16 else f" {str(dtype).removeprefix('torch.')}"
    return Case(
        f"linear{of_dtype} {scheme} {shape} {rows} rows", make, num_bytes, operations, PEAKS.get(scheme, "bf16")
    )


def walking_case(shape: str, outputs: int, inputs: int, scheme: str, rows: int) -> Case:
    """`linear_case` of many rows by programs that walk over tiles, without the rounding of rows."""
    plain = linear_case(shape, outputs, inputs, scheme, rows)

    def make(device: str) -> Callable[[], object]:
        from torchinfer.kernels.cuda.matmul import multiply_rows, tiles_for
        from torchinfer.kernels.cuda.matrix import as_matrix

        matrix = as_matrix(prepared(scheme, (outputs, inputs), device))
        x, scale = torch.ones(rows, inputs, device=device).bfloat16(), None
        if matrix.activations != "none":
            x, scale = x.to(matrix.rounded), torch.ones(matrix.row_scale_shape(rows), device=device)
        tiles = replace(tiles_for(x, matrix, {}), per_processor=1)
        return lambda: multiply_rows(x, scale, matrix, None, torch.bfloat16, tiles=tiles)

    return replace(plain, name=f"walking {plain.name}", make=make)


def grouped_case(experts: int, outputs: int, inputs: int, scheme: str, rows: int) -> Case:
    """Rows dealt out evenly: to as many experts as there are rows, or to all."""

    def make(device: str) -> Callable[[], object]:
        from torchinfer.kernels.cuda.grouped_matmul import grouped_matmul

        x = torch.ones(rows, inputs, device=device).bfloat16()
        sizes = torch.tensor([(rows + i) // experts for i in range(experts)], dtype=torch.int32, device=device)
        shape = (experts, outputs, inputs)
        plain = torch.empty(shape, dtype=torch.bfloat16, device=device) if scheme == "bf16" else None
        weight = prepared(scheme, shape, device) if plain is None else plain.fill_(0.01)
        return lambda: grouped_matmul(x, weight, sizes)

    bytes_of_expert = 2 * outputs * inputs if scheme == "bf16" else SCHEMES[scheme].num_bytes(outputs, inputs)
    num_bytes = min(rows, experts) * bytes_of_expert + 2 * rows * (inputs + outputs)
    name = f"grouped {scheme} {experts}x{outputs}x{inputs} {rows} rows"
    return Case(name, make, num_bytes, 2 * rows * outputs * inputs, PEAKS.get(scheme, "bf16"))


def quantized(scheme: str, shape: tuple[int, ...], device: str) -> QuantizedWeight:
    """Some numbers; which ones makes no difference to the time."""
    specs = HELD[scheme].tensors(*shape[-2:])
    tensors: dict[str, Tensor | None] = {
        name: torch.ones(shape[:-2] + spec.shape, device=device).to(spec.dtype) for name, spec in specs.items()
    }
    return HELD[scheme].weight(tensors, shape[-1], ())


def prepared(scheme: str, shape: tuple[int, ...], device: str) -> Any:
    """As a model has it when it is loaded."""
    from torchinfer.kernels.cuda.packed_weight import prepare

    weight = quantized(scheme, shape, device)
    return prepare(weight, may_overwrite=True) or weight


def rotate_case(rows: int, cache: str, heads: int = 32, kv_heads: int = 8, size: int = 128) -> Case:
    """Rotation and cache of one token of each row."""

    def make(device: str) -> Callable[[], object]:
        from torchinfer.kernels.cuda.rotate_and_write import rotate_and_write

        qkv = torch.ones(rows, heads + 2 * kv_heads, size, device=device).bfloat16()
        query_key, value = qkv.tensor_split((heads + kv_heads,), 1)
        angles = torch.ones(rows, size // 2, device=device)
        slot = torch.arange(rows, device=device, dtype=torch.int32)
        shape = (2, -(-rows // 16), 16, kv_heads)
        scale = torch.zeros(shape, device=device) if CACHES[cache].itemsize == 1 else None
        kv_cache = KVCache(torch.zeros((*shape, size), dtype=CACHES[cache], device=device), scale)
        return lambda: rotate_and_write(query_key, value, angles, angles, False, kv_cache, slot)

    bytes_of_key = size * CACHES[cache].itemsize + (4 if CACHES[cache].itemsize == 1 else 0)
    num_bytes = rows * (2 * size * (2 * heads + 2 * kv_heads) + 2 * kv_heads * bytes_of_key)
    return Case(f"glue rotate_and_write {cache} {rows} rows", make, num_bytes, 0, "bf16")


def glue_cases(size: int, rows: int = 16) -> Iterator[Case]:
    """What lies between the products of a layer with `size` numbers a token."""

    def make(name: str) -> Callable[[str], Callable[[], object]]:
        def make_on(device: str) -> Callable[[], object]:
            from torchinfer.kernels.cuda.gated_activation import gated_activation
            from torchinfer.kernels.cuda.linear_of_gated import linear_of_gated
            from torchinfer.kernels.cuda.linear_of_norm import linear_of_norm
            from torchinfer.kernels.cuda.rms_norm import rms_norm
            from torchinfer.kernels.cuda.rotary_embedding import rotary_embedding
            from torchinfer.kernels.cuda.sample import sample
            from torchinfer.kernels.cuda.write_kv_pages import write_kv_pages

            x, angles = torch.ones(rows, size, device=device).bfloat16(), torch.ones(rows, 8, device=device)
            heads, slot = x.view(rows, -1, 16), torch.arange(rows, device=device, dtype=torch.int32)
            shape = (2, 4, 16, heads.shape[1], 16)
            kv_cache = KVCache(
                torch.zeros(shape, dtype=torch.int8, device=device), torch.zeros(shape[:-1], device=device)
            )
            inner = 7 * size // 2  # as wide as Llama 3's
            wide = torch.ones(rows, 2 * inner, device=device).bfloat16()
            qkv, down = (quantized("int8_w8a8", (64, columns), device) for columns in (size, inner))
            qkv_block, down_block = (quantized("fp8_block_w8a8", (64, columns), device) for columns in (size, inner))
            reals = torch.full((rows,), 0.9, device=device)
            params = SamplingTensors(reals, torch.full_like(slot, 40), reals, reals / 9, reals)
            logits = torch.ones(rows, 32 * size, device=device)
            calls: dict[str, Callable[[], object]] = {
                "rms_norm": lambda: rms_norm(x, x[0], 1e-6, 0.0),
                "rotary_embedding": lambda: rotary_embedding(heads, angles, angles, False),
                "gated_activation": lambda: gated_activation(x, "silu"),
                "sample": lambda: sample(logits, params, True),
                "linear_of_norm": lambda: linear_of_norm(x, x[0], 1e-6, 0.0, qkv),
                "linear_of_gated": lambda: linear_of_gated(wide, "silu", down),
                "linear_of_norm in groups": lambda: linear_of_norm(x, x[0], 1e-6, 0.0, qkv_block),
                "linear_of_gated in groups": lambda: linear_of_gated(wide, "silu", down_block),
                "write_kv_pages": lambda: write_kv_pages(heads, heads, kv_cache, slot),
            }
            return calls[name]

        return make_on

    names = ("rms_norm", "rotary_embedding", "gated_activation", "write_kv_pages", "sample")
    fused = [f"{name}{rounded}" for name in ("linear_of_norm", "linear_of_gated") for rounded in ("", " in groups")]
    for name in (*names, *fused):
        yield Case(f"glue {name} {rows} x {size}", make(name), 4 * rows * size, 0, "bf16")
