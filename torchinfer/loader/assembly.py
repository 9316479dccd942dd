"""Parameters that are being filled, piece by piece, on any device.

A tensor that is quantized on the way fills several tensors of its matrix, with rows in each.

cpu     read straight into the parameter where dtype and layout allow, else converted from staging memory
cuda    copied from pinned staging memory on a stream of its own (device_copies.py); converted on the device

With `delivery` each is handed over as soon as it is complete, so that no more of the model is in memory here than what
is being put together (opening.py): what several processes or chips divide, and what goes to XLA, whose tensors are not
written in parts.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchinfer.device import dtype_name, release_memory
from torchinfer.errors import CheckpointError, DeviceError
from torchinfer.loader.device_copies import DeviceCopies
from torchinfer.loader.memory import Slabs, allocate, padded, trim_heap
from torchinfer.loader.opening import Deliver, OpenTensors
from torchinfer.loader.placement import Placement, packed_matrices, tied_names
from torchinfer.loader.plan import Extent, Piece
from torchinfer.quantization import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where tensors go when they are whole, and which of them may be put together."""

    deliver: Deliver
    tensors: OpenTensors


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
        delivery: Delivery | None = None,
    ) -> None:
        self._model, self._placements, self._dtype, self._device = model, placements, dtype, device
        self._delivery = delivery
        self._copies = DeviceCopies(device, torch.cuda) if device.type == "cuda" else None
        self._empty: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._tied = {name: names for names in tied_names(self._empty) for name in names}
        # Parameter of a placement -> the tensors that it is filled with, where that is not itself.
        self._tensors = {
            name: [f"{name}.{tensor}" for tensor in matrix.specs] for name, matrix in packed_matrices(model).items()
        }
        pieces = (piece for extent in extents for piece in extent.pieces if not piece.is_filler)
        self._remaining = Counter(placements[piece.entry.name].parameter for piece in pieces)
        self._open: dict[str, Tensor] = {}
        self._scales = _scales(model)
        tensors = [tensor for parameter in self._remaining for tensor in self._tensors_of(parameter)]
        self._slabs = Slabs(sum(padded(self._num_bytes(tensor)) for tensor in tensors))
        self._lock = threading.Lock()

    def place_of(self, piece: Piece) -> Tensor | None:
        """Memory to read the piece into, uint8 [num_bytes]; None where it must be converted or sent on. With a
        delivery the first piece of an extent waits for room, see `OpenTensors.enter`."""
        if self._delivery is not None:
            self._delivery.tensors.enter(piece)
        if piece.is_filler:
            return None
        placement = self._placements[piece.entry.name]
        if self._device.type != "cpu" or placement.convert is not None or placement.matrix is not None:
            return None
        if placement.cut is not None and placement.cut.dim != 0:
            return None
        if self._dtype_of(placement.parameter) != (placement.view or piece.entry.dtype):
            return None
        return self._destination(placement.parameter, piece).reshape(-1).view(torch.uint8)

    def relocate(self, pieces: Iterable[Piece]) -> None:
        """Give the parameters that have places for these pieces other memory, with all that has been read: somebody may
        still write to the old one."""
        with self._lock:
            for name in {self._placements[piece.entry.name].parameter for piece in pieces}:
                self._open[name] = self._allocate(name).copy_(self._open[name])

    def put(self, piece: Piece, content: Tensor, is_part: bool = False) -> None:
        """Convert a piece, uint8 [num_bytes], and bring it to its place; it may be overwritten after `wait`, or when
        `release` gives back its buffer.
        `is_part`: of its columns there are only this process's."""
        if piece.is_filler:
            return
        placement = self._placements[piece.entry.name]
        cut = placement.cut if placement.cut is not None and placement.cut.dim != 0 else None
        shape = list(piece.shape)
        if is_part and cut is not None:
            shape[cut.dim] = cut.stop - cut.start
        value = content.view(piece.entry.dtype).view(shape)
        if placement.view is not None:
            value = value.view(placement.view)
        if self._copies is not None and value.device.type == "cpu":
            value = self._copies.to_device(value)
        if placement.convert is not None:
            value = _convert(piece.entry.name, placement.convert, value)
        if cut is not None and not is_part:
            value = value.narrow(cut.dim, cut.start, cut.stop - cut.start)
        if placement.matrix is None:
            _check_range(piece.entry.name, value, self._dtype_of(placement.parameter))
            self._destination(placement.parameter, piece).copy_(value, non_blocking=True)
            return
        self._pack(placement, placement.matrix, piece, value)

    def _pack(self, placement: Placement, matrix: QuantizedMatrix, piece: Piece, value: Tensor) -> None:
        """Quantize a piece's numbers into their place."""
        blocks = {}
        for tensor, spec in matrix.specs.items():
            assert spec.row_block is not None, "what belongs to no rows cannot be packed in rows"
            blocks[tensor] = spec.row_block
        name = placement.parameter
        places = {tensor: self._destination(f"{name}.{tensor}", piece, block) for tensor, block in blocks.items()}
        placement.pack(value, places)

    def complete(self, pieces: Iterable[Piece]) -> None:
        """Note that these pieces are in place, and give the model the parameters that are full now."""
        placements = [self._placements[piece.entry.name] for piece in pieces if not piece.is_filler]
        if self._device.type != "cuda" and any(placement.convert is not None for placement in placements):
            trim_heap()  # of what they were converted through
        for placement in placements:
            parameter = placement.parameter
            self._remaining[parameter] -= 1
            if self._remaining[parameter] == 0:
                for tensor in self._tensors_of(parameter):
                    self._assign(tensor, self._open.pop(tensor))
                if self._delivery is not None:
                    self._delivery.tensors.close(parameter)

    def wait(self) -> None:
        """Until all that was put has left the host's memory."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def release(self, buffer: Tensor, give_back: Callable[[Tensor], None]) -> None:
        """Give a buffer back when all that was put has left it: now, or in a later `collect`."""
        if self._copies is not None:
            self._copies.release(buffer, give_back)
            return
        self.wait()
        give_back(buffer)

    def collect(self) -> None:
        """Give back released buffers, as far as they are copied."""
        if self._copies is not None:
            self._copies.collect()

    def finish(self) -> None:
        """Assign parameters without values; see that nothing is left."""
        if self._copies is not None:
            self.wait()
            self._copies.collect()
            release_memory(self._device)  # of the copy stream, which nobody else can use
        filled = {placement.parameter for placement in self._placements.values()}
        for parameter in filled - self._remaining.keys():
            for tensor in self._tensors_of(parameter):
                self._assign(tensor, torch.empty(self._empty[tensor].shape, dtype=self._dtype_of(tensor)))
        assert not self._open and not any(self._remaining.values()), "place() lists every tensor"
        left = [name for name, tensor in self._model.state_dict(keep_vars=True).items() if tensor.is_meta]
        assert not left, f"nothing filled {left}"

    def _dtype_of(self, parameter: str) -> torch.dtype:
        return _held_dtype(self._empty[parameter], self._dtype)

    def _num_bytes(self, parameter: str) -> int:
        return math.prod(self._empty[parameter].shape) * self._dtype_of(parameter).itemsize

    def _tensors_of(self, parameter: str) -> list[str]:
        return self._tensors.get(parameter, [parameter])

    def _destination(self, tensor: str, piece: Piece, row_block: int = 1) -> Tensor:
        """The view of the tensor that the piece fills; it is allocated when it is first asked for. The tensor has a row
        for `row_block` rows of the piece."""
        placement = self._placements[piece.entry.name]
        with self._lock:
            if tensor not in self._open:
                self._open[tensor] = self._allocate(tensor)
            part = placement.part(self._open[tensor], row_block)
        if not piece.entry.shape or placement.convert is not None:
            return part
        first = placement.rows_of(piece.entry.shape)[0]
        return part[(piece.first_row - first) // row_block : -(-(piece.last_row - first) // row_block)]

    def _allocate(self, parameter: str) -> Tensor:
        shape, dtype, num_bytes = self._empty[parameter].shape, self._dtype_of(parameter), self._num_bytes(parameter)
        try:
            if self._device.type != "cpu" or not num_bytes:
                return torch.empty(shape, dtype=dtype, device=self._device)
            # What is handed over is freed one by one.
            memory = self._slabs.allocate(num_bytes) if self._delivery is None else allocate(num_bytes)
            return memory.view(dtype).view(shape)
        except (RuntimeError, DeviceError) as error:  # CUDA's OutOfMemoryError is a RuntimeError
            raise DeviceError(
                f"{self._device} has no memory for {parameter}, {num_bytes} bytes: {error}; use a device with more "
                "memory, a smaller dtype, or a smaller model"
            ) from error

    def _check_scales(self, parameter: str, value: Tensor) -> None:
        """All at once; the tensor is named only where that fails, because there may be thousands."""
        try:
            check_scale(parameter, value)
        except CheckpointError:
            for name, placement in self._placements.items():
                if placement.parameter == parameter:
                    check_scale(name, placement.part(value))
            raise

    def _assign(self, parameter: str, value: Tensor) -> None:
        if parameter in self._scales:
            self._check_scales(parameter, value)
        value = value.to(self._device) if self._delivery is None else self._delivery.deliver.send(parameter, value)
        if isinstance(self._empty[parameter], nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for name in self._tied[parameter]:
            module, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(module), attribute, value)


def parameter_bytes(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """What each parameter and persistent buffer takes when it is loaded; a matrix that is packed, all its tensors."""
    empty: dict[str, Tensor] = model.state_dict(keep_vars=True)
    found = {name: tensor.numel() * _held_dtype(tensor, dtype).itemsize for name, tensor in empty.items()}
    for name, matrix in packed_matrices(model).items():
        found[name] = sum(found[f"{name}.{tensor}"] for tensor in matrix.specs)
    return found


def _held_dtype(empty: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if isinstance(empty, nn.Parameter) and empty.is_floating_point() else empty.dtype


def _convert(name: str, convert: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    try:
        return convert(value)
    except ValueError as error:
        raise CheckpointError(f"tensor {name!r} has {error}") from error


def _check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse what would become infinite: float16 ends at 65504, the wider dtypes of checkpoints far beyond."""
    if dtype != torch.float16 or tensor.dtype == dtype or not tensor.numel():
        return
    limit = torch.finfo(dtype).max
    # aminmax would copy a tensor that is not contiguous.
    bounds = torch.aminmax(tensor) if tensor.is_contiguous() else (tensor.amin(), tensor.amax())
    low, high = (bound.item() for bound in bounds)
    if not (low >= -limit and high <= limit):
        raise CheckpointError(
            f"tensor {name!r} has values from {low} to {high}; float16 holds {-limit} to {limit}: use dtype bfloat16 "
            f"or float32 (the checkpoint has {dtype_name(tensor.dtype)})"
        )


def _scales(model: nn.Module) -> set[str]:
    matrices = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}
    return {f"{name}.{tensor}" for name in matrices for tensor in ("scale", "input_scale")}


def check_scale(name: str, scale: Tensor) -> None:
    """Refuse scales that turn weights into what is not finite, or into nothing; `name` is what is wrong then."""
    if not scale.numel():
        return
    low, high = (bound.item() for bound in torch.aminmax(scale))  # NaN if there is one
    if not (low > 0 and high < math.inf):
        raise CheckpointError(
            f"{name!r} has scales from {low} to {high}, but they must be positive and finite: the checkpoint has "
            "numbers that are not finite, or was quantized wrongly; take another copy of it"
        )
