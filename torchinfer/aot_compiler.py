"""The process in which `torchinfer.aot` compiles one program: FOLDER TOPOLOGY NUM_DEVICES [DONATED_ARGUMENT...].

XLA partitions the program among the devices. Reads FOLDER/module, StableHLO as text or bytecode; writes
FOLDER/result.json, with what the compiler says or the error that it ends with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Of the format that is handed to the compiler; libtpu 0.0.21 is older than jaxlib's own version.
STABLEHLO_VERSION = "1.9.0"


def main() -> None:
    """Compile what the command line names."""
    folder, topology, num_devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    donate = [int(index) for index in sys.argv[4:]]
    from jax._src.lib.mlir import ir

    try:
        module = to_portable_bytecode((folder / "module").read_bytes(), num_devices, donate)
        result = describe(compile_module(module, topology, num_devices))
    except (RuntimeError, ValueError, ir.MLIRError) as error:
        result = {"error": str(error)}
    (folder / "result.json").write_text(json.dumps(result))


def to_portable_bytecode(module: bytes, num_devices: int, donate: list[int]) -> bytes:
    """StableHLO in a version that libtpu reads, made for so many devices."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    with mlir.make_ir_context():
        if module.startswith(b"ML\xefR"):  # bytecode, of some version of StableHLO
            module = xla_client._xla.mlir.deserialize_portable_artifact(module)
        parsed = ir.Module.parse(module)
        integer = ir.IntegerType.get_signless(32)
        parsed.operation.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(integer, num_devices)
        parsed.operation.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(integer, 1)
        if donate:
            _mark_donated(parsed, donate)
        return bytes(
            xla_client._xla.mlir.serialize_portable_artifact(mlir.module_to_bytecode(parsed), STABLEHLO_VERSION)
        )


def _mark_donated(module: Any, donate: list[int]) -> None:
    from jax._src.lib.mlir import ir

    main = next(op for op in module.body if ir.StringAttr(op.attributes["sym_name"]).value == "main")
    arguments = [{named.name: named.attr for named in attributes} for attributes in main.arg_attrs]
    for index in donate:
        arguments[index]["jax.buffer_donor"] = ir.BoolAttr.get(True)
    main.arg_attrs = ir.ArrayAttr.get([ir.DictAttr.get(attributes) for attributes in arguments])


def compile_module(module: bytes, topology: str, num_devices: int) -> Any:
    """An executable of jaxlib that cannot be run here."""
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client
    from jax.experimental import topologies

    # A host of a slice has 4 chips, that of a single chip only this one.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.split(":")[1] in ("1x1", "1x1x1") else {}
    devices = topologies.get_topology_desc(topology, platform="tpu", **bounds).devices[:num_devices]
    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=num_devices,
        device_assignment=np.array([[device.id for device in devices]]),
        use_spmd_partitioning=num_devices > 1,
    )
    options.executable_build_options.use_shardy_partitioner = False  # torch_xla writes GSPMD's shardings
    # As torch_xla has it: results stay where they were computed, not a copy on every chip.
    options.executable_build_options.allow_spmd_sharding_propagation_to_output = [True]
    device_list = xla_client.DeviceList(tuple(devices))
    return devices[0].client.compile(module, executable_devices=device_list, compile_options=options)


def describe(executable: Any) -> dict[str, Any]:
    """The fields of `torchinfer.aot.Compiled` that the compiler knows."""
    memory = executable.get_compiled_memory_stats()
    costs = executable.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "live_bytes": memory.peak_memory_in_bytes,
        "flops": costs.get("flops", 0.0),
        "bytes_accessed": costs.get("bytes accessed", 0.0),
        "hlo": executable.hlo_modules()[0].to_string(),
    }


if __name__ == "__main__":
    main()
