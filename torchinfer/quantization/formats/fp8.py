"""FP8 (e4m3fn) without compressed-tensors: as DeepSeek and Qwen publish it, AutoFP8, and FBGEMM.

    weight             float8_e4m3fn [O, I]
    weight_scale_inv   [ceil(O / block), ceil(I / block)], or one number    (in spite of its name it is multiplied)
    weight_scale       one number (AutoFP8), or [O, 1] (FBGEMM)
    input_scale        one number, where activation_scheme is static; transformers writes activation_scale

Sources: https://github.com/deepseek-ai/DeepSeek-V3 (inference/kernel.py), transformers integrations/finegrained_fp8.py
and integrations/fbgemm_fp8.py, https://github.com/neuralmagic/AutoFP8.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from torchinfer.quantization.formats.layout import (
    FLOATS,
    SCALAR,
    Format,
    input_scale_source,
    is_listed,
    named,
    own_row_block,
    scale_source,
)
from torchinfer.quantization.formats.settings import Settings
from torchinfer.quantization.scheme import Scheme
from torchinfer.quantization.source import Shape, Source

logger = logging.getLogger(__name__)

FP8 = (torch.float8_e4m3fn,)
LARGEST_BOUND = torch.finfo(torch.float32).max
UNQUANTIZED = (*FLOATS, torch.float64)
SCALES_NOTE = (
    "scales of inputs are not rounded to powers of two, as scale_fmt ue8m0 would have them: nearer to the inputs"
)
TOKENS_NOTE = "inputs are rounded with a scale for each token, not one for all tokens of a step: nearer to them"


@dataclass(frozen=True, slots=True)
class Fp8:
    """A recipe."""

    scale: str  # suffixes of tensors
    input_scale: str | None = None  # None: each token has its own
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale; None: one number, or one an output
    input_bound: float | None = None

    def problems(self, part_rows: Sequence[int], columns: int) -> list[str]:
        """Every shape can be read."""
        return []

    def layout(self, part_rows: Sequence[int], columns: int) -> tuple[Scheme, tuple[Source, ...]]:
        """Two tensors, or three with a scale for the inputs."""
        values = Source(".weight", "values", FP8)
        if self.block is not None:
            block_rows, block_columns = self.block
            row_block, groups = own_row_block(part_rows, block_rows), -(-columns // block_columns)
            scheme = Scheme(
                name="fp8", values=FP8[0], row_block=row_block, column_block=block_columns, activations="fp8"
            )
            repeats = block_rows if row_block == 1 else 1
            scale = scale_source(self.scale, lambda rows: ((-(-rows // block_rows), groups),), repeats)
            return named(scheme), (values, scale)
        scheme = Scheme(
            name="fp8",
            values=FP8[0],
            activations="fp8",
            has_input_scale=self.input_scale is not None,
            input_bound=self.input_bound,
        )
        sources = [values, scale_source(self.scale, _one_or_rows)]
        sources += [input_scale_source(self.input_scale)] if self.input_scale is not None else []
        return named(scheme), tuple(sources)


def read(settings: Settings, dtypes: Mapping[str, torch.dtype]) -> Format:
    """quant_method fp8."""
    settings.skip("ignored_layers modules_to_not_convert quant_method quantization_status")
    settings.must_be("fmt", "e4m3", "e4m3fn", "float8_e4m3fn")
    settings.must_be("modules_to_convert", [])
    settings.must_be("dequantize", False)
    settings.must_be("expert_dtype", "fp8")
    block = settings.pair("weight_block_size")
    is_static = settings.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    if block is not None and is_static:
        settings.problems.append("activation_scheme='static' with weight_block_size is not supported; only dynamic is")
    suffixes = {name[name.rfind(".") :] for name in dtypes}
    scale = ".weight_scale_inv" if block is not None or ".weight_scale_inv" in suffixes else ".weight_scale"
    input_scale = ".activation_scale" if ".activation_scale" in suffixes else ".input_scale"
    recipe = Fp8(scale, input_scale if is_static else None, block)
    ignored = (*settings.names("modules_to_not_convert"), *settings.names("ignored_layers"))
    # How scales of weights were rounded changes nothing: the tensors hold them as numbers.
    has_rounded_scales = settings.get("scale_fmt") == "ue8m0"
    notes: tuple[str, ...] = ()
    if not is_static:
        notes = (TOKENS_NOTE,) if block is None else (SCALES_NOTE,) if has_rounded_scales else ()
    return Format("fp8", partial(by_dtype, recipe, dtypes, ignored), notes=notes)


def read_fbgemm(settings: Settings, dtypes: Mapping[str, torch.dtype]) -> Format:
    """quant_method fbgemm_fp8: a scale for each output; inputs beyond activation_scale_ub are cut off."""
    settings.skip("quant_method quantization_status")
    bound = settings.get("activation_scale_ub")
    bound = 1200.0 if bound is None else bound
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound <= LARGEST_BOUND:
        settings.problems.append(f"activation_scale_ub={bound!r} must be a positive number that float32 holds")
        bound = 1.0
    recipe = Fp8(".weight_scale", input_bound=float(bound))
    ignored = settings.names("modules_to_not_convert")
    return Format("fbgemm_fp8", partial(by_dtype, recipe, dtypes, ignored), skipped=(".input_scale_ub",))


def by_dtype(recipe: Fp8, dtypes: Mapping[str, torch.dtype], ignored: Sequence[str], layer: str) -> Fp8 | None:
    """What is there tells; checkpoints do not always list the layers that are not quantized (routers, the head)."""
    dtype = dtypes.get(f"{layer}.weight")
    is_quantized = not is_listed(layer, ignored) if dtype is None else dtype not in UNQUANTIZED
    return recipe if is_quantized else None


def _one_or_rows(rows: int) -> tuple[Shape, ...]:
    return (*SCALAR, (rows, 1), (rows,))
