"""A layer of experts on the CPU, as Mixtral 8x7B and Qwen3-30B-A3B have it, against what the machine allows.

    python benchmarks/cpu_experts.py                                   # all formats, decode and prefill
    python benchmarks/cpu_experts.py --models qwen3-30b-a3b --formats int8 --tokens 1,512

One layer of the model with all its experts, 0.3 to 2.8 GB; router and inputs are random, so that tokens choose experts
evenly. "products" are the library's three calls (gate and up, activation, down), "rest" is what `models.moe.MoE` takes
beside them: router, sorting by expert, weighted sum. Bytes are those of the experts that were chosen. Reading, products
of registers, products and the whole layer take turns. A fraction of reading is the median of those of each turn, since
other work on the machine slows all of them; of the peak the best turn counts. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cpu_linear import PLANES, PRODUCTS, fresh_memory
from torch import Tensor, nn

from torchinfer.kernels.cpu import library
from torchinfer.kernels.cpu.packed_weight import PackedWeight, prepare
from torchinfer.models.config import MoEConfig
from torchinfer.models.layers import prepare_matrices
from torchinfer.models.moe import MoE
from torchinfer.quantization import SCHEMES

HIDDEN = {"mixtral-8x7b": 4096, "qwen3-30b-a3b": 2048}
CONFIGS = {
    "mixtral-8x7b": MoEConfig(num_experts=8, top_k=2, intermediate_size=14336, is_normalized=True),
    "qwen3-30b-a3b": MoEConfig(num_experts=128, top_k=8, intermediate_size=768, is_normalized=True),
}
FORMATS = "bf16,int8,int8_w8a8,int4"
FEW_TOKENS, TURNS, FEW_TURNS = 64, 21, 5
READ_BYTES, PRODUCT_REPEATS = 128 << 20, 1 << 17


class Ceilings:
    """What the machine allows now."""

    def __init__(self, name: str, threads: int) -> None:
        self._kind, self._planes = PRODUCTS[name], PLANES.get(name, 1)
        self._library = library.loaded()
        self._memory = fresh_memory(READ_BYTES)
        count = self._library.torchinfer_cpu_measure_products(self._kind, 1) * threads
        self._operations = 2 * count * PRODUCT_REPEATS

    def read(self) -> float:
        """Bytes a second, by the better of two patterns."""
        arguments = (self._memory.data_ptr(), READ_BYTES)
        calls = [partial(self._library.torchinfer_cpu_measure_read, *arguments, streams, 0) for streams in (1, 4)]
        return READ_BYTES / min(map(seconds_of, calls))

    def products(self) -> float:
        """Operations a second, of as many passes as the format's inputs have planes."""
        call = partial(self._library.torchinfer_cpu_measure_products, self._kind, PRODUCT_REPEATS)
        return self._operations / seconds_of(call) / self._planes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,512")
    parser.add_argument("--threads", type=int, default=0, help="0: the CPUs of this process")
    args = parser.parse_args()
    library.configure(args.threads)
    threads = library.loaded().torchinfer_cpu_num_threads()
    torch.set_num_threads(1)  # as in a step of the engine
    level = library.loaded().torchinfer_cpu_level().decode()
    print(f"{level}, {threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    results = []
    for model in args.models.split(","):
        for name in args.formats.split(","):
            (layer, expert_bytes), ceilings = make_layer(model, name), Ceilings(name, threads)
            print(f"{model} {name}: experts of {expert_bytes / 1e6:.1f} MB", flush=True)
            for num_tokens in map(int, args.tokens.split(",")):
                found = measure(layer, HIDDEN[model], num_tokens, expert_bytes, ceilings)
                results.append({"model": model, "format": name, "tokens": num_tokens, **found})
                print("  " + ", ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    print(json.dumps({"level": level, "threads": threads, "results": results}))


def make_layer(model: str, name: str) -> tuple[MoE, int]:
    """The layer, and the bytes of one expert."""
    config, hidden = CONFIGS[model], HIDDEN[model]
    with torch.device("meta"):
        layer = MoE(hidden, config, "silu")
    router = torch.randn(config.num_experts, hidden) / hidden**0.5
    layer.router.weight = nn.Parameter(router.bfloat16(), requires_grad=False)
    prepare_matrices(layer.router, None)
    shapes = {"gate_up": (2 * config.intermediate_size, hidden), "down": (hidden, config.intermediate_size)}
    num_bytes = 0
    for matrix, shape in shapes.items():
        packed = make_experts(shape, config.num_experts, name)
        num_bytes += packed.num_bytes // config.num_experts
        delattr(layer.experts, matrix)
        setattr(layer.experts, matrix, packed)
    return layer, num_bytes


def make_experts(shape: tuple[int, int], num_experts: int, name: str) -> PackedWeight:
    """The same matrix for each expert, in memory of its own and in large pages, as the loader gives them to layers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    if name == "bf16":
        packed = prepare(repeated(weight.bfloat16(), num_experts), may_overwrite=True)
    else:
        one = SCHEMES[name].weight(dict(SCHEMES[name].pack(weight)), shape[1], ())
        scale = one.scale.repeat(num_experts, 1, 1)
        packed = prepare(replace(one, values=repeated(one.values, num_experts), scale=scale), may_overwrite=True)
    assert packed is not None
    return packed


def repeated(matrix: Tensor, count: int) -> Tensor:
    memory = fresh_memory(count * matrix.nbytes)[: count * matrix.nbytes].view(matrix.dtype)
    return memory.view(count, *matrix.shape).copy_(matrix.expand(count, *matrix.shape))


@torch.inference_mode()
def measure(layer: MoE, hidden: int, num_tokens: int, expert_bytes: int, ceilings: Ceilings) -> dict[str, float]:
    """Medians over turns, each with other tokens."""
    config, is_live = layer.config, torch.ones(num_tokens, dtype=torch.bool)
    operations = 2 * num_tokens * config.top_k * 3 * hidden * config.intermediate_size
    turns = []
    for turn in range(-1, TURNS if num_tokens <= FEW_TOKENS else FEW_TURNS):
        x = torch.randn(num_tokens, hidden).bfloat16()
        experts = layer.router(x).topk(config.top_k).indices.flatten()
        sizes = torch.bincount(experts, minlength=config.num_experts).int()
        rows, num_bytes = x[experts.argsort(stable=True) // config.top_k], int((sizes > 0).sum()) * expert_bytes
        read, peak = ceilings.read(), ceilings.products()
        products = seconds_of(partial(layer.experts, rows, sizes))
        ceilings.read()  # so that the layer does not find these experts in a cache
        rest = seconds_of(partial(layer, x, is_live)) - products
        if turn >= 0:  # the first warms up
            turns.append((products, rest, num_bytes, num_bytes / products / read, read, peak))
    of_peak = operations / min(turn[0] for turn in turns) / max(turn[-1] for turn in turns)
    products, rest, num_bytes, of_read, read, _ = map(statistics.median, zip(*turns, strict=True))
    return {
        "products_ms": round(products * 1e3, 3),
        "rest_ms": round(rest * 1e3, 3),
        "megabytes": round(num_bytes / 1e6, 1),
        "of_read": round(of_read, 2),
        "of_peak": round(of_peak, 2),
        "read_gb_s": round(read / 1e9, 1),
    }


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
