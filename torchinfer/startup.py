"""From an EngineConfig to a warm engine: checkpoint, device, weights, cache, runner, in this order."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchinfer import kernels
from torchinfer.batch import KVCache
from torchinfer.calibration import calibrate, plan_calibration
from torchinfer.config import EngineConfig
from torchinfer.device import (
    DEFAULT_CACHE_SHARE,
    bound_cpu_caches,
    dtype_name,
    flush,
    free_memory_bytes,
    keep_compiled_programs,
    peak_bytes,
    release_memory,
    resolve_device,
    tensor_cores,
    total_memory_bytes,
)
from torchinfer.engine import Engine
from torchinfer.engine_info import ModelInfo
from torchinfer.errors import CheckpointError, ConfigError, DeviceError, StepMemoryError, raise_all
from torchinfer.kv_cache.pages import PagePool
from torchinfer.kv_cache.prefix import PrefixCache
from torchinfer.kv_cache.tensors import (
    MIB,
    allocate,
    kernel_pages,
    page_bytes,
    plan_num_pages,
    resolve_cache_dtype,
    resolve_page_size,
)
from torchinfer.loader import LoadOptions, load_model
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.loader.divided import load_divided
from torchinfer.loader.smoothing import Smoothing
from torchinfer.lockstep import Group, LeadingEngine, facts
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.parallel import DividedModel, local_config, partition_problems, with_expert_parallel
from torchinfer.ranks import has_ranks, load_ranked
from torchinfer.runner import EagerRunner, Runner
from torchinfer.scheduler import Scheduler
from torchinfer.spmd_matrices import prepare_chips
from torchinfer.step_memory import MemoryPlan, largest_steps
from torchinfer.tokenizer import Tokenizer
from torchinfer.tokenizer_files import load_tokenizer

logger = logging.getLogger(__name__)

OWN_OPTIONS = (
    "model",
    "compile_cache",
    "load_memory",
    "load_readers",
    "load_direct",
    "verify",
    "progress",
)  # by process
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def build_engine(config: EngineConfig, checkpoint: Checkpoint, group: Group | None = None) -> Engine:
    """Load the checkpoint, allocate the cache, compile what has to be compiled; with a group, as all of it do.

    Raises what `launch.start_engine` raises.
    """
    if group is not None:
        group.agree(facts(config, checkpoint))
    model_config = ModelConfig.from_dict(checkpoint.config)
    if config.expert_parallel:
        model_config = with_expert_parallel(model_config)
    max_model_len = _resolve_max_model_len(config, model_config)
    device = _prepare_device(config, model_config)
    dtype = resolve_dtype(config.dtype, checkpoint.config, tensor_cores(device) is not None)
    kv_cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, dtype, device)
    local = local_config(model_config, config.tensor_parallel_size)
    pages = kernel_pages(local, kv_cache_dtype, tensor_cores(device))
    page_size = resolve_page_size(config.page_size, pages)
    tokenizer = load_tokenizer(config.model)
    model, num_parameters = _load(config, checkpoint, model_config, dtype, device, tokenizer)
    kernels.load_ports(device.type)
    bytes_per_page = page_bytes(local, page_size, kv_cache_dtype, pages)
    num_pages, memory = _plan_cache(config, model, page_size, bytes_per_page, kv_cache_dtype, device, max_model_len)
    if group is not None:
        num_pages = group.least(num_pages)
    num_chips = config.tensor_parallel_size if isinstance(model, DividedModel) else 1
    kv_caches = allocate(local, num_pages, page_size, kv_cache_dtype, device, pages, num_chips)
    scheduler = _scheduler(config, model_config, num_pages, page_size, max_model_len)
    runner = _runner(config, model, kv_caches, page_size, device, max_model_len, memory)
    runner.warm_up(config.progress)
    info = ModelInfo(
        name=Path(os.path.abspath(config.model)).name,  # asks no mount
        **_identity(checkpoint, model_config, tokenizer),
        num_parameters=num_parameters,
        max_model_len=max_model_len,
        dtype=dtype_name(dtype),
        device=device.type,
        num_pages=num_pages,
        page_size=page_size,
        max_num_requests=config.max_num_requests,
        kv_cache_dtype=dtype_name(kv_cache_dtype),
    )
    if group is None:
        return Engine(scheduler, runner, info, tokenizer, config.seed)
    group.least(0)  # all are warm
    kind = partial(LeadingEngine, group) if group.leads else Engine
    return kind(scheduler, runner, info, tokenizer, config.seed)


def _identity(checkpoint: Checkpoint, config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What `ModelInfo` says of a checkpoint, whatever the engine is."""
    return {
        "architecture": config.architecture,
        "vocab_size": config.vocab_size,
        "eos_token_ids": tuple(_eos_token_ids(checkpoint, tokenizer)),
        "has_tokenizer": tokenizer is not None,
    }


