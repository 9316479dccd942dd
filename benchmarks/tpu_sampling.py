"""Choosing tokens on TPU by the TPU's compiler, without a TPU: the kernel's bundles against the compiler's estimate for
the reference formulation, which sorts.

A bundle takes a cycle or more. Counted are all passes, with top-k and top-p for some of every eight rows. XLA's
estimate leaves sorting out, for which it has none, so that it is a lower bound, too; its estimates for v5p are for both
cores, and left out. Cores share the rows, eight at a time. The ceiling is reading the logits.

python benchmarks/tpu_sampling.py [--chips v5e v5p] [--rows 64] [--vocabulary 128256]
"""

from __future__ import annotations

import argparse
import json
import os
import re

from torchinfer import aot

TOPOLOGIES = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1"}


def ours(rows: int, size: int, chip: str) -> float:
    """Milliseconds of the kernel, if every bundle takes a cycle."""
    import jax

    from torchinfer.kernels.tpu.page_layout import SUBLANES
    from torchinfer.kernels.tpu.sample_kernel import CHUNK, CHUNKS_AT_ONCE, sample_tokens

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((rows, size), (rows, 5))]
    compiled = aot.compile_jax(sample_tokens, shapes, TOPOLOGIES[chip], dump_bundles=True)
    kernel = max(compiled.kernels.values(), key=lambda kernel: kernel.num_bundles)
    # As many rows as a step of the grid takes, or fewer: there is no loop over its steps.
    grid = kernel.grid_loop if rows > SUBLANES else None
    num_bundles = kernel.num_bundles if grid is None else grid.num_bundles
    rounds = size / (CHUNK * CHUNKS_AT_ONCE)
    parts = kernel.inside(grid)
    bundles = num_bundles - sum(part.num_bundles for part in parts)
    halvings = iter((32, 32, (size - 1).bit_length()))  # of numbers for top-k and top-p, of ids
    for part in parts:
        passes = kernel.inside(part)
        if not passes:
            bundles += rounds * part.num_bundles
            continue
        inner = sum(each.num_bundles for each in passes)
        bundles += next(halvings) * (part.num_bundles - inner + rounds * inner)
    steps = -(-rows // (SUBLANES * aot.CHIPS[chip].num_cores))
    return steps * bundles / aot.CHIPS[chip].clock_hz * 1e3


def by_xla(rows: int, size: int) -> float:
    """Milliseconds by the compiler's estimate, on v5e."""
    import torch
    import torch_xla.core.xla_builder as xla_builder
    import torch_xla.core.xla_model as xla_model

    from torchinfer.batch import SamplingTensors
    from torchinfer.kernels.reference.sample import sample

    def placeholder(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        tensor: torch.Tensor = xla_builder.create_placeholder_tensor(shape, dtype)
        return tensor

    params = [placeholder(rows, dtype=torch.int32 if at == 1 else torch.float32) for at in range(5)]
    ids = sample(placeholder(rows, size), SamplingTensors(*params), any_filter=True)
    compiled = aot.compile_hlo(xla_model.get_stablehlo([ids]), TOPOLOGIES["v5e"])
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', compiled.hlo))) / aot.CHIPS["v5e"].clock_hz * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=128256)
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "PJRT_DEVICE": "CPU"}
    results = []
    for chip in args.chips:
        ceiling = 4 * args.rows * args.vocabulary / aot.CHIPS[chip].hbm_bytes_per_second * 1e3
        print(f"{chip}: reading the logits once: {ceiling:.3f} ms")
        line = {"chip": chip, "rows": args.rows, "vocabulary": args.vocabulary, "ceiling_ms": ceiling}
        line["kernel_ms"] = ours(args.rows, args.vocabulary, chip)
        print(f"{chip}: kernel: {line['kernel_ms']:.3f} ms", flush=True)
        if chip == "v5e":
            line["xla_ms"] = by_xla(args.rows, args.vocabulary)
            print(f"{chip}: XLA without its sort: {line['xla_ms']:.3f} ms", flush=True)
        results.append(line)
    print(json.dumps({"benchmark": "tpu_sampling", "results": results}))


if __name__ == "__main__":
    main()
