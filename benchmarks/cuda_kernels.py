"""Kernels for CUDA, in Triton: how near they come to the card's memory and products; or what the compiler says of them.

python benchmarks/cuda_kernels.py                              # on a GPU: ceilings, then every case
python benchmarks/cuda_kernels.py --cases attention,int8       # those whose names have one of these
python benchmarks/cuda_kernels.py --compile 9.0                # no GPU: registers, shared memory, instructions
python benchmarks/cuda_kernels.py --tiny                       # no GPU: shapes of a few numbers, in the interpreter

Ceilings are measured in the same run: copying memory, and torch's products of 8192 x 8192 matrices. A case is captured
in a CUDA graph over copies of its tensors that the second cache does not hold, so that its time is the device's.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchinfer.batch import Batch, KVCache, SamplingTensors
from torchinfer.quantization import SCHEMES
from torchinfer.quantized_weight import QuantizedWeight

CACHES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
LINEAR = {  # outputs, inputs
    "8b-qkv": (6144, 4096),
    "8b-output": (4096, 4096),
    "8b-gate_up": (28672, 4096),
    "8b-down": (4096, 14336),
    "70b/8-gate_up": (7168, 8192),
    "70b/8-down": (8192, 3584),
}
EXPERTS = (8, 28672, 4096)  # of Mixtral 8x7B, gate and up
PEAKS = {"int8_w8a8": "int8", "fp8_w8a8": "fp8"}  # whose products are compared with which ceiling; bf16 otherwise
COLD_BYTES = 512 << 20  # of copies, so that nothing is in the second cache
REPEATS = 7


@dataclass(frozen=True)
class Case:
    """A call: `make` gives it, with tensors of its own on a device."""

    name: str
    make: Callable[[str], Callable[[], object]]
    num_bytes: int
    num_operations: int  # a multiply-add is two
    peak: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="parts of names, comma between them; all if empty")
    parser.add_argument("--compile", metavar="CAPABILITY", help="8.0, 8.9 or 9.0: compile only")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if options.compile:
        os.environ.pop("TRITON_INTERPRET", None)
    cases = static_cases() if options.compile else tiny_cases() if options.tiny else full_cases()
    wanted = [case for case in cases if any(part in case.name for part in options.cases.split(","))]
    if options.compile:
        results = compile_cases(wanted, options.compile)
    else:
        results = run_tiny(wanted) if options.tiny else measure(wanted)
    print(json.dumps({"device": device_name(options), "torch": torch.__version__, "results": results}))


def device_name(options: argparse.Namespace) -> str:
    """What the results are of."""
    if options.compile:
        return f"compiled for {options.compile}"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"


def full_cases() -> list[Case]:
    """The figures of docs/benchmarks.md."""
    lengths = (4096, 32768, 131072)
    cases = [decode_case(rows, length, 128, name) for length in lengths for rows in (1, 16, 64) for name in CACHES]
    cases += [chunk_case(length, 128, name) for length in (2048, 8192) for name in CACHES]
    for shape in LINEAR:
        cases += [linear_case(shape, *LINEAR[shape], s, n) for s in ("int8", "fp8", "int4") for n in (1, 16, 64)]
        cases += [linear_case(shape, *LINEAR[shape], s, n) for s in ("int8_w8a8", "fp8_w8a8") for n in (16, 2048, 8192)]
    cases += [grouped_case(*EXPERTS, s, n) for s in ("bf16", "int8", "fp8", "int4") for n in (2, 8, 32, 16384)]
    return cases


def static_cases() -> list[Case]:
    """One for each way in which a kernel is compiled."""
    cases = [decode_case(8, 4096, size, name) for size, name in ((64, "bf16"), (256, "int8"))]
    cases += [decode_case(8, 4096, 128, name) for name in CACHES]
    cases += [chunk_case(4096, size, name) for size, name in ((128, "bf16"), (128, "int8"), (256, "fp8"))]
    few, many = ("int8", "fp8", "int4", "fp8_block"), ("int8", "int4", "int8_w8a8", "fp8_w8a8")
    cases += [linear_case("8b-gate_up", *LINEAR["8b-gate_up"], s, n) for s in few for n in (1, 64)]
    cases += [linear_case("8b-gate_up", *LINEAR["8b-gate_up"], s, 4096) for s in many]
    cases += [linear_case("8b-output", *LINEAR["8b-output"], s, 64) for s in ("int8", "fp8_block", "int8_w8a8")]
    cases += [grouped_case(*EXPERTS, s, n) for s, n in (("bf16", 16), ("int4", 16), ("bf16", 16384), ("fp8", 16384))]
    return cases + [*glue_cases(4096)]


def tiny_cases() -> list[Case]:
    """A case of each kind that an interpreter can run."""
    cases = [decode_case(2, 70, 32, "int8", heads=2, kv_heads=1), chunk_case(20, 32, "bf16", heads=2, kv_heads=1)]
    cases += [linear_case("tiny", 40, 128, scheme, 3) for scheme in ("int8", "int4", "int8_w8a8")]
    return [*cases, grouped_case(2, 40, 128, "bf16", 5), *glue_cases(64)]


def decode_case(rows: int, length: int, size: int, cache: str, heads: int = 32, kv_heads: int = 8) -> Case:
    """One token of each row at the end of its context, whose pages lie scattered."""
    bytes_of_key = size * CACHES[cache].itemsize + (0 if cache == "bf16" else 4)
    make = attention(rows, rows, length, size, cache, (heads, kv_heads))
    num_bytes = 2 * rows * length * kv_heads * bytes_of_key
    name = f"attention decode {cache} head {size} batch {rows} context {length}"
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
        scale = None if cache == "bf16" else torch.full(shape, 0.01, device=device)
        kv_cache = KVCache(torch.ones((*shape, size), dtype=CACHES[cache], device=device), scale)
        start = torch.arange(rows + 1, device=device, dtype=torch.int32) * new
        table = (torch.randperm(rows * pages, device=device) + 1).view(rows, pages).int()
        lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
        facts: Any = (rows, length, ()) if new == 1 else (0, 0, ((0, 0, num_tokens, length),))
        batch = Batch(*[start] * 6, lengths, table, page_size, *facts)
        query = torch.randn(num_tokens, heads[0], size, device=device).bfloat16()
        return lambda: paged_attention(query, kv_cache, batch, size**-0.5, None, None)

    return make


def linear_case(shape: str, outputs: int, inputs: int, scheme: str, rows: int) -> Case:
    """A quantized matrix."""

    def make(device: str) -> Callable[[], object]:
        from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul

        weight, x = prepared(scheme, (outputs, inputs), device), torch.ones(rows, inputs, device=device).bfloat16()
        return lambda: quantized_matmul(x, weight)

    num_bytes = SCHEMES[scheme].num_bytes(outputs, inputs) + 2 * rows * (inputs + outputs)
    operations = 2 * rows * outputs * inputs
    return Case(f"linear {scheme} {shape} {rows} rows", make, num_bytes, operations, PEAKS.get(scheme, "bf16"))


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
    specs = SCHEMES[scheme].tensors(*shape[-2:])
    tensors: dict[str, Tensor | None] = {
        name: torch.ones(shape[:-2] + spec.shape, device=device).to(spec.dtype) for name, spec in specs.items()
    }
    return SCHEMES[scheme].weight(tensors, shape[-1], ())


def prepared(scheme: str, shape: tuple[int, ...], device: str) -> Any:
    """As a model has it when it is loaded."""
    from torchinfer.kernels.cuda.packed_weight import prepare

    weight = quantized(scheme, shape, device)
    return prepare(weight, may_overwrite=True) or weight


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
            reals = torch.full((rows,), 0.9, device=device)
            params = SamplingTensors(reals, torch.full_like(slot, 40), reals, reals / 9, reals)
            calls: dict[str, Callable[[], object]] = {
                "rms_norm": lambda: rms_norm(x, x[0], 1e-6, 0.0),
                "rotary_embedding": lambda: rotary_embedding(heads, angles, angles, False),
                "gated_activation": lambda: gated_activation(x, "silu"),
                "sample": lambda: sample(x.float(), params, True),
                "linear_of_norm": lambda: linear_of_norm(x, x[0], 1e-6, 0.0, qkv),
                "linear_of_gated": lambda: linear_of_gated(wide, "silu", down),
                "write_kv_pages": lambda: write_kv_pages(heads, heads, kv_cache, slot),
            }
            return calls[name]

        return make_on

    names = ("rms_norm", "rotary_embedding", "gated_activation", "write_kv_pages", "sample")
    for name in (*names, "linear_of_norm", "linear_of_gated"):
        yield Case(f"glue {name} {rows} x {size}", make(name), 4 * rows * size, 0, "bf16")


def compile_cases(cases: list[Case], capability: str) -> list[dict[str, Any]]:
    """What Triton's compiler and ptxas make of each case, on tensors without memory."""
    from torchinfer.kernels.cuda.offline import compiling

    major, minor = map(int, capability.split("."))
    results: list[dict[str, Any]] = []
    with compiling((major, minor)) as compiled:
        for case in cases:
            known = len(compiled)
            case.make("meta")()
            for kernel in compiled[known:]:
                results.append({"case": case.name, **asdict(kernel)})
                needs = f"{kernel.registers} registers, {kernel.stack_bytes} B stack, {kernel.shared_bytes} B shared"
                print(f"{case.name:48s} {kernel.name:23s} {needs}, {kernel.loop_instructions} in the longest loop")
    return results


