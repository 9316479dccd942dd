"""Compile the kernels of a call for a card that is not there: with Triton's own compiler and the ptxas it brings.

    with compiling((9, 0)) as compiled:
        rms_norm(torch.empty(4, 4096, dtype=torch.bfloat16, device="meta"), ...)

A port prepares its launch as on the card, with shapes only; in place of the launch stands a record of what was
compiled. A kernel that needs more shared memory or threads than the card has raises Triton's OutOfResources.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

SHARED_BYTES = {(8, 0): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}  # that a block may have, by capability
MOST_THREADS = 1024
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)", re.MULTILINE)
FLUSHING = re.compile(r"[a-z0-9.]+\.ftz\.[a-z0-9.]+")
PRODUCT = re.compile("[HIQ]G?MMA")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel, specialized for its arguments."""

    name: str
    registers: int  # of a thread
    stack_bytes: int  # of a thread: what did not fit into registers
    shared_bytes: int  # of a block
    loop_instructions: int  # of a warp, in one round of the longest loop that has no loop in it
    tensor_instructions: int  # of these, products of tiles
    flushing: list[str]  # instructions of PTX that take numbers below 2^-126 for zeros


class OfflineDriver(DriverBase):  # type: ignore[misc]
    """A card without memory and without time."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability
        self.compiled: list[Compiled] = []
        self.ptx = ""  # of the kernel that is loaded next
        self.utils = self  # where Triton looks for get_device_properties and load_binary

    @classmethod
    def is_active(cls) -> bool:
        """Only where it is asked for."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Not reached: launchers are not built."""
        raise NotImplementedError(ty)

    def get_active_torch_device(self) -> Any:
        """Not reached: nothing runs."""
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        """Not reached: nothing runs."""
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        """What the compiler compiles for."""
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton compares a kernel's needs with."""
        return {"max_shared_mem": SHARED_BYTES[self.capability]}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What stands in place of a launch."""
        return lambda *arguments: None

    def note_ptx(self, _module: Any, _function: Any, _name: str, files: dict[str, str], _hash: str) -> None:
        """Triton's call ahead of `load_binary`, with the files of a kernel."""
        (path,) = (path for name, path in files.items() if name.endswith(".ptx"))
        self.ptx = Path(path).read_text(encoding="utf-8")

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        """Note what a kernel needs; Triton takes module, function, registers, spilled bytes and most threads."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code)
            file.flush()
            usage, assembly = (_dump(option, file.name) for option in ("-res-usage", "-sass"))
        found = USAGE.search(usage)
        assert found is not None, usage
        registers, stack, local = map(int, found.groups())
        loop = longest_loop(assembly)
        num_tensor = sum(bool(PRODUCT.match(opcode)) for opcode in loop)
        flushing = sorted(set(FLUSHING.findall(self.ptx)))
        self.compiled.append(Compiled(name, registers, stack + local, shared, len(loop), num_tensor, flushing))
        return name, name, registers, stack, MOST_THREADS


@contextmanager
def compiling(capability: tuple[int, int]) -> Iterator[list[Compiled]]:
    """Kernels that are launched inside are compiled for a card with this capability, and do not run.

    Each kernel and specialization is compiled once in a process: use a process for each capability.
    """
    driver = OfflineDriver(capability)
    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.kernel_load_start_hook.add(driver.note_ptx)
    try:
        yield driver.compiled
    finally:
        triton.knobs.runtime.kernel_load_start_hook.remove(driver.note_ptx)
        triton.runtime.driver._active = None


def longest_loop(assembly: str) -> list[str]:
    """The opcodes of the longest innermost loop: between a jump back and where it goes to."""
    found = [(int(place, 16), opcode, rest) for place, opcode, rest in INSTRUCTION.findall(assembly)]
    jumps = [(place, re.search(r"0x([0-9a-f]+)", rest)) for place, opcode, rest in found if opcode.startswith("BRA")]
    loops = [(int(target[1], 16), place) for place, target in jumps if target and int(target[1], 16) < place]
    innermost = [(a, b) for a, b in loops if not any(a <= c and d < b for c, d in loops)]
    bodies = [[opcode for place, opcode, _ in found if a <= place <= b] for a, b in innermost]
    return max(bodies, key=len, default=[])


def _dump(option: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
