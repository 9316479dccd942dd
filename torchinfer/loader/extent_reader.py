"""The bytes of one extent: forward through one handle, into their places, and a buffer for those that have none.

    buffer   | up to 4095 bytes | the extent, gaps included | ... |   its first byte is `base_of` in the file

`places` has uint8 memory for each piece of the extent, or None for those that go into the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from torchinfer.loader.plan import Extent, Piece
from torchinfer.loader.retry import PersistentReader
from torchinfer.loader.source import ALIGNMENT

OnBytes = Callable[[int], None]  # so many bytes have come
OnContent = Callable[[int, Tensor], None]  # the file has these bytes, uint8 [n], at this offset


def base_of(extent: Extent) -> int:
    """Offset in the file of a buffer's first byte."""
    return extent.begin // ALIGNMENT * ALIGNMENT


def read_extent(
    reader: PersistentReader,
    extent: Extent,
    buffer: Tensor | None,
    places: list[Tensor | None],
    on_bytes: OnBytes,
    on_content: OnContent,
) -> None:
    """Through the page cache; raises as `PersistentReader.read_into` and `check`."""
    for begin, memory in _targets(extent, buffer, places):
        reader.read_into(begin, memory.numpy().data, on_bytes)
        on_content(begin, memory)
    reader.check()


def read_extent_directly(
    reader: PersistentReader,
    extent: Extent,
    buffer: Tensor,
    places: list[Tensor | None],
    on_bytes: OnBytes,
    on_content: OnContent,
) -> None:
    """Around the page cache: all through the buffer, which is aligned; raises as `read_aligned` and `check`."""
    base = base_of(extent)
    for begin, end in _runs(list(extent.pieces)):
        first, last = begin // ALIGNMENT * ALIGNMENT, -(-end // ALIGNMENT) * ALIGNMENT
        reader.read_aligned(first, buffer[first - base : last - base].numpy().data, on_bytes)
        on_content(begin, buffer[begin - base : end - base])
    reader.check()
    for piece, place in zip(extent.pieces, places, strict=True):
        if place is not None:
            place.copy_(buffer[piece.offset - base : piece.end - base])


def _runs(pieces: list[Piece]) -> list[tuple[int, int]]:
    """[begin, end) of the bytes of neighbouring pieces taken together."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece.offset:
            runs[-1] = (runs[-1][0], piece.end)
        else:
            runs.append((piece.offset, piece.end))
    return runs


def _targets(extent: Extent, buffer: Tensor | None, places: list[Tensor | None]) -> Iterator[tuple[int, Tensor]]:
    """(first byte in the file, memory), forward: places one by one, staged neighbours together."""
    base = base_of(extent)
    staged: list[Piece] = []
    for piece, place in [*zip(extent.pieces, places, strict=True), (None, None)]:
        if piece is not None and place is None:
            staged.append(piece)
            continue
        for begin, end in _runs(staged):
            assert buffer is not None
            yield begin, buffer[begin - base : end - base]
        staged = []
        if piece is not None and place is not None:
            yield piece.offset, place