def check_division(config: EngineConfig, checkpoint: Checkpoint) -> None:
    """Before processes are started for it: whether the model can be divided, and there are devices for all parts.

    Raises:
        ConfigError, CheckpointError, DeviceError: if not.
    """
    _resolve_device(config, ModelConfig.from_dict(checkpoint.config))


def _resolve_device(config: EngineConfig, model: ModelConfig) -> torch.device:
    num_chips = config.tensor_parallel_size
    problems = partition_problems(model, num_chips)
    raise_all(problems, ConfigError, f"tensor_parallel_size={num_chips} does not fit the model, use another")
    return resolve_device(config.device, num_chips)


def _prepare_device(config: EngineConfig, model: ModelConfig) -> torch.device:
    """The device, with what must be said to it before its first use."""
    device = _resolve_device(config, model)
    if device.type == "cpu":
        bound_cpu_caches()
    if device.type == "xla" and config.compile_cache is not None:
        keep_compiled_programs(Path(config.compile_cache))
    if tensor_cores(device):
        kernels.load_sampler()
    return device


def _load(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: Tokenizer | None,
) -> tuple[Decoder | DividedModel, int]:
    """The model, or this process's part of it, and how many parameters the whole one has."""
    options = LoadOptions(config.load_memory, config.load_readers, config.load_direct, config.verify)
    common: dict[str, Any] = {
        "options": options,
        "quantization": config.quantization,
        "moe_mode": config.moe_mode,
        "moe_capacity_factor": config.moe_capacity_factor,
        "progress": config.progress,
    }
    num_cores = tensor_cores(device)
    if has_ranks(config):
        part, num_parameters = load_ranked(checkpoint, model_config, dtype, device, **common)
        part.prepare(fuses=False)
        return part, num_parameters
    if config.tensor_parallel_size > 1:
        divided = load_divided(checkpoint, model_config, dtype, device, config.tensor_parallel_size, **common)
        if num_cores is not None:
            prepare_chips(divided, num_cores, lambda: flush(device))
        return divided, divided.num_parameters
    smoothing = _smoothing(config, checkpoint, model_config, tokenizer, device, options)
    model = load_model(checkpoint, model_config, dtype, device, smoothing=smoothing, **common)
    # A layer at a time: only one is there twice.
    model.prepare(num_cores, None if num_cores is None else lambda layer: flush(device))
    return model, model.num_parameters()


def _smoothing(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    tokenizer: Tokenizer | None,
    device: torch.device,
    options: LoadOptions,
) -> Smoothing | None:
    if config.calibration is None or config.quantization is None:
        return None
    plan = plan_calibration(model_config, config.quantization, config.calibration, tokenizer)
    return calibrate(checkpoint, model_config, plan, device, options, config.progress)


def _scheduler(
    config: EngineConfig, model: ModelConfig, num_pages: int, page_size: int, max_model_len: int
) -> Scheduler:
    pool = PagePool(num_pages)
    has_prefix_cache = config.prefix_cache
    if has_prefix_cache and model.rope_depends_on_length:
        logger.info("prefix cache off: with dynamic rope scaling, keys depend on the whole prompt's length")
        has_prefix_cache = False
    return Scheduler(
        pool,
        page_size=page_size,
        max_num_requests=config.max_num_requests,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        prefix_cache=PrefixCache(pool, page_size) if has_prefix_cache else None,
    )


def _runner(
    config: EngineConfig,
    model: Decoder | DividedModel,
    kv_caches: list[KVCache],
    page_size: int,
    device: torch.device,
    max_model_len: int,
    memory: MemoryPlan | None = None,
) -> Runner:
    sizes = _sizes(config, max_model_len, page_size)
    if isinstance(model, DividedModel):
        from torchinfer.spmd_runner import SpmdRunner

        return SpmdRunner(model, kv_caches, page_size, device, **sizes)
    if device.type != "xla":
        has_buckets = config.cuda_graphs and device.type == "cuda"
        return EagerRunner(model, kv_caches, page_size, device, **sizes, has_buckets=has_buckets, memory=memory)
    from torchinfer.xla_runner import XlaRunner

    return XlaRunner(model, kv_caches, page_size, device, **sizes)


