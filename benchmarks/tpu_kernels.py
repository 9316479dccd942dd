"""TPU kernels by the TPU's compiler, without a TPU: VLIW bundles of a decode's block of the KV cache against the cycles
in which the memory delivers the block, and against jax's own ragged_paged_attention on as many tokens.

A bundle takes a cycle or more, so that bundles are a lower bound; below the memory's cycles a kernel can be bound by
the memory. Counted are, for a block of fetched pages in the middle of a sequence: the loop over its chunks, starting
and awaiting a copy for each page, and all else in the body once, branches that are not taken included; of upstream's
kernel likewise the body of its innermost loop. For prefill: what the matrix unit needs in bfloat16 at its peak, of the
bundles of the loop over KV heads.

python benchmarks/tpu_kernels.py [--chips v5e v5p] [--shapes llama-3-8b ...] [--dtypes int8 ...] [--no-upstream]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from dataclasses import dataclass

from torchinfer import aot
from torchinfer.attention_bundles import AttentionBundles
from torchinfer.kernels import tpu_attention

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
SHAPES = {  # query heads, KV heads, head size; on one chip
    "llama-3-8b": (32, 8, 128),
    "llama-2-70b-of-8-chips": (8, 1, 128),
    "gemma-7b": (16, 16, 256),
    "gemma-2b": (8, 1, 256),
}
DTYPES = ("int8", "float8_e4m3fn", "bfloat16")
MATRIX_FLOPS = 2 * 4 * 128 * 128  # of a core in a cycle, v5e and v5p
NUM_ROWS, MAX_PAGES, NUM_PAGES = 64, 64, 512


@dataclass(frozen=True)
class Block:
    """A decode's block of fetched pages."""

    num_tokens: int
    num_bytes: int
    num_bundles: int
    prefill_of_peak: float


def ours(heads: int, kv_heads: int, size: int, dtype: str, chip: str) -> Block:
    """Compile the attention kernel and count."""
    import jax

    from torchinfer.kernels.tpu.page_layout import PAGE_SIZE, PageLayout
    from torchinfer.kernels.tpu.ragged_attention import make_config, ragged_paged_attention

    layout = PageLayout(kv_heads, size, dtype)
    config = make_config(layout, heads, num_cores=aot.CHIPS[chip].num_cores)
    shape = jax.ShapeDtypeStruct
    scales = [] if dtype == "bfloat16" else [shape((NUM_ROWS, kv_heads), "float32")] * 2
    numbers = [shape((NUM_ROWS, kv_heads, size), dtype)] * 2
    tables = [shape(dims, "int32") for dims in ((NUM_ROWS + 1,), (NUM_ROWS,), (NUM_ROWS, MAX_PAGES))]
    arguments = [shape((NUM_ROWS, heads, size), "bfloat16"), *numbers, *scales]
    arguments += [shape(layout.shape(NUM_PAGES), "int32"), *tables]

    def attention(query, key, value, *rest):  # type: ignore[no-untyped-def]
        both = rest[:-4] or (None, None)
        return ragged_paged_attention(query, key, value, *both, *rest[-4:], config=config, scale=size**-0.5)

    compiled = aot.compile_jax(attention, arguments, TOPOLOGIES[chip], dump_bundles=True)
    kernel = max(compiled.kernels.values(), key=lambda kernel: kernel.num_bundles)
    counted = AttentionBundles(kernel, tpu_attention.attention_blocks(heads, kv_heads, size, dtype, config.num_cores))
    flops = 2 * 2 * config.rows(config.tile_tokens) * config.prefill_chunk * PAGE_SIZE * config.key_width
    return Block(
        config.block_tokens,
        config.fetch_pages * layout.page_bytes,
        round(counted.decode_block()),
        flops / MATRIX_FLOPS / counted.prefill_chunk(),
    )


def upstream(heads: int, kv_heads: int, size: int, num_tokens: int, chip: str) -> int:
    """Bundles of jax's kernel for as many tokens in int8 pages of 128; 0 where it takes no such heads."""
    import jax
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ragged_paged_attention

    # A block of one query is what costs it least; blocks of more than 2,048 tokens do not fit its memory.
    block_tokens = min(num_tokens, 2048 * 8 // kv_heads // (size // 128), 2048)
    options = {"num_kv_pages_per_block": block_tokens // 128, "num_queries_per_block": 1}
    function = functools.partial(
        ragged_paged_attention, k_scale=1.0, v_scale=1.0, vmem_limit_bytes=64 * 2**20, **options
    )
    shape = jax.ShapeDtypeStruct
    arguments = [
        shape((NUM_ROWS, heads, size), "bfloat16"),
        shape((NUM_PAGES, 128, 2 * kv_heads, size), "int8"),
        *(shape(dims, "int32") for dims in ((NUM_ROWS,), (NUM_ROWS, MAX_PAGES), (NUM_ROWS + 1,), (1,))),
    ]
    try:
        compiled = aot.compile_jax(function, arguments, TOPOLOGIES[chip], dump_bundles=True)
    except (ValueError, NotImplementedError) as error:
        print(f"  upstream refuses {heads}/{kv_heads}/{size}: {str(error)[:150]}")
        return 0
    kernel = max(compiled.kernels.values(), key=lambda kernel: kernel.num_bundles)
    return max(loop.num_bundles for loop in kernel.innermost) * num_tokens // block_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--no-upstream", action="store_true")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = []
    for chip in args.chips:
        for name in args.shapes:
            for dtype in args.dtypes:
                block = ours(*SHAPES[name], dtype, chip)
                cycles = round(aot.CHIPS[chip].hbm_cycles(block.num_bytes))
                line = {"chip": chip, "shape": name, "dtype": dtype, "tokens": block.num_tokens, "hbm_cycles": cycles}
                line |= {"bundles": block.num_bundles, "of_hbm": round(block.num_bundles / cycles, 3)}
                line["prefill_of_peak"] = round(block.prefill_of_peak, 2)
                if dtype == "int8" and not args.no_upstream:
                    theirs = upstream(*SHAPES[name], block.num_tokens, chip)
                    line |= {
                        "upstream": theirs,
                        "of_upstream": round(block.num_bundles / theirs, 3) if theirs else None,
                    }
                print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
                results.append(line)
    print(json.dumps({"benchmark": "tpu_kernels", "results": results}))


if __name__ == "__main__":
    main()
