"""One process of several that load a model together: python load_shard.py FOLDER RANK WORLD.

FOLDER/cases.json says what to load, FOLDER/<rank>.pt gets what came out. For tests/loader/test_exchange.py; a script of
its own, so that a new process starts without pytest.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from torchinfer.errors import CheckpointError, ConfigError, DeviceError, TorchinferError
from torchinfer.loader import Checkpoint, LoadOptions, load_weights
from torchinfer.loader.exchange import Exchange
from torchinfer.loader.folder import FileReader, FolderSource
from torchinfer.loader.opening import Deliver
from torchinfer.loader.rounds import Peers
from torchinfer.loader.source import FileStat
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import Shard

TIMEOUT = timedelta(seconds=20)


class ToldSource(FolderSource):
    """A folder that takes itself for network storage, fails, or ends the process, as it is told."""

    def __init__(self, folder: str, is_network: bool, fault: str | None) -> None:
        super().__init__(folder)
        self.is_network, self.fault, self.num_opened = is_network, fault, 0

    def open(self, name: str, stat: FileStat, *, end: int | None = None, direct: bool = False) -> FileReader:
        self.num_opened += 1
        if self.fault == "error" or (self.fault == "late error" and self.num_opened > 4):
            raise CheckpointError("this disk is broken")
        if self.fault == "exit":
            os._exit(3)
        return super().open(name, stat, end=end, direct=direct)


def local_model(config: ModelConfig, world: int) -> Decoder:
    """The model of one process on meta: heads, MLP columns and the vocabulary are divided."""
    moe = config.moe and replace(config.moe, intermediate_size=config.moe.intermediate_size // world)
    with torch.device("meta"):
        return build_model(
            replace(
                config,
                num_heads=config.num_heads // world,
                num_kv_heads=max(1, config.num_kv_heads // world),
                intermediate_size=config.intermediate_size // world,
                vocab_size=config.vocab_size // world,
                moe=moe,
            )
        )


@contextlib.contextmanager
def broken(fault: str | None) -> Iterator[None]:
    """This process has no memory to receive into, or fails after the others have made their connections."""
    connect = dist.all_reduce

    def break_down(*arguments: Any, **options: Any) -> None:
        connect(*arguments, **options)
        raise RuntimeError("NCCL is broken")

    def allocate(num_bytes: int) -> torch.Tensor:
        raise DeviceError("out of memory")

    with contextlib.ExitStack() as stack:
        if fault == "no connection":
            stack.enter_context(mock.patch.object(dist, "all_reduce", break_down))
        if fault == "no memory":
            stack.enter_context(mock.patch("torchinfer.loader.memory.allocate", allocate))
        yield


@contextlib.contextmanager
def on_device(is_wanted: bool) -> Iterator[None]:
    """Transfers go the way of those between devices, though they are the CPU."""
    with mock.patch.object(Exchange, "_is_on_device", True) if is_wanted else contextlib.nullcontext():
        yield


def load(case: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """The parameters and the report, or the error."""
    fault = case.get("fault") if shard.rank == case.get("faulty_rank", 1) else None
    checkpoint = Checkpoint.open(case["folder"])
    if not case["folder"].startswith("gs://"):
        checkpoint = replace(checkpoint, source=ToldSource(case["folder"], case.get("is_network", False), fault))
    config = ModelConfig.from_dict(checkpoint.config)
    deliver = Deliver(lambda name, tensor: tensor.clone()) if case.get("is_whole") else None
    model = local_model(config, shard.world if deliver is None else 1)
    assert dist.group.WORLD is not None
    peers = Peers(dist.group.WORLD, case.get("block_bytes"), case.get("narrow_bytes", 1))
    if fault == "missing tensor":
        tensors = {name: entry for name, entry in checkpoint.tensors.items() if name != "model.norm.weight"}
        checkpoint = replace(checkpoint, tensors=tensors)
    options = LoadOptions(memory=case.get("memory", 64 << 20), exchange=case.get("exchange"))
    dtype = getattr(torch, case.get("dtype", "float32"))
    arguments: Any = (shard, peers, None, deliver)
    if case.get("is_tight"):
        options = replace(options, memory=least_memory(model, checkpoint, dtype, options, *arguments))
    start = time.monotonic()
    try:
        with broken(fault), on_device(case.get("is_on_device", False)):
            report = load_weights(model, checkpoint, dtype, torch.device("cpu"), False, options, *arguments)
    except TorchinferError as error:
        return {"error": str(error), "seconds": time.monotonic() - start}
    return {"state": model.state_dict(), "report": report, "memory": options.memory}


def least_memory(
    model: Decoder, checkpoint: Checkpoint, dtype: torch.dtype, options: LoadOptions, *arguments: Any
) -> int:
    """The limit that an error says will do."""
    try:
        load_weights(model, checkpoint, dtype, torch.device("cpu"), False, replace(options, memory=1), *arguments)
    except ConfigError as error:
        return int(str(error).rpartition("load_memory=")[2].split()[0])
    raise AssertionError("a limit of one byte was enough")


def main() -> None:
    folder, shard = Path(sys.argv[1]), Shard(int(sys.argv[2]), int(sys.argv[3]))
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=shard.rank, world_size=shard.world, timeout=TIMEOUT)
    cases = json.loads((folder / "cases.json").read_text())
    outcome = {name: load(case, shard) for name, case in cases.items()}
    torch.save(outcome, folder / f"{shard.rank}.pt")


if __name__ == "__main__":
    main()