def _plan_cache(
    config: EngineConfig,
    model: Decoder | DividedModel,
    page_size: int,
    bytes_per_page: int,
    kv_cache_dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> tuple[int, MemoryPlan | None]:
    """How many pages the cache has, and, on CUDA, where all memory goes."""
    memory = None
    if device.type == "cuda" and isinstance(model, Decoder):
        memory = _measure_memory(config, model, page_size, kv_cache_dtype, device, max_model_len)
    used = model.share_bytes if isinstance(model, DividedModel) else 0
    free = free_memory_bytes(device, used) if memory is None else memory.free
    if device.type == "cpu":
        free //= config.tensor_parallel_size  # processes of one machine
    num_pages = _resolve_num_pages(config, page_size, bytes_per_page, device, free, max_model_len)
    size, name = num_pages * bytes_per_page, dtype_name(kv_cache_dtype)
    logger.info("KV cache: %d pages of %d tokens, %s, %.1f MiB", num_pages, page_size, name, size / MIB)
    return num_pages, memory if memory is None else replace(memory, cache=size)


def _measure_memory(
    config: EngineConfig,
    model: Decoder,
    page_size: int,
    kv_cache_dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> MemoryPlan:
    """Run the largest steps over a cache of one page.

    Raises:
        DeviceError: when not even they fit, with the arithmetic.
    """
    release_memory(device)
    sizes = _sizes(config, max_model_len, page_size)
    kv_caches = allocate(model.config, 1, page_size, kv_cache_dtype, device)
    runner = EagerRunner(model, kv_caches, page_size, device, **sizes, has_buckets=False, memory=None)
    total = total_memory_bytes(device)
    before = total - free_memory_bytes(device)
    try:
        peaks = [
            peak_bytes(lambda step=step: runner.collect(runner.launch(*step)), device)  # type: ignore[misc]
            for step in largest_steps(**sizes, page_size=page_size)
        ]
    except StepMemoryError as error:
        raise DeviceError(
            f"the largest steps, of max_num_batched_tokens={config.max_num_batched_tokens} tokens and of "
            f"max_num_requests={config.max_num_requests} requests, do not fit beside what is taken of {device}, "
            f"{before / MIB:.0f} of {total / MIB:.0f} MiB: lower them, or quantize the weights"
        ) from error
    taken = total - free_memory_bytes(device)
    memory = MemoryPlan(total, taken, max(peaks), peaks[1] if config.cuda_graphs else 0)
    logger.info("memory of %s, for the KV cache what is left: %s", device, memory)
    return memory


def _sizes(config: EngineConfig, max_model_len: int, page_size: int) -> dict[str, int]:
    """The largest that a step can be."""
    return {
        "table_width": -(-max_model_len // page_size),
        "max_num_requests": config.max_num_requests,
        "max_num_tokens": config.max_num_batched_tokens,
    }


def _resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    length = config.max_model_len or model.context_length
    if length > model.context_length:
        raise ConfigError(
            f"max_model_len={length} exceeds the model's context of {model.context_length} tokens "
            f"(max_position_embeddings with its rope scaling); use at most that"
        )
    return length


def resolve_dtype(name: str, raw: Mapping[str, Any], is_tpu: bool = False) -> torch.dtype:
    """Of weights and activations; `auto`: that of a checkpoint with config.json `raw`, but bfloat16 for a TPU in place
    of float16, which neither its units nor its kernels have.

    Raises:
        CheckpointError, ConfigError: it is none that the device has.
    """
    given = name
    if name == "auto":
        name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"config.json has dtype {name!r}; give dtype as one of {', '.join(DTYPES)}")
    if is_tpu and name == "float16":
        if given != "auto":
            raise ConfigError("dtype='float16': a TPU has bfloat16 in its place; use dtype='bfloat16'")
        logger.info("the checkpoint's float16 becomes bfloat16, which a TPU has in its place")
        name = "bfloat16"
    return DTYPES[name]


def _resolve_num_pages(
    config: EngineConfig, page_size: int, bytes_per_page: int, device: torch.device, free: int, max_model_len: int
) -> int:
    memory = config.kv_cache_memory
    share = DEFAULT_CACHE_SHARE[device.type] if memory is None else memory
    budget = int(share * free) if share <= 1 else int(share)
    if budget > free:
        raise ConfigError(
            f"kv_cache_memory={budget} bytes ({budget / MIB:.0f} MiB) exceeds the {free} bytes ({free / MIB:.0f} MiB) "
            f"that are free on {device.type} after the weights; ask for less, or for a share such as 0.8"
        )
    return plan_num_pages(budget, bytes_per_page, page_size, max_model_len, config.max_num_requests)


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Iterator[int]:
    """From generation_config.json, else config.json, else the tokenizer."""
    for source in (checkpoint.generation_config, checkpoint.config):
        ids = source.get("eos_token_id")
        if ids is not None:
            yield from ids if isinstance(ids, list) else [ids]
            return
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id
