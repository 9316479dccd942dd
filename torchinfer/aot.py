"""Compile programs for TPU v5e, v5p and v6e on a machine without a TPU, and read what the compiler knows of them.

The wheel `libtpu` holds the whole TPU compiler. It reads its options once per process and may end it, so each program
is compiled in a process of its own, `torchinfer.aot_compiler`; nothing here starts a TPU or touches jax's devices.

    compiled = compile_jax(function, (jax.ShapeDtypeStruct((16, 4096), "bfloat16"),), "v5e:2x2", dump_bundles=True)
    compiled = compile_hlo(torch_xla.core.xla_model.get_stablehlo([output]), "v5p:2x2x1")
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchinfer.errors import ConfigError, DeviceError

LIBTPU_VERSION = "0.0.21"  # what torch_xla 2.9 and jax 0.7.1 are made for
TOPOLOGIES = {  # name -> chips
    **{f"v5e:{shape}": count for shape, count in (("1x1", 1), ("2x2", 4), ("2x4", 8), ("4x4", 16), ("4x8", 32))},
    **{f"v5e:{shape}": count for shape, count in (("8x8", 64), ("8x16", 128), ("16x16", 256))},
    **{f"v5p:{shape}": count for shape, count in (("1x1x1", 1), ("2x2x1", 4), ("2x2x2", 8), ("2x2x4", 16))},
    **{f"v5p:{shape}": count for shape, count in (("2x4x4", 32), ("4x4x4", 64))},
    **{f"v6e:{shape}": count for shape, count in (("1x1", 1), ("2x2", 4), ("2x4", 8))},
}


@dataclass(frozen=True)
class Chip:
    """What a chip can do at most, for one of its cores. Source: cloud.google.com/tpu/docs/v5e, v5p, v6e."""

    num_cores: int
    clock_hz: float  # of a core: one VLIW bundle a cycle at most
    hbm_bytes: int  # of the chip
    hbm_bytes_per_second: float  # of the chip

    def hbm_cycles(self, num_bytes: float) -> float:
        """Cycles of one core in which its share of the memory's bandwidth moves so many bytes."""
        return num_bytes / (self.hbm_bytes_per_second / self.num_cores) * self.clock_hz


