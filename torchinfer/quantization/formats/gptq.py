"""GPTQ, as AutoGPTQ, GPTQModel and Optimum write it.

    qweight  int32 [I * bits / 32, O]   inputs packed, the first in the lowest bits
    qzeros   int32 [G, O * bits / 32]   outputs packed; in format gptq (v1) 1 less than they are
    scales   [G, O]
    g_idx    int32 [I]                  the group of each input; with desc_act in no order

    element [o, i] = (qweight[i, o] - qzeros[g, o]) * scales[g, o],   g = g_idx[i]

Source: https://github.com/ModelCloud/GPTQModel (nn_modules/qlinear/torch.py, utils/model.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchinfer.quantization.formats.layout import (
    FLOATS,
    Check,
    Format,
    all_zeros,
    column_problems,
    named,
)
from torchinfer.quantization.formats.settings import Settings
from torchinfer.quantization.formats.unpack import group_index, to_int8, unpack_words, words_in_columns
from torchinfer.quantization.scheme import Scheme
from torchinfer.quantization.source import Shape, Source

# How the weights were found and on what they run; zeros and groups are read from the tensors whatever `sym` says.
# Which layers are quantized shows in their names: qweight or weight.
HARMLESS = """
sym damp_percent damp_auto_increment true_sequential static_groups model_name_or_path model_file_base_name dataset
tokenizer batch_size block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize
pad_token_id model_seqlen max_input_length use_cuda_fp16 use_exllama exllama_config disable_exllama
cache_block_outputs backend meta lm_head act_group_aware mse hyb_act quantizer modules_to_not_convert
quant_method quantization_status
"""
V1, V2 = "gptq", "gptq_v2"
# What format v1 leaves out: added to whole words, as GPTQModel does, so that its borrows are undone.
ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class Gptq:
    """A recipe."""

    bits: int
    group: int | None  # None: all inputs
    has_order: bool
    is_v2: bool

    def problems(self, part_rows: Sequence[int], columns: int) -> list[str]:
        """Whole words and groups only."""
        found = column_problems(columns, 32 // self.bits, "the numbers that share an int32")
        found += column_problems(columns, self.group, "the group size") if self.group is not None else []
        words = 32 // self.bits
        if any(rows % words for rows in part_rows):
            found.append(f"outputs {list(part_rows)} are not multiples of {words}: take an unquantized copy")
        return found

    def layout(self, part_rows: Sequence[int], columns: int) -> tuple[Scheme, tuple[Source, ...]]:
        """Four tensors, or three where the groups are in order."""
        group = self.group or columns
        scheme = Scheme(
            name="gptq",
            values=torch.uint8 if self.bits == 4 else torch.int8,
            column_block=self.group,
            has_zero=True,
            has_group_index=self.has_order,
        )
        ints, groups, words = (torch.int32,), columns // group, 32 // self.bits
        values = partial(_values, bits=self.bits)
        zeros = partial(_zeros, bits=self.bits, is_v2=self.is_v2)
        sources = [
            Source(".qweight", "values", ints, lambda rows: ((columns // words, rows),), values),
            Source(".qzeros", "zero", ints, lambda rows: ((groups, rows // words),), zeros),
            Source(".scales", "scale", FLOATS, lambda rows: ((groups, rows),), transposed),
        ]
        if self.has_order:
            index = partial(group_index, group=group)
            sources.append(Source(".g_idx", "group_index", ints, lambda rows: ((columns,),), index))
        return named(scheme), tuple(sources)


def read(settings: Settings, dtypes: Mapping[str, torch.dtype]) -> Format:
    """Also quantize_config.json, which older tools wrote beside config.json."""
    settings.skip(HARMLESS)
    bits = settings.choice("bits", (4, 8))
    group = settings.group_size("group_size", 128)
    has_order = settings.choice("desc_act", (True, False), False)
    written = "checkpoint_format" if settings.raw.get("checkpoint_format") is not None else "format"
    kind = settings.choice(written, (V1, V2), V1)
    settings.skip("checkpoint_format format")
    settings.must_be("method", "gptq")
    settings.must_be("is_marlin_format", False)
    settings.must_be("pack_dtype", "int32")
    overrides = settings.get("dynamic") or {}
    settings.problems += [
        f"dynamic has {pattern!r}, with settings of its own, which is not supported; only patterns of layers that are "
        "not quantized (-:...) are"
        for pattern in overrides
        if not pattern.startswith("-:")
    ]
    recipe = Gptq(bits, group, has_order and group is not None, kind == V2)
    checks: dict[str, Check] = {".bias": all_zeros}
    if not recipe.has_order:
        checks[".g_idx"] = partial(_in_order, group=group)
    return Format("gptq", partial(by_name, recipe, dtypes), checks=checks)


def by_name(recipe: Gptq, dtypes: Mapping[str, torch.dtype], layer: str) -> Gptq | None:
    """A layer that was not quantized has a weight."""
    return None if f"{layer}.weight" in dtypes else recipe


def _values(packed: Tensor, shape: Shape, bits: int) -> Tensor:
    found = words_in_columns(packed, shape)
    return found if bits == 4 else to_int8(found)


def _zeros(packed: Tensor, shape: Shape, bits: int, is_v2: bool) -> Tensor:
    found = unpack_words(packed if is_v2 else packed + ONES[bits], bits).T
    assert tuple(found.shape) == shape, "place() checked it"
    return found if bits == 4 else to_int8(found)


def transposed(scale: Tensor, shape: Shape) -> Tensor:
    """[G, O] -> [O, G]."""
    return scale.T


def _in_order(index: Tensor, group: int | None) -> str | None:
    in_order = torch.arange(len(index), dtype=index.dtype) // (group or len(index))
    if torch.equal(index, in_order):
        return None
    return "has groups that are not in order, but desc_act is false: set desc_act to true in quantization_config"
