"""How much each of several tensor-parallel processes reads of a checkpoint, against its share.

Row-cut tensors are contiguous in the file, a process reads its rows; a tensor that is cut in columns must be read in
whole rows. Every byte is counted where it comes in: results of `preadv` in a folder, what the server sends over gs://
(torchinfer's fake one). Each process is loaded for real, one after the other; with an exchange all at once, over gloo,
and what they read is compared with the checkpoint's bytes.

    python benchmarks/sharded_loading.py --model DIR [DIR ...]      # e.g. those of benchmarks/make_checkpoint.py
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from torchinfer.fake_gcs import FakeGcs
from torchinfer.loader import Checkpoint, LoadOptions, load_weights
from torchinfer.loader.placement import Placement, place
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import Shard

BFLOAT16, CPU = torch.bfloat16, torch.device("cpu")


def local_model(config: ModelConfig, world: int) -> Decoder:
    """The model of one process on meta: heads, MLP columns and the vocabulary are divided."""
    moe = config.moe and replace(config.moe, intermediate_size=config.moe.intermediate_size // world)
    sizes = {
        "num_heads": config.num_heads // world,
        "num_kv_heads": max(1, config.num_kv_heads // world),
        "intermediate_size": config.intermediate_size // world,
        "vocab_size": config.vocab_size // world,
    }
    with torch.device("meta"):
        return build_model(replace(config, moe=moe, **sizes))


def kind_of(placement: Placement) -> str:
    return "whole" if placement.cut is None else "rows" if placement.cut.dim == 0 else "columns"


def shares(checkpoint: Checkpoint, placements: dict[str, Placement]) -> Counter[str]:
    """Bytes that a rank holds in the end, by how the tensor is cut."""
    found: Counter[str] = Counter()
    for name, placement in placements.items():
        entry, cut = checkpoint.tensors[name], placement.cut
        part = entry.num_bytes if cut is None else entry.num_bytes * (cut.stop - cut.start) // entry.shape[cut.dim]
        found[kind_of(placement)] += part
    return found


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The bytes that each call of `preadv` inside of it gives."""
    whole, found = os.preadv, list[int]()

    def preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = whole(descriptor, buffers, offset, flags)
        if not flags:  # with flags it is a question to the page cache
            found.append(count)
        return count

    os.preadv = preadv  # type: ignore[assignment]
    try:
        yield found
    finally:
        os.preadv = whole


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, FakeGcs]]:
    """The address of a folder in a fake bucket, and the server."""
    with tempfile.TemporaryDirectory() as root:
        Path(root, "bucket").symlink_to(folder.resolve().parent)
        with FakeGcs(Path(root)) as server:
            os.environ["STORAGE_EMULATOR_HOST"] = server.endpoint
            yield f"gs://bucket/{folder.name}", server


def load(address: str, rank: int, world: int, options: LoadOptions, on_headers: Callable[[], object]) -> int:
    """Load a process's part; `on_headers` is called when only tensors are left to read. Bytes by the load's report."""
    checkpoint = Checkpoint.open(address)
    model = local_model(ModelConfig.from_dict(checkpoint.config), world)
    on_headers()
    return load_weights(model, checkpoint, BFLOAT16, CPU, False, options, Shard(rank, world)).read_bytes


def load_together(rank: int, address: str, world: int, folder: str) -> None:
    """One process of several that exchange; leaves what it has read in `folder`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    read = load(address, rank, world, LoadOptions(exchange=True), lambda: None)
    Path(folder, str(rank)).write_text(str(read))
    dist.destroy_process_group()


def read_together(address: str, world: int) -> int:
    with tempfile.TemporaryDirectory() as results:
        multiprocessing.spawn(load_together, (address, world, results), nprocs=world)
        return sum(int(Path(results, str(rank)).read_text()) for rank in range(world))


def sent_together(folder: Path, world: int) -> int:
    """What the server sent, but for headers and JSON files, which each process reads."""
    with served(folder) as (address, server):
        Checkpoint.open(address)
        headers = server.stats(reset=True).num_bytes
        reported = read_together(address, world)
        sent = server.stats().num_bytes - world * headers
    print(f"{folder.name}, with exchange: gs:// sent {sent}, reported {reported}", flush=True)
    return sent


def measure(folder: Path, world: int) -> dict[str, object]:
    checkpoint = Checkpoint.open(folder)
    share, columns = Counter[str](), 0
    for rank in range(world):
        model = local_model(ModelConfig.from_dict(checkpoint.config), world)
        placements, _ = place(model, checkpoint.tensors, Shard(rank, world))
        share += shares(checkpoint, placements)
        columns += sum(checkpoint.tensors[name].num_bytes for name, p in placements.items() if kind_of(p) == "columns")
    read, sent = 0, 0
    for rank in range(world):
        with counted_reads() as counts:
            reported = load(str(folder), rank, world, LoadOptions(direct=False), counts.clear)
        own = sum(counts)
        assert own == reported, f"rank {rank} read {own} bytes, and reports {reported}"
        read += own
        with served(folder) as (address, server):
            reported = load(address, rank, world, LoadOptions(), lambda: server.stats(reset=True))
            own = server.stats().num_bytes
        print(f"{folder.name}, rank {rank}: gs:// sent {own}, reported {reported}", flush=True)
        sent += own
    by_rows = share["rows"] + share["whole"]
    return {
        "model": folder.name,
        "world": world,
        "checkpoint_gb": round(checkpoint.total_bytes / 1e9, 3),
        "rows_and_whole": round((read - columns) / by_rows, 4),
        "columns": round(columns / share["columns"], 4),
        "overall": round(read / share.total(), 4),
        "rows_and_whole_gs": round((sent - columns) / by_rows, 4),
        "overall_gs": round(sent / share.total(), 4),
        "overall_with_exchange": round(read_together(str(folder), world) / checkpoint.total_bytes, 4),
        "overall_gs_with_exchange": round(sent_together(folder, world) / checkpoint.total_bytes, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True)
    parser.add_argument("--world", type=int, default=4)
    args = parser.parse_args()
    print("ceiling: bytes read over bytes held, at most 1.02 where rows are cut or tensors are whole")
    rows = [measure(folder, args.world) for folder in args.model]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    print(json.dumps({"benchmark": "sharded_loading", "unit": "bytes read / bytes held", "rows": rows}))


if __name__ == "__main__":
    main()