CHIPS = {
    "v5e": Chip(1, 1.5e9, 16 * 2**30, 819e9),
    "v5p": Chip(2, 1.75e9, 95 * 2**30, 2765e9),
    "v6e": Chip(1, 1.75e9, 32 * 2**30, 1640e9),
}


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel: bundles [first, first + num_bundles), with the loops and branches in it."""

    first: int
    num_bundles: int


@dataclass(frozen=True)
class Kernel:
    """The VLIW bundles of one kernel or fusion. Each takes a cycle or more, so that they are a lower bound."""

    num_bundles: int
    loops: tuple[Loop, ...] = ()  # in the order of their first bundles

    @property
    def innermost(self) -> tuple[Loop, ...]:
        """Loops without a loop in them."""
        return tuple(a for a in self.loops if not any(_encloses(a, b) for b in self.loops))

    def inside(self, outer: Loop | None) -> tuple[Loop, ...]:
        """The loops directly in a loop, or in none."""
        deep = [loop for loop in self.loops if outer is None or _encloses(outer, loop)]
        return tuple(a for a in deep if not any(_encloses(b, a) for b in deep))

    @property
    def grid_loop(self) -> Loop | None:
        """The loop over the steps of a grid: the largest that is in no other. None: there is no loop."""
        return max(self.inside(None), key=lambda loop: loop.num_bundles, default=None)

    def run(self, num_steps: int, num_rounds: int | None = None) -> int:
        """Bundles of one run with so many steps of the grid, all else once: other loops, and branches, taken or not.

        num_rounds: of the loops in that over the grid, in all steps together; None: one a step.
        """
        loop = self.grid_loop
        if loop is None:
            return self.num_bundles
        inner = sum(each.num_bundles for each in self.inside(loop))
        rounds = num_steps if num_rounds is None else num_rounds
        return self.num_bundles + (num_steps - 1) * (loop.num_bundles - inner) + (rounds - 1) * inner


def _encloses(outer: Loop, inner: Loop) -> bool:
    return (
        outer != inner
        and outer.first <= inner.first
        and inner.first + inner.num_bundles <= outer.first + outer.num_bundles
    )


@dataclass(frozen=True)
class Compiled:
    """A compiled program. Bytes are of one chip; flops and bytes accessed are what XLA's cost model says.

    The cost model knows nothing of the inside of Pallas kernels that state no cost of theirs.
    """

    topology: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the outputs, those that share the memory of arguments
    temporary_bytes: int
    code_bytes: int
    live_bytes: int  # the most at once of arguments, outputs and temporaries, those in on-chip memory too
    flops: float
    bytes_accessed: float
    hlo: str = field(repr=False)  # the optimized module
    kernels: dict[str, Kernel] = field(default_factory=dict, repr=False)  # empty without dump_bundles

    @property
    def peak_bytes(self) -> int:
        """Memory that a chip needs at most for the program and all that it works on.

        The sum of the parts is too much where temporaries share memory, because they are counted one by one; what is
        there at once is too much where some of it is in on-chip memory.
        """
        parts = self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes
        return min(parts, self.live_bytes) + self.code_bytes


def compile_jax(
    function: Callable[..., Any],
    arguments: Sequence[Any],  # jax.ShapeDtypeStruct
    topology: str,
    *,
    donate: tuple[int, ...] = (),
    dump_bundles: bool = False,
    timeout_seconds: float = 600,
) -> Compiled:
    """Compile a function of jax, with Pallas kernels or without, for one chip of a topology.

    `donate` numbers the arguments whose memory outputs may take.

    Raises:
        ConfigError: when the topology is unknown, or the compiler refuses the program, with its words.
        DeviceError: when libtpu is missing or of another version, or the compiler does not end in time.
    """
    _check(topology, 1)
    import jax
    import jax.export

    # An export holds Mosaic's format of before jax's date of release, which is the one that libtpu reads.
    exported = jax.export.export(jax.jit(function, donate_argnums=donate, keep_unused=True), platforms=("tpu",))
    module = exported(*arguments).mlir_module_serialized
    return _compile(bytes(module), topology, 1, (), dump_bundles, timeout_seconds)


def compile_hlo(
    stablehlo: str,
    topology: str,
    *,
    num_devices: int = 1,
    donate: tuple[int, ...] = (),
    dump_bundles: bool = False,
    timeout_seconds: float = 600,
) -> Compiled:
    """Compile StableHLO text, such as torch_xla's `get_stablehlo`, for some chips of a topology.

    With more than one device the shardings in the text (`mhlo.sharding`) tell XLA how to partition the program.
    `donate` numbers the arguments whose memory outputs may take. Raises what `compile_jax` raises.
    """
    _check(topology, num_devices)
    return _compile(stablehlo.encode(), topology, num_devices, donate, dump_bundles, timeout_seconds)


def _check(topology: str, num_devices: int) -> None:
    if topology not in TOPOLOGIES:
        raise ConfigError(f"unknown topology {topology!r}; known are {', '.join(TOPOLOGIES)}")
    if not 0 < num_devices <= TOPOLOGIES[topology]:
        raise ConfigError(f"{num_devices} devices were asked for, but {topology} has 1 to {TOPOLOGIES[topology]} chips")
    check_compiler()


def check_compiler() -> None:
    """Raises DeviceError: libtpu, which holds the compiler, is missing or of another version."""
    if importlib.util.find_spec("libtpu") is None:
        raise DeviceError("libtpu, which holds the TPU compiler, is not installed; pip install 'torchinfer[tpu]'")
    found = importlib.metadata.version("libtpu")
    if found != LIBTPU_VERSION:
        raise DeviceError(
            f"libtpu is {found}, but programs of torch_xla 2.9 and jax 0.7.1 need {LIBTPU_VERSION}; "
            f"pip install libtpu=={LIBTPU_VERSION}"
        )


def _compile(
    module: bytes,
    topology: str,
    num_devices: int,
    donate: tuple[int, ...],
    dump_bundles: bool,
    timeout_seconds: float,
) -> Compiled:
    with tempfile.TemporaryDirectory(prefix="torchinfer-aot-") as name:
        folder = Path(name)
        (folder / "module").write_bytes(module)
        (folder / "dump").mkdir()
        command = [sys.executable, "-m", "torchinfer.aot_compiler", name, topology, str(num_devices), *map(str, donate)]
        environment = _environment(folder, dump_bundles)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"the compiler for {topology} did not end in {timeout_seconds:g} s; allow more"
            ) from error
        if not (folder / "result.json").exists():
            raise DeviceError(f"the compiler for {topology} ended with code {done.returncode}: {done.stderr[-2000:]}")
        result = json.loads((folder / "result.json").read_text())
        if "error" in result:
            raise ConfigError(f"the compiler for {topology} refuses the program: {result['error']}")
        return Compiled(topology, **result, kernels=kernel_bundles(folder / "dump"))


def _environment(folder: Path, dump_bundles: bool) -> dict[str, str]:
    spec = importlib.util.find_spec("libtpu")
    assert spec is not None and spec.origin is not None
    options = [f"--xla_jf_dump_to={folder / 'dump'}", "--xla_jf_dump_llo_text=true"]
    options.append("--xla_jf_dump_llo_pass_label_regex=final_bundles")
    return os.environ | {
        "TPU_LIBRARY_PATH": str(Path(spec.origin).parent / "libtpu.so"),
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": " ".join(options) if dump_bundles else "",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Off a TPU host libtpu would ask the cloud's metadata server, which is not there, for each of these.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_LOG_DIR": str(folder),
        "TPU_STDERR_LOG_LEVEL": "3",
    }


def kernel_bundles(dump_dir: Path) -> dict[str, Kernel]:
    """Kernels and fusions in a folder that libtpu dumped into (--xla_jf_dump_to), by HLO instruction."""
    kernels = {}
    for path in sorted(dump_dir.glob("*-final_bundles.txt")):
        # 1764-tpu_custom_call.1-72-final_bundles.txt; TLP is the program that calls the kernels.
        found = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        if found and "-TLP-" not in path.name:
            kernels[found.group(1)] = parse_bundles(path.read_text())
    return kernels


def parse_bundles(text: str) -> Kernel:
    """Count the bundles in the text of a final_bundles.txt, and those of each loop.

    A bundle's line is an address, LB where a loop's body starts, a colon, and `>` for each loop that it is in. Empty
    bundles lack these signs, and some in the middle of a loop have less: a loop ends with the last that has them all,
    before another one starts at its depth or further out.
    """
    found = re.findall(r"^ *(?:0x[0-9a-f]+|0) +(LB)?[A-Z]*: *(>*)", text, re.M)
    loops: list[Loop] = []
    entered: dict[int, Loop] = {}  # by depth
    for index, (is_start, signs) in enumerate(found):
        if is_start:
            loops += [entered.pop(depth) for depth in list(entered) if depth >= len(signs)]
            entered[len(signs)] = Loop(index, 1)
        for depth in range(1, len(signs) + 1):
            if depth in entered:
                first = entered[depth].first
                entered[depth] = Loop(first, index + 1 - first)
    loops += entered.values()
    return Kernel(len(found), tuple(sorted(loops, key=lambda loop: (loop.first, -loop.num_bundles))))
