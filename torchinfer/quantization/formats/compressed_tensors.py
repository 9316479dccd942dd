"""compressed-tensors, as LLM Compressor writes it.

    weight              int8 or float8_e4m3fn [O, I] (formats int-quantized, float-quantized, naive-quantized)
    weight_packed       int32 [O, I * bits / 32], numbers + 2^(bits - 1), the first in the lowest bits (pack-quantized)
    weight_scale        one number, [O, 1], [O, G] or [blocks of outputs, blocks of inputs]
    weight_zero_point   as the scale; pack-quantized: int32 [O * bits / 32, G], packed like the weight
    weight_g_idx        int32 [I], the group of each input (actorder group)
    input_scale         one number (static)

Source: https://github.com/vllm-project/compressed-tensors (compressors/, quantization/quant_args.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from torchinfer.quantization.formats.compressed_layer import CompressedLayer
from torchinfer.quantization.formats.fp8 import TOKENS_NOTE
from torchinfer.quantization.formats.layout import Check, Format, all_zeros
from torchinfer.quantization.formats.settings import Settings

PACKED = "pack-quantized"
# Format -> the types that it may hold.
FORMATS = {
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
    PACKED: ("int",),
}
MIXED = "mixed-precision"
LINEAR = "Linear"
REGEX = "re:"
# Names that vLLM gives to layers that it merges, and that lists may use.
MERGED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
MERGED |= {"up_proj": "gate_up_proj", "w1": "w13", "w3": "w13"}
ZERO_POINTS: dict[str, Check] = {".weight_zero_point": all_zeros, ".input_zero_point": all_zeros}
# Scales of quantized keys and values, for caches of another dtype than ours.
CACHE_SCALES = r".*\.self_attn\.([kvq]_scale|[kvq]_zero_point|[kv]_proj\.output_(scale|zero_point))"
BLOCKS_NOTE = (
    "weights in blocks are multiplied with inputs as they are, unless these are rounded to fp8 in groups as wide as a "
    "block: nearer to the unquantized model"
)
CACHE_NOTE = "kv_cache_scheme: its scales are not used; keys and values are cached as kv_cache_dtype says"


@dataclass(frozen=True, slots=True)
class _Group:
    targets: tuple[str, ...]
    recipe: CompressedLayer


def read(settings: Settings, dtypes: Mapping[str, torch.dtype]) -> Format:
    """Also under the older key compression_config."""
    settings.skip("global_compression_ratio version quant_method run_compressed")
    settings.must_be("quantization_status", "compressed", "frozen")
    settings.must_be("transform_config", {})
    sparsity = settings.section("sparsity_config")
    if sparsity is not None and sparsity.raw:
        sparsity.must_be("format", "dense")
        sparsity.skip("global_sparsity sparsity_structure registry_requires_subclass targets ignore")
        sparsity.finish()
    settings.must_be("moe_sparsity_config", {})
    kind = settings.choice("format", (*FORMATS, MIXED))
    ignored = _patterns(settings, "ignore")
    has_cache_scales = settings.get("kv_cache_scheme") is not None
    groups = [] if settings.problems else list(_groups(settings, kind))
    notes = {note for group in groups for note in _notes(group.recipe)}
    notes |= {CACHE_NOTE} if has_cache_scales else set()
    return Format(
        "compressed-tensors",
        partial(_recipe, groups, ignored),
        skipped=(".weight_shape",),
        checks=ZERO_POINTS,
        skipped_names=CACHE_SCALES if has_cache_scales else None,
        notes=tuple(sorted(notes)),
    )


def _groups(settings: Settings, kind: str) -> Iterator[_Group]:
    section = settings.section("config_groups")
    if section is None or not section.raw:
        settings.problems.append("config_groups must name at least one group of layers")
        return
    for name in section.raw:
        group = section.section(name)
        if group is None:
            continue
        own = group.choice("format", tuple(FORMATS), None if kind == MIXED else kind)
        recipe = _read_group(group, own)
        targets = _patterns(group, "targets")
        group.must_be("output_activations", {})
        group.finish()
        if recipe is not None:
            yield _Group(targets, recipe)


def _patterns(settings: Settings, name: str) -> tuple[str, ...]:
    """Names, or regular expressions after re:."""
    found = settings.names(name)
    for text in found:
        try:
            re.compile(text.removeprefix(REGEX) if text.startswith(REGEX) else "")
        except re.error as error:
            settings.problems.append(
                f"{settings.path}{name} has {text!r}, which is no regular expression: {error}; correct it"
            )
    return found


def _read_group(group: Settings, kind: str) -> CompressedLayer | None:
    weights, inputs = group.section("weights"), group.section("input_activations")
    num_problems = len(group.problems)
    if weights is None:
        group.problems.append(f"{group.path}weights is missing: layers whose inputs alone are quantized are not read")
        return None
    type_ = weights.choice("type", FORMATS[kind])
    bits = weights.choice("num_bits", (8,) if type_ == "float" else (4, 8))
    has_zero = not weights.choice("symmetric", (True, False), True)
    weights.must_be("dynamic", False)
    order = weights.choice("actorder", ("weight", "static", "group", "dynamic", False), False)
    strategy, size = _strategy(weights)
    activations, is_static = _activations(inputs, weights, type_, strategy, size)
    if type_ == "float" and has_zero:
        group.problems.append(f"{weights.path}symmetric=False is not supported with type='float'")
    has_groups = strategy == "group" and (type_ == "float" or is_static)
    if activations != "none" and (kind == PACKED or has_zero or has_groups):
        group.problems.append(
            f"{group.path}input_activations with {'packed' if kind == PACKED else 'asymmetric or grouped'} weights "
            "are not supported; only weights alone, or symmetric weights with a scale for a tensor or an output, or, "
            "in whole numbers with a scale for each token, for a group"
        )
    _finish(weights, inputs)
    if len(group.problems) > num_problems:
        return None
    has_order = order in ("group", "dynamic") and strategy == "group"
    return CompressedLayer(
        bits, type_ == "float", kind == PACKED, strategy, size, has_zero, has_order, activations, is_static
    )


def _strategy(weights: Settings) -> tuple[str, tuple[int, int] | None]:
    """tensor, channel, group or block, and the outputs and inputs that share a scale in the last two."""
    written = weights.raw.get("group_size")
    default = "tensor" if written is None else "channel" if written == -1 else "group"
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"), default)
    group = weights.group_size("group_size", -1)
    block = weights.pair("block_structure")
    if strategy == "group":
        if group is None:
            weights.problems.append(
                f"{weights.path}group_size={written!r} must be a positive number: strategy is group"
            )
        return strategy, (1, group or 1)
    if strategy == "block" and block is None:
        weights.problems.append(
            f"{weights.path}block_structure is missing, but strategy is block: it must be two sizes"
        )
    return strategy, block if strategy == "block" else None


def _activations(
    inputs: Settings | None, weights: Settings, type_: str, strategy: str, size: tuple[int, int] | None
) -> tuple[str, bool]:
    """What inputs are rounded to, and whether with a scale that the checkpoint has."""
    if inputs is None:
        return "none", False
    inputs.choice("num_bits", (8,))
    inputs.choice("type", (type_,), "int")
    inputs.must_be("symmetric", True)
    is_dynamic = inputs.choice("dynamic", (True, False), False)
    group = inputs.group_size("group_size", -1)
    known = ("token", "tensor", "group") if is_dynamic else ("tensor",)
    own = inputs.choice("strategy", known, "tensor" if group is None else "group")
    if strategy == "block" and is_dynamic:
        is_by_block = own == "group" and type_ == "float" and size is not None and group == size[1]
        return ("fp8" if is_by_block else "none"), False
    if own == "group" or strategy == "block":
        inputs.problems.append(
            f"{inputs.path}strategy={own!r} with weights of strategy={strategy!r} is not supported; inputs in groups "
            "are for weights in blocks, and these need dynamic inputs"
        )
    return ("fp8" if type_ == "float" else "int8"), not is_dynamic


def _finish(weights: Settings, inputs: Settings | None) -> None:
    for section in (weights, inputs):
        if section is not None:
            # How scales were found, and dtypes, which the tensors have themselves.
            section.skip("observer observer_kwargs scale_dtype zp_dtype")
            if section is inputs:
                section.must_be("actorder", False)
                section.must_be("block_structure")
            section.finish()


def _notes(recipe: CompressedLayer) -> Iterator[str]:
    if recipe.strategy == "block" and recipe.activations == "none":
        yield BLOCKS_NOTE
    elif recipe.strategy != "block" and recipe.activations != "none" and not recipe.is_static:
        yield TOKENS_NOTE


def _recipe(groups: Sequence[_Group], ignored: Sequence[str], layer: str) -> CompressedLayer | None:
    """A name counts before a class, as in compressed-tensors."""
    if LINEAR in ignored or any(_matches(layer, name) for name in ignored):
        return None
    by_name = (group.recipe for group in groups if any(_matches(layer, target) for target in group.targets))
    by_class = (group.recipe for group in groups if LINEAR in group.targets)
    return next(by_name, None) or next(by_class, None)


def _matches(layer: str, target: str) -> bool:
    head, _, last = layer.rpartition(".")
    names = [layer, f"{head}.{MERGED[last]}"] if last in MERGED else [layer]
    if target.startswith(REGEX):
        return any(re.match(target.removeprefix(REGEX), name) for name in names)
    return target in names
