"""Run by test_spmd.py in a process of its own: CONFIG NUM_CHIPS NUM_CORES FOLDER. Writes FOLDER/module.mlir, the step
of a model on several chips, traced without memory; prints the arguments that are donated and their bytes on a chip."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
import torch_xla.core.xla_builder as xla_builder
import torch_xla.core.xla_model as xla_model
from torch import Tensor, nn

from torchinfer import kernels, spmd
from torchinfer.device import resolve_device
from torchinfer.kv_cache.tensors import kernel_pages, make_layer
from torchinfer.parallel import divide, local_config, tensors_of
from torchinfer.planner.source import read_source
from torchinfer.planner.trace import MLIR_TYPES, cache_arguments
from torchinfer.spmd import REPLICATED, STACKED
from torchinfer.spmd_step import SpmdStep
from torchinfer.step_input import StepShape

SHAPE, NUM_PAGES = StepShape(16, 8, 2), 17


def main() -> None:
    config, num_chips, num_cores, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    resolve_device("xla", num_chips)
    kernels.load_ports("xla")
    source = read_source(config, "bfloat16", "int8")

    def place(share: tuple[int, ...], dtype: torch.dtype, dim: int) -> Tensor:
        sharding, whole = spmd._placing(share, dim, num_chips)
        tensor: Tensor = xla_builder.create_placeholder_tensor(tuple(whole), dtype)
        spmd._xlac()._xla_annotate_custom_sharding(tensor, sharding)
        return tensor

    model = divide(source.build(source.config), num_chips)
    for name, share in tensors_of(model.local).items():
        dtype = source.dtype if isinstance(share, nn.Parameter) else share.dtype
        model.tensors[name] = place(tuple(share.shape), dtype, model.divisions[name].place)
    local = local_config(source.config, num_chips)
    pages = kernel_pages(local, torch.int8, num_cores or None)
    page_size = pages.num_tokens if pages else 16
    layers = [
        make_layer(local, NUM_PAGES, page_size, torch.int8, pages, lambda shape, dtype: place(shape, dtype, STACKED))
        for _ in range(local.num_layers)
    ]
    state = [tensor for layer in layers for tensor in layer.tensors]
    ints, last_ids = (place((size,), torch.int32, REPLICATED) for size in (SHAPE.num_forward, SHAPE.num_requests))
    with torch.no_grad():
        logits, hidden, after = SpmdStep(model, page_size, pages).forward(ints, last_ids, state, SHAPE)
    text = with_places(xla_model.get_stablehlo([*after, hidden, logits]))
    types = ["x".join([*map(str, tensor.shape), MLIR_TYPES[tensor.dtype]]) for tensor in state]
    (folder / "module.mlir").write_text(text)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state) // num_chips
    print(json.dumps({"donated": cache_arguments(text, types), "cache_bytes": num_bytes}))


def with_places(text: str) -> str:
    """A program whose arguments say where they are, as what takes them first in its body does."""
    places = dict(re.findall(r'@Sharding\((%arg\d+)\) \{.*?mhlo\.sharding = ("[^"]*")', text))
    lines = text.splitlines(keepends=True)
    at = next(index for index, line in enumerate(lines) if "func.func @main(" in line)
    for argument, found in places.items():
        lines[at] = re.sub(rf"({argument}: tensor<[^>]*>)", rf"\1 {{mhlo.sharding = {found}}}", lines[at])
    return "".join(lines)


if __name__ == "__main__":
    main()
