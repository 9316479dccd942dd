"""A checkpoint into a model that several chips of XLA divide: each tensor is put together, quantized, on the host, cut,
and sent to the chips, a share to each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchinfer import spmd
from torchinfer.device import synchronize
from torchinfer.loader.assembly import parameter_bytes
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.opening import Deliver
from torchinfer.loader.options import LoadOptions
from torchinfer.loader.weights import HOST, build_empty, load_weights
from torchinfer.models.config import ModelConfig
from torchinfer.parallel import DividedModel, Shard, divide, tensors_of


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
    """Build the model of a config without `partition_problems`, divide it, and send its tensors to the chips. They are
    quantized as on one chip, bit by bit.

    Raises what `load_model` raises, and:
        ConfigError: the chips cannot divide the quantized matrices.
    """
    whole, checkpoint = build_empty(checkpoint, model_config, device, quantization, moe_mode, moe_capacity_factor)
    model = divide(whole, num_chips)

    def send(name: str, tensor: Tensor) -> Tensor:
        division = model.divisions[name]
        found = spmd.put(lambda chip: division.of(tensor, Shard(chip, num_chips)), division.place, num_chips)
        synchronize(device)  # or what is on its way to the chips would stay on the host, beyond any limit
        return found

    load_weights(whole, checkpoint, dtype, HOST, progress, options, deliver=Deliver(send, _largest_put(model, dtype)))
    loaded = whole.state_dict()
    for name, tensor in tensors_of(whole).items():
        model.tensors[name] = tensor if name in loaded else send(name, tensor)  # what no checkpoint has: constants
    whole.to_empty(device="meta")  # or it would hold on to what chips exchange for packed matrices
    return model


def _largest_put(model: DividedModel, dtype: torch.dtype) -> int:
    """Bytes of the shares of a tensor for all chips, at most, where they are not views of it."""
    sizes, whole, local = parameter_bytes(model.local, dtype), tensors_of(model.whole), tensors_of(model.local)

    def is_copied(name: str) -> bool:
        division = model.divisions[name]
        is_rows = division.dim == 0 and len(division.parts) == 1
        is_view = is_rows and len(local[name]) * model.num_chips == len(whole[name])
        return division.place != spmd.REPLICATED and not is_view

    return max((sizes[name] for name in local if name in sizes and is_copied(name)), default=0) * model.num_chips
