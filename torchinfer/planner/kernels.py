"""The Pallas kernels of a compiled step: bundles of a call against the cycles in which the memory moves its bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torchinfer import aot
from torchinfer.attention_bundles import AttentionBundles
from torchinfer.kernel_calls import KernelCall, compile_kernels, kernel_calls, kernel_grid, sizes_of
from torchinfer.kernels import tpu_attention
from torchinfer.planner.footprint import Footprint

ATTENTION = "ragged_paged_attention"
PAGE_TABLE = 2  # of its operands
PRODUCT = "streamed_matmul"
INPUTS = 1  # of its operands: rows [N, I], which a loop in its first steps splits, or what was made of them before
SPLIT_ROWS = 32  # of a round


@dataclass(frozen=True, slots=True)
class StepKernel:
    """Calls of a kernel with operands of the same types. Cycles are of one call, on one core."""

    name: str
    call: KernelCall
    num_bundles: int  # each takes a cycle or more
    hbm_cycles: float  # for the core's share of the bytes that it states; 0: it states none

    @property
    def num_bytes(self) -> int:
        """Between the chip and its memory, as one call states; 0 if it states none."""
        return self.call.stated.get("bytes_accessed", 0)

    @property
    def cycles(self) -> float:
        """Of all calls of a step, at least: of bundles and memory the larger."""
        return self.call.count * max(self.num_bundles, self.hbm_cycles)

    @property
    def streamed(self) -> str:
        """The type of what it reads most of, words of 32 bits if there are some: a matrix, or pages of the cache."""
        return max(self.call.operands, key=lambda kind: (kind.startswith("s32"), math.prod(sizes_of(kind))))

    def to_dict(self) -> dict[str, Any]:
        """Bytes, cycles."""
        return {
            "name": self.name,
            "operands": list(self.call.operands),
            "calls": self.call.count,
            "bytes": self.num_bytes,
            "hbm_cycles": self.hbm_cycles,
            "bundles": self.num_bundles,
        }


def step_kernels(hlo: str, topology: str, part: Footprint, timeout_seconds: float) -> tuple[StepKernel, ...]:
    """Those of an optimized module, each compiled alone for its bundles. Raises what `aot.compile_hlo` raises."""
    calls = kernel_calls(hlo)
    if not calls:
        return ()
    chip = aot.CHIPS[topology.partition(":")[0]]
    found = []
    for call, kernel in zip(calls, compile_kernels(calls, topology, timeout_seconds), strict=True):
        grid = kernel_grid(call)
        if grid.name == ATTENTION:
            bundles = _attention(call, kernel, part, chip.num_cores)
        else:
            bundles = kernel.run(grid.num_steps(chip.num_cores), _rounds(grid.name, call))
        of_core = call.stated.get("bytes_accessed", 0) / chip.num_cores  # cores share what a call does
        found.append(StepKernel(grid.name, call, bundles, chip.hbm_cycles(of_core)))
    return tuple(found)


def _rounds(name: str, call: KernelCall) -> int | None:
    """Of a product's loop that splits rows; None: it has none."""
    if name != PRODUCT or len(sizes_of(call.operands[INPUTS])) != 2:
        return None
    return -(-sizes_of(call.operands[INPUTS])[0] // SPLIT_ROWS)


def _attention(call: KernelCall, kernel: aot.Kernel, part: Footprint, num_cores: int) -> int:
    """With its live pages, those that its stated cost counts, spread evenly over the query blocks, and these over the
    cores."""
    config, pages = part.config, part.pages
    assert pages is not None, "the kernel attends over no other cache"
    blocks = tpu_attention.attention_blocks(
        config.num_heads, config.num_kv_heads, config.head_dim, pages.dtype, num_cores
    )
    num_tokens, num_rows = sizes_of(call.results[0])[0], sizes_of(call.operands[PAGE_TABLE])[0]
    num_decodes = min(num_rows, num_tokens)
    num_prefills = -(-(num_tokens - num_decodes) // blocks.prefill_tokens)
    num_pages = call.stated["transcendentals"] // (config.num_heads * pages.num_tokens)
    each = -(-num_pages // (num_decodes + num_prefills))
    return round(AttentionBundles(kernel, blocks).call(num_decodes / num_cores, num_prefills / num_cores, each))
