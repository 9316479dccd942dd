"""From a checkpoint into a model's parameters: everything is checked, then tensor after tensor is read and placed.

On the host there are never more than the tensor being read and, where the device's memory is not the host's, what is
being assembled.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchinfer.errors import CheckpointError, DeviceError, raise_all
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.placement import Placement, dtype_name, place, tied_names
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load took. `num_bytes` as read, in the dtypes of the files."""

    seconds: float
    num_bytes: int
    num_tensors: int


def load_model(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    moe_mode: str = "dropless",
    moe_capacity_factor: float = 1.25,
    progress: bool = False,
) -> Decoder:
    """Build the model of a config and fill it.

    Raises:
        CheckpointError: the checkpoint does not fit the model; with all that does not.
        ConfigError: `moe_mode` does not fit the model.
        DeviceError: the device's memory does not suffice.
    """
    with torch.device("meta"):
        model = build_model(model_config, moe_mode, moe_capacity_factor)
    load_weights(model, checkpoint, dtype, device, progress)
    return model.eval()


def load_weights(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: bool
) -> LoadReport:
    """Give every parameter of a model (usually on meta) its values, on `device`; floats become `dtype`.

    Persistent buffers are filled likewise and keep their dtype; other buffers are moved to the device. Each file is
    read once, forward. A model whose load failed is unusable.

    Raises:
        CheckpointError: before any data is read, with all missing, unexpected and unfit tensors; later if a file ends
            early or a value is beyond the range of `dtype`.
        DeviceError: the device's memory does not suffice.
    """
    start = time.perf_counter()
    placements, problems = place(model, checkpoint.tensors)
    raise_all(problems, CheckpointError, f"{checkpoint.path} does not fit {_architecture(checkpoint)}")
    assembly = _Assembly(model, placements.values(), dtype, device)
    num_bytes = sum(checkpoint.tensors[name].num_bytes for name in placements)
    is_shown = progress and sys.stderr.isatty()
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="weights", disable=not is_shown) as bar:
        for name, tensor in checkpoint.stream(placements):
            assembly.put(name, placements[name], tensor)
            bar.update(tensor.nbytes)
            del tensor  # or it would live while the next one is read
    assembly.finish()
    seconds = time.perf_counter() - start
    gigabytes = num_bytes / 1e9
    rate = gigabytes / seconds
    logger.info("loaded %d tensors, %.3f GB in %.2f s: %.2f GB/s", len(placements), gigabytes, seconds, rate)
    return LoadReport(seconds, num_bytes, len(placements))


class _Assembly:
    """The parameters that are being filled, and how many of their tensors are still to come."""

    def __init__(
        self, model: nn.Module, placements: Iterable[Placement], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._device = device
        # Writing into a part of an XLA tensor records a graph instead of writing; so parameters go there when full.
        self._workplace = torch.device("cpu") if device.type == "xla" else device
        self._empty: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._tied = {name: names for names in tied_names(self._empty) for name in names}
        self._remaining = Counter(placement.parameter for placement in placements)
        self._open: dict[str, Tensor] = {}

    def put(self, name: str, placement: Placement, tensor: Tensor) -> None:
        """Copy a checkpoint tensor to its place."""
        parameter = placement.parameter
        if parameter not in self._open:
            self._open[parameter] = self._allocate(parameter)
        part = placement.part(self._open[parameter])
        _check_range(name, tensor, part.dtype)
        value = tensor if placement.target.transform is None else placement.target.transform(tensor)
        assert value.shape == part.shape, f"the transform of {name} changes its shape"
        part.copy_(value)
        self._remaining[parameter] -= 1
        if self._remaining[parameter] == 0:
            self._assign(parameter, self._open.pop(parameter).to(self._device))

    def finish(self) -> None:
        """Move the buffers that no checkpoint has, and see that nothing was left out."""
        assert not self._open and not any(self._remaining.values()), "place() lists every tensor"
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        left = [name for name, tensor in self._model.state_dict(keep_vars=True).items() if tensor.is_meta]
        assert not left, f"nothing filled {left}"

    def _allocate(self, parameter: str) -> Tensor:
        empty = self._empty[parameter]
        dtype = self._dtype if isinstance(empty, nn.Parameter) and empty.is_floating_point() else empty.dtype
        try:
            return torch.empty(empty.shape, dtype=dtype, device=self._workplace)
        except RuntimeError as error:  # CUDA's OutOfMemoryError is one, the CPU's has no class of its own
            num_bytes = empty.numel() * dtype.itemsize
            raise DeviceError(
                f"{self._workplace} has no memory for {parameter}, {num_bytes} bytes: {error}; use a device with more "
                "memory, a smaller dtype, or a smaller model"
            ) from error

    def _assign(self, parameter: str, value: Tensor) -> None:
        if isinstance(self._empty[parameter], nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for name in self._tied[parameter]:
            module, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(module), attribute, value)


def _check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse what would become infinite: float16 ends at 65504, the wider dtypes of checkpoints far beyond."""
    if dtype != torch.float16 or tensor.dtype == dtype or not tensor.numel():
        return
    limit = torch.finfo(dtype).max
    low, high = (bound.item() for bound in torch.aminmax(tensor))
    if not (low >= -limit and high <= limit):
        raise CheckpointError(
            f"tensor {name!r} has values from {low} to {high}; float16 holds {-limit} to {limit}: use dtype bfloat16 "
            f"or float32 (the checkpoint has {dtype_name(tensor.dtype)})"
        )


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "the model"
