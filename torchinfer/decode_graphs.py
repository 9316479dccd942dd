"""Steps in which every request decodes, over buffers that stay where they are: what a CUDA graph can hold.

A step is padded to a bucket: rows are powers of two up to the most requests, pages of a row go by fours from
LEAST_LENGTH tokens up to the longest request. What pads is a request of one token in page 0, which belongs to nobody.
On CUDA each bucket is captured at the start; elsewhere, and without graphs, the same steps run op by op.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torchinfer.device import free_memory_bytes, host_ints
from torchinfer.errors import DeviceError
from torchinfer.scheduler import Plan
from torchinfer.step_input import Ints, StepShape, buckets, pack

logger = logging.getLogger(__name__)

LEAST_LENGTH = 2048  # tokens: attention's programs for the spans of a context, most of them idle, stay few below it
LENGTH_FACTOR = 4
WARM_UPS = 2  # runs before a capture: the first compiles
GIB = 2**30


class DecodeGraphs:
    """A forward pass in buckets. `forward`: a packed step [size] int32 on the device -> hidden states [R, H]."""

    def __init__(
        self,
        forward: Callable[[Tensor, StepShape], Tensor],
        page_size: int,
        device: torch.device,
        *,
        table_width: int,
        max_num_requests: int,
    ) -> None:
        self._forward = forward
        self._page_size = page_size
        self._device = device
        self._row_buckets = capped(buckets(1, max_num_requests), max_num_requests)
        least = -(-LEAST_LENGTH // page_size)
        self._width_buckets = capped(buckets(least, table_width, LENGTH_FACTOR), table_width)
        largest = StepShape(max_num_requests, max_num_requests, table_width, is_decode=True)
        self._packed = torch.zeros(largest.size, dtype=torch.int32, device=device)
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def shapes(self) -> Iterator[StepShape]:
        """Every bucket."""
        for width in self._width_buckets:
            for rows in self._row_buckets:
                yield StepShape(rows, rows, width, is_decode=True)

    def shape_of(self, plan: Plan) -> StepShape | None:
        """The bucket of a step; None if it has chunks of prompts, or nothing that decodes."""
        if plan.chunks or not plan.decodes:
            return None
        num_pages = -(-plan.max_decode_kv_length // self._page_size)
        rows = next(size for size in self._row_buckets if size >= len(plan.decodes))
        return StepShape(rows, rows, next(w for w in self._width_buckets if w >= num_pages), is_decode=True)

    def run(self, plan: Plan, page_table: Ints, shape: StepShape) -> tuple[Tensor, Tensor]:
        """Hidden states [R, H] of a step, padded ones last, and the step as it lies on the device, [size] int32.

        Both are written again by the next step.
        """
        packed = self._send(plan, page_table, shape)
        captured = self._graphs.get(shape)
        if captured is None:
            return self._forward(packed, shape), packed
        graph, hidden = captured
        graph.replay()
        return hidden, packed

    @torch.inference_mode()
    def capture(self, progress: bool) -> None:
        """Capture every bucket, the largest first, in whose memory the others then lie.

        Raises:
            DeviceError: a step cannot be captured, or the memory does not suffice.
        """
        before, start = free_memory_bytes(self._device), time.monotonic()
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        shapes = sorted(self.shapes(), key=lambda shape: shape.size, reverse=True)
        for shape in tqdm(shapes, desc="capturing", unit="graph", disable=None if progress else True):
            try:
                self._graphs[shape] = self._captured(shape, pool, stream)
            # Of torch or of Triton, whose errors have no base in common: none is kept back.
            except Exception as error:
                raise DeviceError(
                    f"a step of {shape.num_requests} requests with {shape.table_width} pages each cannot be captured "
                    f"in a CUDA graph: {error}; lower kv_cache_memory if it is for want of memory, or switch graphs "
                    "off (cuda_graphs=False, --no-cuda-graphs)"
                ) from error
        seconds, taken = time.monotonic() - start, before - free_memory_bytes(self._device)
        logger.info("captured %d CUDA graphs in %.1f s, %.2f GiB", len(shapes), seconds, taken / GIB)

    def _captured(self, shape: StepShape, pool: Any, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        packed = self._send(Plan(), np.zeros((1, shape.table_width), np.int32), shape)
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(packed, shape)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread asks for the state of events meanwhile, which is no part of this.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            hidden = self._forward(packed, shape)
        return graph, hidden

    def _send(self, plan: Plan, page_table: Ints, shape: StepShape) -> Tensor:
        """The step in the buffer on the device, in one transfer."""
        host = host_ints(shape.size, self._device)
        pack(plan, page_table, self._page_size, shape, host.numpy())
        return self._packed[: shape.size].copy_(host, non_blocking=True)


def capped(sizes: list[int], largest: int) -> list[int]:
    """Buckets of which the last one is exactly `largest`."""
    return [size for size in sizes if size < largest] + [largest]
