"""A checkpoint into a model that several chips of XLA divide: each tensor is put together, quantized, on the host, cut,
and sent to the chips, a share to each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from torchinfer import spmd
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.weights import LoadOptions, build_empty, load_weights
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import DividedModel, Division, Shard, connect, divide

HOST = torch.device("cpu")


def load_divided(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    num_chips: int,
    *,
    options: LoadOptions,
    quantization: str | Mapping[str, str] | None = None,
    moe_mode: str = "dropless",
    moe_capacity_factor: float = 1.25,
    progress: bool = False,
) -> DividedModel:
    """Build the model of a config without `partition_problems`, divide and fill it; its tensors are those that all
    chips have together, its sums those of all chips. As quantized as on one chip, bit by bit.

    Raises what `load_model` raises, and:
        ConfigError: the chips cannot divide the quantized matrices.
    """
    whole, checkpoint = build_empty(checkpoint, model_config, device, quantization, moe_mode, moe_capacity_factor)
    model = divide(whole, num_chips)

    def deliver(name: str, tensor: Tensor) -> Tensor:
        return _put(model.divisions[name], num_chips, tensor)

    load_weights(whole, checkpoint, dtype, HOST, progress, options, deliver=deliver)
    _adopt(model)
    rows = torch.arange(num_chips, dtype=torch.int32) * model.local.embedding.weight.shape[0] // num_chips
    model.divisions["embedding.first_row"] = Division(0)
    first_row = spmd.put(lambda chip: rows[chip : chip + 1], 0, num_chips)
    connect(model.local, partial(spmd.all_reduce, num_chips=num_chips), first_row)
    return model


def _put(division: Division, num_chips: int, tensor: Tensor) -> Tensor:
    return spmd.put(lambda chip: division.of(tensor, Shard(chip, num_chips)), division.place, num_chips)


def _adopt(model: DividedModel) -> None:
    """Give the part that computes what was loaded, and its constants."""
    loaded = model.whole.state_dict(keep_vars=True)
    for name, division in model.divisions.items():
        owner, _, attribute = name.rpartition(".")
        module = model.local.get_submodule(owner)
        value = loaded[name] if name in loaded else _put(division, model.num_chips, getattr(module, attribute))
        setattr(module, attribute, value)
