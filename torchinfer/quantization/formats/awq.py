"""AWQ in AutoAWQ's GEMM layout.

    qweight  int32 [I, O / 8]   eight outputs in a word, in the order 0 2 4 6 1 3 5 7, the first in the lowest bits
    qzeros   int32 [G, O / 8]   likewise
    scales   [G, O]

    element [o, i] = (qweight[i, o] - qzeros[g, o]) * scales[g, o],   g = i // group_size

Source: https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py, awq/utils/packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchinfer.quantization.formats.gptq import HARMLESS, transposed
from torchinfer.quantization.formats.layout import FLOATS, Format, all_zeros, column_problems, named
from torchinfer.quantization.formats.settings import Settings
from torchinfer.quantization.formats.unpack import unpack_words
from torchinfer.quantization.scheme import Scheme
from torchinfer.quantization.source import Shape, Source

BITS, WORD = 4, 8
# Where in a word each output is.
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class Awq:
    """A recipe."""

    group: int | None  # None: all inputs

    def problems(self, part_rows: Sequence[int], columns: int) -> list[str]:
        """Whole words and groups only."""
        found = column_problems(columns, self.group or 2, "the group size")
        if any(rows % WORD for rows in part_rows):
            found.append(f"outputs {list(part_rows)} are not multiples of {WORD}: take an unquantized copy")
        return found

    def layout(self, part_rows: Sequence[int], columns: int) -> tuple[Scheme, tuple[Source, ...]]:
        """Three tensors."""
        groups, ints = columns // (self.group or columns), (torch.int32,)
        scheme = Scheme(name="awq", values=torch.uint8, column_block=self.group, has_zero=True)
        return named(scheme), (
            Source(".qweight", "values", ints, lambda rows: ((columns, rows // WORD),), _values),
            Source(".qzeros", "zero", ints, lambda rows: ((groups, rows // WORD),), _numbers),
            Source(".scales", "scale", FLOATS, lambda rows: ((groups, rows),), transposed),
        )


def read(settings: Settings, dtypes: Mapping[str, torch.dtype]) -> Format:
    """Also quant_config.json, which older tools wrote beside config.json, with w_bit and q_group_size."""
    settings.skip(f"{HARMLESS} do_fuse fuse_max_seq_len modules_to_fuse")
    settings.choice("w_bit" if "w_bit" in settings.raw else "bits", (BITS,), BITS)
    group = settings.group_size("q_group_size" if "q_group_size" in settings.raw else "group_size", 128)
    settings.choice("version" if settings.raw.get("version") is not None else "format", ("gemm",), "gemm")
    settings.skip("bits group_size format version")
    settings.must_be("zero_point", True)
    settings.must_be("desc_act", False)
    settings.must_be("method", "awq")
    settings.must_be("pack_dtype", "int32")
    recipe = Awq(group)
    return Format("awq", partial(by_name, recipe, dtypes), checks={".bias": all_zeros})


def by_name(recipe: Awq, dtypes: Mapping[str, torch.dtype], layer: str) -> Awq | None:
    """A layer that was not quantized has a weight."""
    return None if f"{layer}.weight" in dtypes else recipe


def _numbers(packed: Tensor, shape: Shape) -> Tensor:
    """int32 [R, O / 8] -> uint8 [O, R]."""
    return unpack_words(packed, BITS).view(*packed.shape, WORD)[..., PLACES].flatten(1).T


def _values(packed: Tensor, shape: Shape) -> Tensor:
    """int32 [I, O / 8] -> uint8 [O, I / 2]. Two inputs meet in a byte before the rows become columns: half as much is
    moved, and nothing is unpacked."""
    found = packed.contiguous().view(torch.uint8)
    even, odd = found[0::2], found[1::2]
    pairs = torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 240)), -1)  # [I / 2, O / 2, 2], by place
    return pairs.flatten(1).T.contiguous().view(-1, WORD, len(even))[:, PLACES].view(shape)
