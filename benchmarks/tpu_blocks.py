"""Sizes of blocks that the TPU's kernels take for the shapes of tpu_kernels.py and tpu_matmuls.py, by the rules of
their `make_config`. Compiles nothing.

python benchmarks/tpu_blocks.py
"""

from __future__ import annotations

import json
import os

import tpu_kernels
import tpu_matmuls

from torchinfer import aot

ROWS = 16  # of a product, or for each expert


def attention(name: str, dtype: str, chip: str) -> dict[str, object]:
    """Of the attention kernel over a cache of a dtype."""
    from torchinfer.kernels.tpu.page_layout import PageLayout
    from torchinfer.kernels.tpu.ragged_attention import make_config, scratch_bytes

    heads, kv_heads, size = tpu_kernels.SHAPES[name]
    layout = PageLayout(kv_heads, size, dtype)
    config = make_config(layout, heads, num_cores=aot.CHIPS[chip].num_cores)
    return {
        "page KiB": layout.page_bytes // 1024,
        "pages fetched at once": config.fetch_pages,
        "computed at once": config.decode_chunk,
        "in a prefill": config.prefill_chunk,
        "tokens of a query block": config.prefill_tokens,
        "at once": config.tile_tokens,
        "scratch MiB": round(scratch_bytes(config) / 2**20, 1),
    }


def product(name: str, numbers: str, chip: str) -> dict[str, object]:
    """Of the matmul kernel."""
    from torchinfer.kernels.tpu.matmul_plan import make_config

    experts, inputs, outputs, is_gated = tpu_matmuls.SHAPES[name]
    format_name, group, planes = tpu_matmuls.FORMATS[numbers]
    shape, groups = (experts, inputs, outputs), inputs // group if group else 1
    activation, num_cores = "silu" if is_gated else None, aot.CHIPS[chip].num_cores
    config = make_config(format_name, shape, groups, ROWS * experts, planes, activation, num_cores=num_cores)
    halves = 2 if is_gated and not config.is_whole else 1
    return {
        "outputs of a block": config.block_outputs * halves,
        "its MiB": round(4 * config.num_words * config.block_outputs * halves / 2**20, 2),
        "blocks": config.num_blocks,
        "cores": config.used_cores,
        "rows of a tile": config.tile_rows,
    }


def show(rows: list[dict[str, object]]) -> None:
    """As a table of Markdown."""
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
    print()


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    shapes = [
        {"heads of": name, "cache": dtype, "chip": chip, **attention(name, dtype, chip)}
        for name in tpu_kernels.SHAPES
        for dtype in tpu_kernels.DTYPES
        for chip in tpu_kernels.TOPOLOGIES
    ]
    products = [
        {"matrix": name, "numbers": numbers, "chip": chip, **product(name, numbers, chip)}
        for name in tpu_matmuls.SHAPES
        for numbers in ("int8", "int4", "bfloat16")
        if tpu_matmuls.SHAPES[name][1] % (tpu_matmuls.FORMATS[numbers][1] or 1) == 0
        for chip in tpu_matmuls.TOPOLOGIES
    ]
    show(shapes)
    show(products)
    print(json.dumps({"benchmark": "tpu_blocks", "attention": shapes, "products": products}))


if __name__ == "__main__":
    main()
