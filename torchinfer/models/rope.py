"""Rotary embedding: settings in config.json, frequencies, and the cos and sin of a step.

Source: arXiv 2104.09864; scaling: arXiv 2306.15595 (linear), 2309.00071 (yarn), and transformers 4.57.6,
modeling_rope_utils.py (dynamic, llama3), whose order of float32 operations is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchinfer.batch import Batch
from torchinfer.models.config import RopeConfig
from torchinfer.models.config_keys import ConfigKeys, Json

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
OPTIONAL = {
    "dynamic": ("original_max_position_embeddings",),
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    ),
}


def read_rope(keys: ConfigKeys, rotary_dim: int, default_theta: float = 10000.0) -> RopeConfig:
    """Settings of a model with one rotary embedding: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    settings = rope_settings(keys)
    theta = keys.number("rope_theta", default_theta)
    if "rope_theta" in settings:
        theta = keys.positive("rope_parameters.rope_theta", settings["rope_theta"])
    keys.must_be("partial_rotary_factor", 1.0)
    return rope_config(keys, settings, rotary_dim, theta)


def rope_settings(keys: ConfigKeys) -> Mapping[str, Json]:
    """transformers 5 writes rope_parameters, older versions rope_scaling."""
    name = "rope_parameters" if keys.has("rope_parameters") else "rope_scaling"
    value = keys.get(name)
    keys.get("rope_scaling")
    if value is not None and not isinstance(value, Mapping):
        keys.problems.append(f"{name}={value!r} must be an object")
        return {}
    return value or {}


def rope_config(keys: ConfigKeys, settings: Mapping[str, Json], rotary_dim: int, theta: float) -> RopeConfig:
    """Check the settings of one rotary embedding."""
    kind = _kind(keys, settings)
    if rotary_dim % 2:
        keys.problems.append(f"the rotary embedding covers {rotary_dim} values of a head; it must be an even number")

    def number(name: str, default: float) -> float:
        value = settings.get(name)
        return default if value is None else keys.positive(f"rope setting {name}", value)

    context = keys.integer("max_position_embeddings", 2048)
    low, high = number("low_freq_factor", 1.0), number("high_freq_factor", 4.0)
    if kind == "llama3" and not low < high:
        keys.problems.append(f"low_freq_factor={low} must be less than high_freq_factor={high}")
    if kind == "yarn" and not theta > 1:
        keys.problems.append(f"rope_theta={theta} must be more than 1 with rope_type='yarn'")
    if kind == "dynamic" and rotary_dim <= 2:
        keys.problems.append(f"rope_type='dynamic' needs more than {rotary_dim} rotated values of a head")
    # As in transformers, dynamic scaling starts at the model's context, whatever else is written.
    original = context if kind == "dynamic" else int(number("original_max_position_embeddings", context))
    return RopeConfig(
        rotary_dim=rotary_dim,
        theta=theta,
        kind=kind,
        factor=number("factor", 1.0),
        original_context=original,
        low_frequency_factor=low,
        high_frequency_factor=high,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_attention_factor(keys, settings) if kind == "yarn" else 1.0,
        is_truncated=settings.get("truncate") is not False,
    )


def _kind(keys: ConfigKeys, settings: Mapping[str, Json]) -> str:
    """The kind of scaling, with its keys checked. "type" is the older name of "rope_type"."""
    kind = settings.get("rope_type", settings.get("type")) or "default"
    if not isinstance(kind, str) or kind not in REQUIRED:
        keys.problems.append(f"rope_type={kind!r} is not supported; known: {', '.join(REQUIRED)}")
        return "default"
    missing = [name for name in REQUIRED[kind] if settings.get(name) is None]
    if missing:
        keys.problems.append(f"rope_type={kind!r} needs {', '.join(missing)} beside it")
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        keys.problems.append(f"partial_rotary_factor={settings['partial_rotary_factor']!r}: only 1.0 is supported")
    if any(isinstance(value, Mapping) for value in settings.values()):
        keys.problems.append(f"rope settings per layer type ({', '.join(settings)}) are not supported in this family")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *REQUIRED[kind], *OPTIONAL.get(kind, ())}
    keys.unread.extend(f"rope setting {name}" for name in settings if name not in known)
    return kind


def _attention_factor(keys: ConfigKeys, settings: Mapping[str, Json]) -> float:
    """yarn's factor of cos and sin."""
    if settings.get("attention_factor") is not None:
        return keys.positive("rope setting attention_factor", settings["attention_factor"])
    factor = keys.positive("rope setting factor", settings.get("factor"))

    def scale(name: str) -> float:
        multiplier = keys.positive(f"rope setting {name}", settings[name]) if name else 1.0
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale("mscale") / scale("mscale_all_dim")
    return scale("")


def extended_context(rope: RopeConfig, max_position_embeddings: int) -> int:
    """Tokens that the scaling reaches. Linear and dynamic keep the original length in max_position_embeddings."""
    if rope.kind in ("linear", "dynamic"):
        return int(max_position_embeddings * rope.factor)
    if rope.kind == "yarn":
        return max(max_position_embeddings, int(rope.original_context * rope.factor))
    return max_position_embeddings


class Rope(nn.Module):
    """cos and sin of each token of a step, computed once for all layers."""

    exponents: Tensor
    frequencies: Tensor

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        self.config = config
        # On the CPU even where the model is built on the meta device: these are constants, no checkpoint has them.
        with torch.device("cpu"):
            exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
            self.register_buffer("exponents", exponents, persistent=False)
            self.register_buffer("frequencies", frequencies(config, exponents), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, rotary_dim / 2] float32."""
        radians = self.frequencies
        if self.config.kind == "dynamic":
            radians = dynamic_frequencies(self.config, self.exponents, batch.rope_length)
        angles = batch.positions[:, None].float() * radians
        factor = self.config.attention_factor
        if factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * factor, angles.sin() * factor


def frequencies(config: RopeConfig, exponents: Tensor) -> Tensor:
    """[F] float32 exponents -> [F] float32 radians per position (dynamic: of a prompt within the context)."""
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3_frequencies(config, plain)
    if config.kind == "yarn":
        return _yarn_frequencies(config, exponents)
    return plain


def dynamic_frequencies(config: RopeConfig, exponents: Tensor, length: Tensor) -> Tensor:
    """[F], [T] -> [T, F]: the base grows with the length beyond the original context (NTK-aware scaling)."""
    dim, factor, original = config.rotary_dim, config.factor, config.original_context
    ratio = factor * length.clamp(min=original).float() / original
    base = config.theta * (ratio - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / base[:, None] ** exponents


def _llama3_frequencies(config: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between are mixed."""
    low, high, original = config.low_frequency_factor, config.high_frequency_factor, config.original_context
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > original / low, plain / config.factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    mixed = (1 - smooth) * stretched / config.factor + smooth * stretched
    is_between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(is_between, mixed, stretched)


def _yarn_frequencies(config: RopeConfig, exponents: Tensor) -> Tensor:
    """Dimensions that turn often are kept, those that turn seldom are interpolated, with a ramp between."""

    def dimension(num_rotations: float) -> float:
        turns = math.log(config.original_context / (num_rotations * 2 * math.pi))
        return config.rotary_dim * turns / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(len(exponents), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    wavelength = config.theta**exponents
    return 1.0 / (config.factor * wavelength) * (1 - kept) + 1.0 / wavelength * kept
