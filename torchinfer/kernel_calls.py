"""The Pallas kernels that a compiled program calls, read from its optimized HLO, and their VLIW bundles.

A model calls the same few kernels in each of its layers: of hundreds of calls a handful are distinct, by the kernel and
the types of its operands. These are compiled once more, as a program of their own, because a dump of the bundles of
all layers takes minutes.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchinfer import aot

# Of HLO -> of MLIR, where they differ.
MLIR_TYPES = {"pred": "i1", "s8": "i8", "s16": "i16", "s32": "i32", "u8": "ui8", "u32": "ui32", "f8e4m3fn": "f8E4M3FN"}
COMPILED_FROM = ("custom_call_config", "scoped_memory_configs")  # of a call's config; the rest the compiler added
_CALL = re.compile(r'^ *(?:ROOT )?%([\w.\-]+) = (.*?) custom-call\(.*custom_call_target="tpu_custom_call"(.*)$', re.M)
_OPERANDS = re.compile(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}")
_TYPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_ALIASES = re.compile(r"output_to_operand_aliasing=\{((?:[^{}]|\{[^{}]*\})*)\}")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{\}\)")


@dataclass(frozen=True, slots=True)
class KernelCall:
    """All calls of a kernel with operands of the same types."""

    operands: tuple[str, ...]  # types: bf16[64,4096]
    results: tuple[str, ...]
    aliases: tuple[tuple[int, int], ...]  # (result, operand) that share their memory
    config: str = field(repr=False)  # what it is compiled from: JSON
    count: int = field(default=1, compare=False)

    @property
    def stated(self) -> Mapping[str, int]:
        """Of one call: flops, transcendentals, bytes_accessed; nothing if the kernel states no cost."""
        stated = json.loads(self.config)["custom_call_config"].get("cost_estimate", {})
        return {name: int(value) for name, value in stated.items()}


@dataclass(frozen=True, slots=True)
class KernelGrid:
    """A kernel's name, and the sizes of its grid; both empty of a kernel that has none."""

    name: str
    sizes: tuple[int, ...]
    is_parallel: tuple[bool, ...]  # the cores of a chip share these dimensions

    def num_steps(self, num_cores: int) -> int:
        """Steps of one core, of the core with the most."""
        shared = next((at for at, is_parallel in enumerate(self.is_parallel) if is_parallel), None)
        return math.prod(-(-size // num_cores) if at == shared else size for at, size in enumerate(self.sizes))


def kernel_calls(hlo: str) -> list[KernelCall]:
    """The distinct calls of Pallas kernels in an optimized module, in the order of their first."""
    counts = Counter(call for _, call in _calls(hlo))
    return [KernelCall(call.operands, call.results, call.aliases, call.config, count) for call, count in counts.items()]


def compile_kernels(calls: Sequence[KernelCall], topology: str, timeout_seconds: float = 600) -> list[aot.Kernel]:
    """The bundles of each, on one chip of a topology. Raises what `aot.compile_hlo` raises."""
    compiled = aot.compile_hlo(as_program(calls), topology, dump_bundles=True, timeout_seconds=timeout_seconds)
    names = {call: name for name, call in _calls(compiled.hlo)}
    return [compiled.kernels[names[call]] for call in calls]


def as_program(calls: Sequence[KernelCall]) -> str:
    """StableHLO that makes each call once; arguments and results are the calls', one behind the other."""
    arguments = [_mlir_type(each) for call in calls for each in call.operands]
    types = ", ".join(_mlir_type(each) for call in calls for each in call.results)
    results = ", ".join(f"%{number}#{at}" for number, call in enumerate(calls) for at in range(len(call.results)))
    header = ", ".join(f"%arg{number}: {kind}" for number, kind in enumerate(arguments))
    lines, first = [], 0
    for number, call in enumerate(calls):
        lines.append(f"    {_line(number, call, first)}\n")
        first += len(call.operands)
    body = f"{''.join(lines)}    return {results} : {types}"
    return f"module @kernels {{\n  func.func @main({header}) -> ({types}) {{\n{body}\n  }}\n}}\n"


def kernel_grid(call: KernelCall) -> KernelGrid:
    """Read from the kernel itself, which is MLIR."""
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    body = base64.b64decode(json.loads(call.config)["custom_call_config"]["body"])
    with ir.Context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True  # those of the format that kernels are kept in
        tpu.register_dialect(context)
        module = ir.Module.parse(body)
        attributes = module.body.operations[0].attributes
        sizes = tuple(attributes["iteration_bounds"]) if "iteration_bounds" in attributes else ()
        semantics = list(map(str, attributes["dimension_semantics"])) if sizes else []
        name = ir.StringAttr(module.operation.attributes["sym_name"]).value
    return KernelGrid(name, sizes, tuple("parallel" in each for each in semantics))


def sizes_of(kind: str) -> tuple[int, ...]:
    """Of a type: bf16[64,4096] -> (64, 4096)."""
    return tuple(int(size) for size in _TYPE.findall(kind)[0][1].split(",") if size)


def _calls(hlo: str) -> Iterator[tuple[str, KernelCall]]:
    """The name of each call's instruction, and the call."""
    for name, results, attributes in _CALL.findall(hlo):
        operands, aliases = _OPERANDS.search(attributes), _ALIASES.search(attributes)
        assert operands is not None, f"{name} has no types of operands"
        pairs = [(int(result or 0), int(operand)) for result, operand in _ALIAS.findall(aliases[1] if aliases else "")]
        yield name, KernelCall(_types(operands[1]), _types(results), tuple(pairs), _config(attributes))


def _config(attributes: str) -> str:
    start = attributes.index("backend_config=") + len("backend_config=")
    config: dict[str, Any]
    config, _ = json.JSONDecoder().raw_decode(attributes, start)
    for memory in config.get("scoped_memory_configs", ()):
        memory["offset"] = "0"  # on v5p the compiler moves it
    return json.dumps({name: config[name] for name in COMPILED_FROM if name in config}, sort_keys=True)


def _types(text: str) -> tuple[str, ...]:
    """Without layouts, which are rows after rows."""
    return tuple(f"{dtype}[{sizes}]" for dtype, sizes in _TYPE.findall(text))


def _mlir_type(kind: str) -> str:
    dtype = kind.partition("[")[0]
    return f"tensor<{'x'.join([*map(str, sizes_of(kind)), MLIR_TYPES.get(dtype, dtype)])}>"


def _line(number: int, call: KernelCall, first: int) -> str:
    """The call, of arguments from `first` on."""
    operands = ", ".join(f"%arg{first + at}" for at in range(len(call.operands)))
    kinds, results = (", ".join(map(_mlir_type, each)) for each in (call.operands, call.results))
    config = call.config.replace("\\", "\\5C").replace('"', "\\22")
    aliases = ", ".join(
        f"#stablehlo.output_operand_alias<output_tuple_indices = [{result if len(call.results) > 1 else ''}], "
        f"operand_index = {operand}, operand_tuple_indices = []>"
        for result, operand in call.aliases
    )
    return (
        f"%{number}:{len(call.results)} = stablehlo.custom_call @tpu_custom_call({operands}) "
        f'{{backend_config = "{config}", output_operand_aliases = [{aliases}], '
        f"operand_layouts = [{_layouts(call.operands)}], result_layouts = [{_layouts(call.results)}]}} "
        f": ({kinds}) -> ({results})"
    )


def _layouts(types: Sequence[str]) -> str:
    """Of rows after rows, which is what kernels take."""
    ranks = [len(sizes_of(each)) for each in types]
    return ", ".join(f"dense<{list(reversed(range(rank)))}> : tensor<{rank}xindex>" for rank in ranks)
