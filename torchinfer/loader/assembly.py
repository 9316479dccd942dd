"""Parameters that are being filled, piece by piece, on any device.

cpu     read straight into the parameter where dtype and layout allow, else converted from staging memory
cuda    copied from pinned staging memory on the current stream; converted on the device
xla     an XLA tensor is not written in parts: the pieces go to the device and are put together there
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from torchinfer.device import flush
from torchinfer.errors import CheckpointError, DeviceError
from torchinfer.loader.memory import Slabs, padded
from torchinfer.loader.placement import Placement, dtype_name, tied_names
from torchinfer.loader.plan import Extent, Piece


class Assembly:
    """Gives a model its parameters. `place_of` is for any thread, everything else for one.

    Raises:
        DeviceError: the device's memory does not suffice.
    """

    def __init__(
        self,
        model: nn.Module,
        placements: Mapping[str, Placement],
        extents: Iterable[Extent],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._model, self._placements, self._dtype, self._device = model, placements, dtype, device
        self._empty: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._tied = {name: names for names in tied_names(self._empty) for name in names}
        pieces = (piece for extent in extents for piece in extent.pieces if not piece.is_filler)
        self._remaining = Counter(placements[piece.entry.name].parameter for piece in pieces)
        self._open: dict[str, Tensor] = {}
        self._parts: dict[str, list[tuple[int, Tensor]]] = {}  # XLA: (first of the parameter's values, the values)
        self._slabs = Slabs(sum(padded(self._num_bytes(parameter)) for parameter in self._remaining))
        self._lock = threading.Lock()

    def place_of(self, piece: Piece) -> Tensor | None:
        """Memory to read the piece into, uint8 [num_bytes]; None where it must be converted or sent on."""
        if piece.is_filler:
            return None
        placement = self._placements[piece.entry.name]
        if self._device.type != "cpu" or placement.target.transform is not None:
            return None
        if placement.cut is not None and placement.cut.dim != 0:
            return None
        if self._dtype_of(placement.parameter) != piece.entry.dtype:
            return None
        return self._destination(piece).reshape(-1).view(torch.uint8)

    def put(self, piece: Piece, content: Tensor, is_part: bool = False) -> None:
        """Convert a piece, uint8 [num_bytes], and bring it to its place; it may be overwritten after `wait`.
        `is_part`: of its columns there are only this process's."""
        if piece.is_filler:
            return
        placement = self._placements[piece.entry.name]
        cut = placement.cut if placement.cut is not None and placement.cut.dim != 0 else None
        shape = list(piece.shape)
        if is_part and cut is not None:
            shape[cut.dim] = cut.stop - cut.start
        value = content.view(piece.entry.dtype).view(shape)
        if self._device.type == "cuda":
            value = value.to(self._device, non_blocking=True)
        _check_range(piece.entry.name, value, self._dtype_of(placement.parameter))
        if placement.target.transform is not None:
            value = placement.target.transform(value)
            assert value.shape == piece.shape, f"the transform of {piece.entry.name} changes its shape"
        if cut is not None and not is_part:
            value = value.narrow(cut.dim, cut.start, cut.stop - cut.start)
        if self._device.type == "xla":
            self._send(piece, value)
        else:
            self._destination(piece).copy_(value, non_blocking=True)

    def complete(self, pieces: Iterable[Piece]) -> None:
        """Note that these pieces are in place, and give the model the parameters that are full now."""
        for piece in pieces:
            if piece.is_filler:
                continue
            parameter = self._placements[piece.entry.name].parameter
            self._remaining[parameter] -= 1
            if self._remaining[parameter] == 0:
                self._assign(parameter, self._take(parameter))

    def wait(self) -> None:
        """Until all that was put has left the host's memory."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        elif self._device.type == "xla":
            flush(self._device)

    def finish(self) -> None:
        """Assign parameters without values and move the buffers that no checkpoint has; see that nothing is left."""
        filled = {placement.parameter for placement in self._placements.values()}
        for parameter in filled - self._remaining.keys():
            self._assign(parameter, torch.empty(self._empty[parameter].shape, dtype=self._dtype_of(parameter)))
        assert not self._open and not any(self._remaining.values()), "place() lists every tensor"
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        left = [name for name, tensor in self._model.state_dict(keep_vars=True).items() if tensor.is_meta]
        assert not left, f"nothing filled {left}"

    def _dtype_of(self, parameter: str) -> torch.dtype:
        empty = self._empty[parameter]
        return self._dtype if isinstance(empty, nn.Parameter) and empty.is_floating_point() else empty.dtype

    def _num_bytes(self, parameter: str) -> int:
        return math.prod(self._empty[parameter].shape) * self._dtype_of(parameter).itemsize

    def _destination(self, piece: Piece) -> Tensor:
        """The view of the parameter that the piece fills; the parameter is allocated when it is first asked for."""
        placement = self._placements[piece.entry.name]
        with self._lock:
            if placement.parameter not in self._open:
                self._open[placement.parameter] = self._allocate(placement.parameter)
            part = placement.part(self._open[placement.parameter])
        if not piece.entry.shape or placement.target.transform is not None:
            return part
        first = placement.rows_of(piece.entry.shape)[0]
        return part[piece.first_row - first : piece.last_row - first]

    def _allocate(self, parameter: str) -> Tensor:
        shape, dtype, num_bytes = self._empty[parameter].shape, self._dtype_of(parameter), self._num_bytes(parameter)
        try:
            if self._device.type == "cpu" and num_bytes:
                return self._slabs.allocate(num_bytes).view(dtype).view(shape)
            return torch.empty(shape, dtype=dtype, device=self._device)
        except (RuntimeError, DeviceError) as error:  # CUDA's OutOfMemoryError is a RuntimeError
            raise DeviceError(
                f"{self._device} has no memory for {parameter}, {num_bytes} bytes: {error}; use a device with more "
                "memory, a smaller dtype, or a smaller model"
            ) from error

    def _send(self, piece: Piece, value: Tensor) -> None:
        """Keep a piece on the XLA device. It is copied on the host first, because the transfer may read it later."""
        placement = self._placements[piece.entry.name]
        host = value.to(self._dtype_of(placement.parameter), copy=True).contiguous()
        numbers = torch.arange(self._empty[placement.parameter].numel(), device="meta")
        destination = placement.part(numbers.view(self._empty[placement.parameter].shape))
        first = int(destination.storage_offset())
        first += (piece.first_row - _first_row(placement, piece)) * math.prod(destination.shape[1:])
        self._parts.setdefault(placement.parameter, []).append((first, host.view(-1).to(self._device)))

    def _take(self, parameter: str) -> Tensor:
        if self._device.type != "xla":
            return self._open.pop(parameter)
        parts = [part for _, part in sorted(self._parts.pop(parameter), key=lambda part: part[0])]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(self._empty[parameter].shape)

    def _assign(self, parameter: str, value: Tensor) -> None:
        value = value.to(self._device)
        if isinstance(self._empty[parameter], nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for name in self._tied[parameter]:
            module, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(module), attribute, value)


def _first_row(placement: Placement, piece: Piece) -> int:
    return placement.rows_of(piece.entry.shape)[0] if piece.entry.shape else 0


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