def run_tiny(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case once: that the calls are right, not how long they take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        from torchinfer.kernels.cuda.interpreter import repair

        repair()
    for case in cases:
        case.make(device)()
        print(f"{case.name}: runs")
    return [{"case": case.name} for case in cases]


def measure(cases: list[Case]) -> list[dict[str, Any]]:
    """Seconds of each case, and what part of the ceilings they are."""
    ceilings = measure_ceilings()
    print(", ".join(f"{name}: {value / 1e12:.2f} T/s" for name, value in ceilings.items()))
    results = []
    for case in cases:
        copies = [case.make("cuda") for _ in range(min(8, max(1, COLD_BYTES // case.num_bytes)))]
        seconds = seconds_of(copies)
        del copies
        torch.cuda.empty_cache()
        share = {
            "of_bandwidth": case.num_bytes / seconds / ceilings["bandwidth"],
            "of_products": case.num_operations / seconds / ceilings[case.peak],
        }
        shares = ", ".join(f"{name} {value:.2f}" for name, value in share.items())
        print(f"{case.name:60s} {seconds * 1e6:9.1f} us, {shares}")
        results.append({"case": case.name, "seconds": seconds, **share})
    return [{"case": "ceilings", **ceilings}, *results]


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and write, and operations a second of torch's products."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    e4m3, one, integers = (a.to(torch.float8_e4m3fn), torch.ones((), device="cuda"), a.to(torch.int8))
    products: dict[str, Callable[[], object]] = {
        "bf16": lambda: a @ b,
        "int8": lambda: torch._int_mm(integers, integers.T),
        "fp8": lambda: torch._scaled_mm(e4m3, e4m3.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16),
    }
    found = {"bandwidth": 2 * source.numel() / seconds_of([lambda: target.copy_(source)])}
    return found | {name: 2 * 8192**3 / seconds_of([call]) for name, call in products.items()}


def seconds_of(calls: list[Callable[[], object]]) -> float:
    """Seconds of a call on the device, median of several replays of a graph that holds all of them."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(REPEATS + 1):  # the first warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
