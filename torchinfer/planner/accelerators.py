"""Accelerators: what one chip has, and in which numbers chips can be rented. Data of 2026-11-24.

Memory is what programs can have: of TPUs what the compiler says (libtpu 0.0.21: "of 15.75G hbm", "of 95.74G hbm"), of
GPUs what PyTorch says of a whole one. Peaks are of dense matrices. Sources of each number: `sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

GIB = 2**30
# Topology -> hosts, as GKE has them: ct5lp-hightpu-1t, -4t and -8t, -4t for several hosts; ct5p-hightpu-4t.
V5E_HOSTS = {"1x1": 1, "2x2": 1, "2x4": 1, "4x4": 4, "4x8": 8, "8x8": 16, "8x16": 32, "16x16": 64}
V5P_HOSTS = {"2x2x1": 1, "2x2x2": 2, "2x2x4": 4, "2x4x4": 8, "4x4x4": 16, "4x4x8": 32, "4x8x8": 64, "8x8x8": 128}


@dataclass(frozen=True, slots=True)
class Topology:
    """Chips that are rented together and hold one copy of a model."""

    name: str  # 2x4; of GPUs their number
    num_chips: int
    num_hosts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A kind of chip. `peak_flops`: of bfloat16, int8 and fp8; what is missing is multiplied in bfloat16."""

    name: str
    full_name: str
    memory_bytes: int
    bytes_per_second: float  # of its memory
    peak_flops: Mapping[str, float]
    ring_bytes_per_second: float  # that a chip sends in a ring of chips, both directions together
    hop_seconds: float  # from one chip of a ring to the next; an assumption
    topologies: tuple[Topology, ...]  # the smallest first
    sources: tuple[str, ...]

    def has(self, topology: str) -> bool:
        """Whether there is such a topology."""
        return any(topology == each.name for each in self.topologies)

    def topology(self, name: str) -> Topology:
        """The topology of this name, which must be there."""
        return next(topology for topology in self.topologies if topology.name == name)

    def peak(self, operands: str) -> float:
        """Operations a second on operands of this format."""
        return self.peak_flops.get(operands, self.peak_flops["bfloat16"])


def _tpus(hosts: Mapping[str, int]) -> tuple[Topology, ...]:
    return tuple(Topology(name, prod(map(int, name.split("x"))), num_hosts) for name, num_hosts in hosts.items())


def _gpus(*counts: int) -> tuple[Topology, ...]:
    return tuple(Topology(str(count), count, 1) for count in counts)


ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            name="v5e",
            full_name="TPU v5e",
            memory_bytes=int(15.75 * GIB),
            bytes_per_second=819e9,
            peak_flops={"bfloat16": 197e12, "int8": 394e12},
            ring_bytes_per_second=100e9,
            hop_seconds=1e-6,
            topologies=_tpus(V5E_HOSTS),
            sources=(
                "cloud.google.com/tpu/docs/v5e: 197 TFLOPs bf16, 393 int8 (394 by jax), 16 GB at 819 GBps, ICI "
                "400 GBps a chip, both directions of 4 links; topologies",
                "memory: the compiler of libtpu 0.0.21",
            ),
        ),
        Accelerator(
            name="v5p",
            full_name="TPU v5p",
            memory_bytes=int(95.74 * GIB),
            bytes_per_second=2765e9,
            peak_flops={"bfloat16": 459e12, "int8": 918e12},
            ring_bytes_per_second=200e9,
            hop_seconds=1e-6,
            topologies=_tpus(V5P_HOSTS),
            sources=(
                "cloud.google.com/tpu/docs/v5p: 459 TFLOPs bf16, 95 GiB at 2765 GBps, ICI 1200 GBps a chip, both "
                "directions of 6 links; topologies up to 512 chips, and GKE's 2x2x4",
                "int8: twice bf16 (jax 0.7.1); memory: the compiler of libtpu 0.0.21",
            ),
        ),
        Accelerator(
            name="h200",
            full_name="NVIDIA H200 SXM",
            memory_bytes=int(139.7 * GIB),
            bytes_per_second=4800e9,
            peak_flops={"bfloat16": 989e12, "int8": 1979e12, "fp8": 1979e12},
            ring_bytes_per_second=450e9,
            hop_seconds=1.5e-6,
            topologies=_gpus(1, 2, 4, 8),
            sources=("nvidia.com, H200 data sheet: 141 GB at 4.8 TB/s, NVLink 900 GB/s both directions",),
        ),
        Accelerator(
            name="h100",
            full_name="NVIDIA H100 SXM",
            memory_bytes=int(79.1 * GIB),
            bytes_per_second=3350e9,
            peak_flops={"bfloat16": 989e12, "int8": 1979e12, "fp8": 1979e12},
            ring_bytes_per_second=450e9,
            hop_seconds=1.5e-6,
            topologies=_gpus(1, 2, 4, 8),
            sources=("nvidia.com, H100 data sheet: 80 GB at 3.35 TB/s, NVLink 900 GB/s both directions",),
        ),
        Accelerator(
            name="l4",
            full_name="NVIDIA L4",
            memory_bytes=int(22.0 * GIB),
            bytes_per_second=300e9,
            peak_flops={"bfloat16": 121e12, "int8": 242e12, "fp8": 242e12},
            ring_bytes_per_second=32e9,
            hop_seconds=5e-6,
            topologies=_gpus(1, 2, 4, 8),
            sources=("nvidia.com, L4 data sheet: 24 GB at 300 GB/s, PCIe 4.0 x16, 64 GB/s both directions",),
        ),
    )
}
