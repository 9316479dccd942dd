"""Run by test_spmd.py in a process of its own: CONFIG NUM_CHIPS FOLDER. Writes FOLDER/module.mlir, the program of the
engine of several TPU chips that draws ids from logits, traced without memory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch_xla.core.xla_model as xla_model

from torchinfer import kernels, spmd
from torchinfer.batch import KVCache
from torchinfer.device import resolve_device
from torchinfer.parallel import divide
from torchinfer.planner.source import read_source
from torchinfer.planner.trace import with_places
from torchinfer.spmd import REPLICATED, STACKED
from torchinfer.spmd_runner import SpmdRunner

ROWS = 8


def main() -> None:
    config, num_chips, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    device = resolve_device("xla", num_chips)
    kernels.load_sampler()
    source = read_source(config, "bfloat16", "int8")
    model = divide(source.build(source.config), num_chips)
    caches = [KVCache(spmd.placeholder((8,), torch.int32, STACKED, num_chips))] * source.config.num_layers
    runner = SpmdRunner(model, caches, 128, device, table_width=1, max_num_requests=ROWS, max_num_tokens=16)
    logits = spmd.placeholder((ROWS // num_chips, source.config.vocab_size), torch.float32, 0, num_chips)
    parameters = ((ROWS,), torch.int32), ((4, ROWS), torch.float32)
    sent = [spmd.placeholder(shape, dtype, REPLICATED, num_chips) for shape, dtype in parameters]
    (ids,) = runner._sample_eager(logits, *sent)
    (folder / "module.mlir").write_text(with_places(xla_model.get_stablehlo([ids])))


if __name__ == "__main__":
    main()
