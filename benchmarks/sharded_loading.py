"""How much each of several tensor-parallel processes reads of a checkpoint, against its share.

Row-cut tensors are contiguous in the file, a process reads its rows; a tensor that is cut in columns must be read in
whole rows. Each rank is loaded for real, one after the other; what an exchange would make of it comes from its plan.

    python benchmarks/sharded_loading.py --model DIR [DIR ...]      # e.g. those of benchmarks/make_checkpoint.py
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from torchinfer.loader import Checkpoint, load_weights
from torchinfer.loader.placement import Placement, place
from torchinfer.loader.plan import NETWORK_EXTENT_BYTES
from torchinfer.loader.sharing import plan_shared
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import Shard

SMALLEST_EXCHANGED_BYTES = 1 << 20


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


def measure(folder: Path, world: int) -> dict[str, object]:
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.from_dict(checkpoint.config)
    read, share, columns, exchanged = 0, Counter[str](), 0, 0
    for rank in range(world):
        model, shard = local_model(config, world), Shard(rank, world)
        placements, _ = place(model, checkpoint.tensors, shard)
        share += shares(checkpoint, placements)
        read += load_weights(model, checkpoint, torch.bfloat16, torch.device("cpu"), False, shard=shard).num_bytes
        columns += sum(checkpoint.tensors[name].num_bytes for name, p in placements.items() if kind_of(p) == "columns")
        shared = plan_shared(placements, checkpoint.tensors, shard, NETWORK_EXTENT_BYTES, SMALLEST_EXCHANGED_BYTES)
        alone = sum(checkpoint.tensors[name].num_bytes for name in placements if name not in shared.names)
        divided = {name: p for name, p in placements.items() if name not in shared.names}
        exchanged += sum(extent.num_bytes for extent in shared.own)
        exchanged += sum(shares(checkpoint, divided).values()) if alone else 0
    by_rows = share["rows"] + share["whole"]
    return {
        "model": folder.name,
        "world": world,
        "checkpoint_gb": round(checkpoint.total_bytes / 1e9, 3),
        "rows_and_whole": round((read - columns) / by_rows, 4),
        "columns": round(columns / share["columns"], 4),
        "overall": round(read / share.total(), 4),
        "overall_with_exchange": round(exchanged / share.total(), 4),
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
