"""Find the fastest launches of products on this card, and put them into the table that ships with the package.

python benchmarks/cuda_tune.py                                            # the matrices of docs/benchmarks.md
python benchmarks/cuda_tune.py --matrices 4096x4096 --schemes int4,int8   # outputs x inputs
python benchmarks/cuda_tune.py --tiny --out table.json                    # no GPU: that it runs, in the interpreter

Each matrix is written as soon as it is measured: what went before is kept. About 70 launches are compiled for a scheme,
which takes longest; matrices of one scheme share them. Times are those of graphs over copies that the second cache does
not hold, as in `cuda_kernels.py`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cuda_cases import LINEAR, prepared, quantized
from cuda_kernels import COLD_BYTES, seconds_of
from torch import Tensor

MANY = 2048  # rows that tiles of 128 are measured with
SCHEMES = "int8,fp8,int4,int8_w8a8,fp8_w8a8,fp8_block_w8a8,int4_w4a8"
TINY = (40, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", default=",".join(f"{o}x{i}" for o, i in LINEAR.values()))
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--out", type=Path, help="the table; by default that of the package")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("there is no GPU to measure; --tiny shows that the search runs")
    from torchinfer.kernels.cuda.tuned_table import TABLE

    shapes = [TINY] if options.tiny else [tuple(map(int, shape.split("x"))) for shape in options.matrices.split(",")]
    for scheme in options.schemes.split(","):
        for outputs, inputs in shapes:
            tune(scheme, outputs, inputs, "cpu" if options.tiny else "cuda", options.out or TABLE)
    print(json.dumps({"table": str(options.out or TABLE), "schemes": options.schemes, "matrices": shapes}))


def tune(scheme: str, outputs: int, inputs: int, device: str, path: Path) -> None:
    """Search, and write what was found."""
    from torchinfer.kernels.cuda.matmul import device_name, product_of
    from torchinfer.kernels.cuda.matrix import as_matrix
    from torchinfer.kernels.cuda.tiles import num_processors
    from torchinfer.kernels.cuda.tuned_table import save_entry
    from torchinfer.kernels.cuda.tuning import search

    if device == "cpu":
        from torchinfer.kernels.cuda.interpreter import repair

        repair()
    start = time.perf_counter()
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors_of(scheme, outputs, inputs, "meta"))
    num_copies = min(8, max(1, COLD_BYTES // num_bytes)) if device == "cuda" else 1
    matrices = [as_matrix(prepared(scheme, (outputs, inputs), device)) for _ in range(num_copies)]
    x, _ = rows_of(matrices[0], 1)
    product = product_of(x, matrices[0])
    tuned = search(product, num_processors(x.device), timer(matrices), library_timer(matrices))
    key = device_name(x.device), product.format, outputs, inputs, 1
    save_entry(path, key, tuned)
    print(f"{scheme} {outputs}x{inputs}: {tuned}, {time.perf_counter() - start:.0f} s", flush=True)


def tensors_of(scheme: str, outputs: int, inputs: int, device: str) -> list[Tensor]:
    """What a matrix holds."""
    weight = quantized(scheme, (outputs, inputs), device)
    return [weight.values, weight.scale]


def rows_of(matrix: object, num_rows: int) -> tuple[Tensor, Tensor | None]:
    """Rows as the matrix is multiplied with, and their scales where they are rounded."""
    from torchinfer.kernels.cuda.matrix import Matrix

    assert isinstance(matrix, Matrix)
    device = matrix.values.device
    x = torch.ones(num_rows, matrix.num_inputs, device=device)
    if matrix.activations == "none":
        return x.bfloat16(), None
    return x.to(matrix.rounded), torch.ones(matrix.row_scale_shape(num_rows), device=device)


def timer(matrices: list) -> Callable[..., float | None]:
    """Seconds of a launch over all copies in turn."""
    from triton.errors import TritonError

    from torchinfer.kernels.cuda.matmul import multiply_rows

    is_card = matrices[0].values.is_cuda
    rows = {}

    def seconds(num_rows: int, tiles: object) -> float | None:
        if num_rows not in rows:
            rows[num_rows] = rows_of(matrices[0], MANY if num_rows == 128 and is_card else num_rows)
        x, row_scale = rows[num_rows]
        calls = [
            lambda matrix=matrix: multiply_rows(x, row_scale, matrix, None, torch.bfloat16, tiles=tiles)
            for matrix in matrices
        ]
        try:
            return seconds_of(calls) if is_card else interpreted(calls[0])
        except TritonError as error:  # too large for the card, or for its compiler
            print(f"passed over for {num_rows} rows: {tiles}: {str(error).splitlines()[-1:]}", flush=True)
            return None

    return seconds


def library_timer(matrices: list) -> Callable[[int], float | None]:
    """Seconds of torch's own product over all copies in turn; None where it has none."""
    from torchinfer.kernels.cuda.library_matmul import has_library, library_matmul

    def seconds(num_rows: int) -> float | None:
        if not matrices[0].values.is_cuda or not has_library(matrices[0], torch.bfloat16):
            return None
        x, row_scale = rows_of(matrices[0], num_rows)
        return seconds_of([lambda matrix=matrix: library_matmul(x, row_scale, matrix) for matrix in matrices])

    return seconds


def interpreted(call: Callable[[], object]) -> float:
    """Seconds of a call that runs on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
