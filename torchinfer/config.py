"""EngineConfig: every option of the engine, checked once, never changed afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path

from torchinfer.errors import ConfigError, raise_all

DEVICES = ("auto", "cpu", "cuda", "xla")
DTYPES = ("auto", "bfloat16", "float16", "float32")
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "float32", "int8", "fp8")
SCHEMES = (  # and none
    *("int8", "int8_w8a8", "fp8", "fp8_w8a8", "fp8_block", "fp8_block_w8a8"),
    *("int4", "int4_g64", "int4_g32", "int4_w4a8"),
)
MOE_MODES = ("dropless", "capacity")

SMALLEST_LOAD_MEMORY = 32 << 20  # a few readers with some MiB each
Size = int  # bytes; the command line takes 2GiB
# A scheme for all matrices, or for those whose names in the checkpoint fit a pattern: loader/schemes.py
Quantization = str | Mapping[str, str]
CALIBRATED = "int8_w8a8"  # the scheme that calibration is for
# Annotation of a field, without None -> the types that its value may have, and the rule in words.
KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "int": ((Integral,), "a whole number"),
    "Size": ((Integral,), "a whole number of bytes"),
    "float": ((Real,), "a number"),
    "float | int": ((Real,), "a number"),
    "bool": ((bool,), "True or False"),
    "str | Path": ((str, Path), "a path"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Options of one engine.

    Raises:
        ConfigError: with all options that are out of range, their values and rules.
    """

    model: str | Path  # folder of a Hugging Face checkpoint
    device: str = "auto"  # the first of xla, cuda, cpu that is there
    tensor_parallel_size: int = 1  # TPU chips, all there are; or GPUs, that divide the model
    hosts_port: int = 8490  # TPU slices of several hosts: TCP port of the first one, for the others
    expert_parallel: bool = False  # these chips have some of the experts each, whole, not a part of each
    dtype: str = "auto"  # the checkpoint's
    quantization: Quantization | None = None  # of the weights, while they are loaded: int8, ...; None: as they are
    calibration: str | Path | None = None  # text file to smooth activations with, for int8_w8a8
    max_model_len: int | None = None  # tokens of prompt and output together; None: the model's context
    max_num_requests: int = 64  # running at once, samples counted
    max_num_batched_tokens: int = 512  # per step: decode rows first, chunks of prompts fill the rest
    page_size: int | None = None  # tokens; None: what the TPU's attention kernel takes, 128, elsewhere 16
    kv_cache_memory: float | int | None = None  # at most 1.0: share of what is free; more: bytes; None: by device
    kv_cache_dtype: str = "auto"  # the model's; int8 and fp8 (e4m3) with a scale for each token and KV head
    prefix_cache: bool = True
    seed: int = 0  # of requests that have none of their own
    moe_mode: str = "dropless"  # or capacity: overflow beyond the capacity factor is dropped and counted
    moe_capacity_factor: float = 1.25
    cuda_graphs: bool = True  # CUDA: steps in which all requests decode are captured at the start, in buckets
    compile_cache: str | Path | None = None  # XLA: folder that keeps compiled programs between starts
    # Bytes of host memory for what is on its way from the checkpoint to its place; None: 2 GiB, or more where the
    # largest tensors need it.
    load_memory: Size | None = None
    load_readers: int | None = None  # parts of files read at once, at most; None: as many as bring more
    load_direct: bool | None = None  # read around the page cache (O_DIRECT); None: where the first reads show a gain
    verify: bool = False  # compare the checkpoint's files with their CRC32C while they are loaded
    progress: bool = True  # progress bars on standard error, if it is a terminal

    def __post_init__(self) -> None:
        raise_all(_problems(self), ConfigError, "invalid engine configuration")


def _problems(c: EngineConfig) -> list[str]:
    return _type_problems(c) or _range_problems(c)


def _type_problems(c: EngineConfig) -> list[str]:
    found = []
    for option in fields(c):
        value, annotation = getattr(c, option.name), str(option.type)
        kinds, rule = KINDS.get(annotation.removesuffix(" | None"), ((object,), ""))
        is_none = value is None and annotation.endswith(" | None")
        is_bool = isinstance(value, bool) and bool not in kinds and object not in kinds
        if not is_none and (is_bool or not isinstance(value, kinds)):
            found.append(f"{option.name}={value!r} must be {rule}")
    return found + _quantization_problems(c.quantization)


def _quantization_problems(quantization: object) -> list[str]:
    named = quantization if isinstance(quantization, Mapping) else {"*": quantization}
    if quantization is not None and not all(isinstance(text, str) for pair in named.items() for text in pair):
        return [
            f"quantization={quantization!r} must be the name of a scheme, or a mapping from patterns to names such as "
            "{'*.mlp.*': 'int4', '*': 'int8'}"
        ]
    return [] if named else [f"quantization={quantization!r} names no scheme: leave it out, or name one such as 'int8'"]


def _range_problems(c: EngineConfig) -> list[str]:
    found = []
    choices = {"device": DEVICES, "dtype": DTYPES, "kv_cache_dtype": KV_CACHE_DTYPES, "moe_mode": MOE_MODES}
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            found.append(f"{name}={getattr(c, name)!r} must be one of {', '.join(allowed)}")
    if c.calibration is not None and CALIBRATED not in _schemes(c.quantization):
        found.append(
            f"calibration={str(c.calibration)!r} is for quantization {CALIBRATED}, not for {c.quantization!r}: leave "
            "one of them out"
        )
    if c.calibration is not None and c.tensor_parallel_size > 1:
        found.append(
            f"calibration={str(c.calibration)!r} runs the model on one chip, not on {c.tensor_parallel_size}: write a "
            "smoothed checkpoint with `torchinfer quantize` first"
        )
    if c.expert_parallel and c.tensor_parallel_size == 1:
        found.append("expert_parallel=True divides experts among chips, but tensor_parallel_size=1: ask for several")
    for name in ("tensor_parallel_size", "max_num_requests", "max_num_batched_tokens", "page_size"):
        value = getattr(c, name)
        if value is not None and value < 1:
            found.append(f"{name}={value} must be at least 1")
    if c.load_memory is not None and c.load_memory < SMALLEST_LOAD_MEMORY:
        found.append(f"load_memory={c.load_memory} must be at least {SMALLEST_LOAD_MEMORY} bytes")
    if c.load_readers is not None and c.load_readers < 1:
        found.append(f"load_readers={c.load_readers} must be at least 1")
    if c.max_num_batched_tokens < c.max_num_requests:
        found.append(
            f"max_num_batched_tokens={c.max_num_batched_tokens} must be at least "
            f"max_num_requests={c.max_num_requests}, so that every running request gets its token"
        )
    if not 0 < c.hosts_port < 65536:
        found.append(f"hosts_port={c.hosts_port} must be a TCP port, 1 to 65535")
    if c.page_size is not None and c.page_size & (c.page_size - 1):
        found.append(f"page_size={c.page_size} must be a power of two")
    if c.max_model_len is not None and c.max_model_len < 2:
        found.append(f"max_model_len={c.max_model_len} must be at least 2 (a prompt token and an output token)")
    if c.kv_cache_memory is not None and not c.kv_cache_memory > 0:
        found.append(f"kv_cache_memory={c.kv_cache_memory} must be a share in (0, 1] or a number of bytes")
    if not c.moe_capacity_factor > 0:
        found.append(f"moe_capacity_factor={c.moe_capacity_factor} must be positive")
    return found


def _schemes(quantization: Quantization | None) -> set[str | None]:
    return set(quantization.values()) if isinstance(quantization, Mapping) else {quantization}
