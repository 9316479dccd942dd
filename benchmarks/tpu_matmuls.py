"""Products with quantized matrices by the TPU's compiler, without a TPU: VLIW bundles of a matrix's block against the
cycles in which the memory delivers it, and against what XLA itself makes of the same product.

A bundle takes a cycle or more, so that bundles are a lower bound; below the memory's cycles a kernel can be bound by
the memory. Counted is everything in the loop over blocks, branches that are not taken included. `matrix_unit` is what
the matrix unit needs at its peak: with many rows it is the limit. XLA's cycles are the compiler's estimate for the
reference formulation, all operations added up. `moved` is what a call moves between memory and chip, of the bytes of
the matrices that have rows.

python benchmarks/tpu_matmuls.py [--chips v5e v5p] [--shapes dense mixtral-gate-up ...] [--formats int8 ...]
    [--rows 16 32 64 ...] [--no-xla]
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from torchinfer import aot
from torchinfer.hbm_traffic import hbm_bytes

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
SHAPES = {  # experts, inputs, outputs, whether there is an activation; of experts, on one chip of 4
    "dense": (1, 4096, 4096, False),
    "mixtral-gate-up": (8, 4096, 7168, True),
    "mixtral-down": (8, 3584, 4096, False),
    "qwen3-30b-gate-up": (128, 2048, 384, True),
    "qwen3-30b-down": (128, 192, 2048, False),
}
FORMATS = {  # numbers, inputs that share a scale (0: all), planes of inputs
    "int8": ("int8", 0, 2),
    "int8_w8a8": ("int8", 0, 1),
    "int4": ("int4", 128, 2),
    "int4_g64": ("int4", 64, 2),
    "int4_g32": ("int4", 32, 2),
    "int4_w4a8": ("int4", 128, 1),
    "fp8": ("float8_e4m3fn", 0, 1),
    "bfloat16": ("bfloat16", 0, 1),
}
MATRIX_FLOPS = 2 * 4 * 128 * 128  # of a core in a cycle in bfloat16, v5e and v5p; twice that in int8


@dataclass(frozen=True)
class Block:
    """A block of a matrix, or blocks of gate and up, with its scales; and what a call moves."""

    num_bytes: int
    num_bundles: int
    matrix_unit: float  # cycles
    moved: float


def ours(shape: str, name: str, rows: int, chip: str) -> Block:
    """Compile the kernel for rows, or rows for each expert, and count."""
    import jax

    from torchinfer.kernels.tpu.matmul_plan import make_config
    from torchinfer.kernels.tpu.streamed_matmul import streamed_matmul

    experts, inputs, outputs, is_gated = SHAPES[shape]
    numbers, group, planes = FORMATS[name]
    groups, activation = inputs // group if group else 1, "silu" if is_gated else None
    config = make_config(
        numbers,
        (experts, inputs, outputs),
        groups,
        rows * experts,
        planes,
        activation,
        result_dtype="bfloat16",
        num_cores=aot.CHIPS[chip].num_cores,
    )
    of = jax.ShapeDtypeStruct
    arguments = [of((rows * experts, inputs), "int8" if (planes, config.is_integer) == (1, True) else "bfloat16")]
    arguments += [of((experts, config.num_words, outputs), "int32"), of((experts, groups, outputs), "float32")]
    arguments += [of((experts,), "int32")] if experts > 1 else []
    arguments += [of((rows,), "float32")] if name == "int8_w8a8" and experts == 1 else []

    def product(x, words, scale, *rest):  # type: ignore[no-untyped-def]
        sizes, unit = (rest[0], None) if experts > 1 else (None, *rest, None)[:2]
        return streamed_matmul(x, words, scale, sizes, unit, config=config)

    compiled = aot.compile_jax(product, arguments, TOPOLOGIES[chip], dump_bundles=True)
    # Kernels have the name of the function, all else that of an operation.
    kernels = [kernel for key, kernel in compiled.kernels.items() if key.startswith("product")]
    width = config.block_outputs * (2 if is_gated and not config.is_whole else 1)
    flops = 2 * config.tile_rows * planes * inputs * width / (2 if config.is_integer else 1)
    matrices = min(experts, rows * experts) * 4 * (config.num_words + groups) * outputs
    return Block(
        4 * (config.num_words + groups) * width,
        max(kernel.run(2, 1) - kernel.run(1, 1) for kernel in kernels),  # rows are split beside the first block only
        flops / MATRIX_FLOPS,
        hbm_bytes(compiled.hlo) / matrices,
    )


def by_xla(name: str, rows: int, chip: str) -> int:
    """The compiler's cycles for the dense product as plain operations, matrices [O, I] as a checkpoint has them."""
    import jax
    import jax.numpy as jnp

    _, inputs, outputs, _ = SHAPES["dense"]
    numbers, group, _ = FORMATS[name]
    of = jax.ShapeDtypeStruct
    stored = of((outputs, inputs // 2), "uint8") if numbers == "int4" else of((outputs, inputs), numbers)
    scale = of((outputs, inputs // group if group else 1), "float32")

    def product(x: Any, values: Any, scale: Any) -> Any:
        if name.startswith("int4"):
            nibbles = jnp.stack((values & 15, values >> 4), -1).reshape(outputs, inputs).astype(jnp.float32) - 8
            values, scale = nibbles * jnp.repeat(scale, group, 1), jnp.ones((outputs, 1))
        kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        dot = jax.lax.dot_general(x, values.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=kind)
        return (dot.astype(jnp.float32) * scale[:, 0]).astype(jnp.bfloat16)

    x = of((rows, inputs), "int8" if name == "int8_w8a8" else "bfloat16")
    compiled = aot.compile_jax(product, (x, stored, scale), TOPOLOGIES[chip])
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.hlo)))


def measure(shape: str, name: str, rows: int, chip: str, has_xla: bool) -> dict[str, Any]:
    """A line of the table."""
    block = ours(shape, name, rows, chip)
    cycles = aot.CHIPS[chip].hbm_cycles(block.num_bytes)
    line: dict[str, Any] = {"chip": chip, "shape": shape, "format": name, "rows": rows}
    line |= {"block_bytes": block.num_bytes, "hbm_cycles": round(cycles), "bundles": block.num_bundles}
    line |= {"of_hbm": round(block.num_bundles / cycles, 3), "matrix_unit_of_hbm": round(block.matrix_unit / cycles, 3)}
    line["moved"] = round(block.moved, 3)
    if has_xla and shape == "dense" and chip == "v5e":  # its estimates for v5p are for both cores
        _, inputs, outputs, _ = SHAPES[shape]
        share = block.num_bytes / cycles  # bytes a cycle
        total = inputs * outputs * (0.5 if name.startswith("int4") else 2 if name == "bfloat16" else 1)
        line["xla_of_hbm"] = round(by_xla(name, rows, chip) / (total / share), 3)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", nargs="+", type=int, help="default: 16, 32, 64, 1024; of experts 1, 8, 64 for each")
    parser.add_argument("--no-xla", action="store_true")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = []
    for chip in args.chips:
        for shape in args.shapes:
            for name in args.formats:
                for rows in args.rows or ((16, 32, 64, 1024) if shape == "dense" else (1, 8, 64)):
                    if (shape == "dense" and name == "bfloat16") or (
                        FORMATS[name][1] and SHAPES[shape][1] % FORMATS[name][1]
                    ):
                        continue  # XLA's own; no whole groups
                    line = measure(shape, name, rows, chip, not args.no_xla)
                    print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
                    results.append(line)
    print(json.dumps({"benchmark": "tpu_matmuls", "results": results}))


if __name__ == "__main__":
    main()
