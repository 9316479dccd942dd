"""What `cuda_engine.py` measures: each part is a function of its surroundings, and gives a line of numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import make_checkpoint

from torchinfer import LLM, SamplingParams
from torchinfer.loader import Checkpoint, load_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.layers import is_prepared
from torchinfer.models.moe import Experts

SCHEMES = {"bf16": None, "int8": "int8", "fp8": "fp8", "int4": "int4"}
THROUGHPUT_SCHEME = "fp8_w8a8"
Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is asked of the engine."""

    prompt: int = 128
    output: int = 384  # of which the first are not timed
    warm_up: int = 64
    num_requests: int = 256
    long_prompt: int = 1000
    long_output: int = 1000
    copy_bytes: int = 1 << 30
    product: int = 8192
    engine: dict[str, Any] = field(default_factory=lambda: {"max_model_len": 2048, "max_num_batched_tokens": 2048})
    checkpoints: tuple[str, str] = ("llama3-8b", "mixtral-4-layers")


ENGINE = {"max_model_len": 64, "max_num_batched_tokens": 32}
TINY = Sizes(8, 24, 8, 6, 12, 12, 1 << 20, 64, ENGINE, ("dense", "mixtral-tiny"))


@dataclass(frozen=True)
class Bench:
    """A part's surroundings."""

    work: Path
    device: str
    sizes: Sizes

    def folder(self, is_mixtral: bool = False) -> Path:
        """A checkpoint, which is made if it is not there."""
        kind = self.sizes.checkpoints[is_mixtral]
        folder = self.work / kind
        if not (folder / "config.json").exists():
            make_checkpoint(folder, 0.01, kind=kind, shards=4)
        return folder

    def llm(self, scheme: str | None, num_requests: int, is_mixtral: bool = False, **options: Any) -> LLM:
        options = self.sizes.engine | {"max_num_requests": num_requests} | options
        return LLM(self.folder(is_mixtral), device=self.device, quantization=scheme, progress=False, **options)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def ceilings(bench: Bench) -> Result:
    """Bytes a second: read and written on the device; from pinned memory to the device. Operations a second of bf16,
    and on a GPU of e4m3."""
    size = bench.sizes.copy_bytes
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    matrix = torch.randn(bench.sizes.product, bench.sizes.product, device=bench.device).bfloat16()
    fp8 = {}
    if bench.device == "cuda":
        e4m3, one = matrix.to(torch.float8_e4m3fn), torch.ones((), device=bench.device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
        seconds = median_seconds(bench, lambda: torch._scaled_mm(e4m3, e4m3.T, **options))
        fp8 = {"fp8_products_s": 2 * len(matrix) ** 3 / seconds}
    return fp8 | {
        "products_s": 2 * len(matrix) ** 3 / median_seconds(bench, lambda: matrix @ matrix),
        "copy_bytes_s": 2 * size / median_seconds(bench, lambda: target.copy_(source, non_blocking=True)),
        "pinned_bytes_s": size / median_seconds(bench, lambda: target.copy_(pinned, non_blocking=True)),
    }


def median_seconds(bench: Bench, call: Callable[[], object], repeats: int = 7) -> float:
    """Of a call; on a GPU between two events of its own, so that neither the launch nor the wait is in it."""
    measured = event_seconds if bench.device == "cuda" else wall_seconds
    return statistics.median([measured(call) for _ in range(repeats + 1)][1:])  # the first warms up


def event_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decode(scheme: str | None, cuda_graphs: bool) -> Callable[[Bench], Result]:
    """Steps of one request."""

    def measure(bench: Bench) -> Result:
        sizes, bandwidth = bench.sizes, ceilings(bench)["copy_bytes_s"]
        with bench.llm(scheme, 1, cuda_graphs=cuda_graphs) as llm:
            arrivals = [time.perf_counter() for event in llm.stream(prompt(sizes.prompt), greedy(sizes.output))]
            step_bytes = weight_bytes(llm) + cache_bytes(llm) * (sizes.prompt + (sizes.warm_up + sizes.output) // 2)
        seconds = (arrivals[-1] - arrivals[sizes.warm_up]) / (sizes.output - 1 - sizes.warm_up)
        limit = step_bytes / bandwidth
        return {"ms": seconds * 1e3, "limit_ms": limit * 1e3, "of_limit": limit / seconds, "bytes": step_bytes}

    return measure


def weight_bytes(llm: LLM) -> int:
    """What a step reads of the model: everything but the table of embeddings, unless that is the head too."""
    assert llm._engine is not None
    model: Any = llm._engine.runner._model  # type: ignore[attr-defined]
    tensors = [*model.parameters(), *model.buffers()]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    total += sum(matrix.num_bytes for matrix in model._matrices() if is_prepared(matrix))
    if model.prepared_head is not None:
        return total + model.prepared_head.num_bytes - model.embedding.weight.numel() * model.embedding.weight.itemsize
    table = model.embedding.weight
    return total - (0 if model.head is None else table.numel() * table.element_size())


def cache_bytes(llm: LLM) -> int:
    """Of a token, in all layers."""
    assert llm._engine is not None
    caches: Any = llm._engine.runner._kv_caches  # type: ignore[attr-defined]
    info = llm.model_info
    total = sum(tensor.numel() * tensor.element_size() for cache in caches for tensor in cache.tensors)
    return total // (info.num_pages * info.page_size)


def prompt(length: int, index: int = 0) -> list[int]:
    return [(17 + 7 * position + 131 * index) % 1000 for position in range(length)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


class Arrivals:
    """What transformers calls a streamer: notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def peer(bench: Bench) -> Result:
    """transformers compiles by itself where the cache is static and the device is a GPU."""
    import transformers

    sizes, auto = bench.sizes, transformers.AutoModelForCausalLM
    model: Any = auto.from_pretrained(bench.folder(), dtype=torch.bfloat16).to(bench.device).eval()
    ids = torch.tensor([prompt(sizes.prompt)], device=bench.device)
    options = {"max_new_tokens": sizes.output, "min_new_tokens": sizes.output, "do_sample": False}
    for _ in range(2):  # the first compiles
        arrivals = Arrivals()
        with torch.inference_mode():
            model.generate(ids, cache_implementation="static", streamer=arrivals, pad_token_id=0, **options)
    times = arrivals.times[1:]  # the first is the prompt's
    seconds = (times[-1] - times[sizes.warm_up]) / (len(times) - 1 - sizes.warm_up)
    is_compiled = getattr(model, "_compiled_call", None) is not None
    return {"ms": seconds * 1e3, "transformers": transformers.__version__, "is_compiled": is_compiled}


def host(bench: Bench) -> Result:
    """Time in `Engine.step` without the wait for the device, and all of it: with many requests, each decoding."""
    sizes = bench.sizes
    num_steps = sizes.output - sizes.warm_up
    with bench.llm(THROUGHPUT_SCHEME, sizes.num_requests, kv_cache_dtype="int8") as llm:
        waited = count_waiting(llm)
        streams = [llm.stream(prompt(8, i), greedy(sizes.output * 2)) for i in range(sizes.num_requests)]
        engine: Any = llm._engine
        while engine.stats().num_output_tokens < sizes.warm_up * sizes.num_requests:
            engine.step()
        waited.clear()
        start = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        seconds = time.perf_counter() - start
        del streams
    own = (seconds - sum(waited)) / num_steps
    return {"host_ms": own * 1e3, "step_ms": seconds / num_steps * 1e3, "requests": sizes.num_requests}


def host_mixed(bench: Bench) -> Result:
    """As `host`, with half of the requests, and in each step a prompt that is new."""
    sizes = bench.sizes
    num_steps = sizes.output - sizes.warm_up
    with bench.llm(THROUGHPUT_SCHEME, sizes.num_requests, kv_cache_dtype="int8", prefix_cache=False) as llm:
        waited = count_waiting(llm)
        streams = [llm.stream(prompt(8, i), greedy(sizes.output * 2)) for i in range(sizes.num_requests // 2)]
        engine: Any = llm._engine
        while engine.stats().num_output_tokens < sizes.warm_up * (sizes.num_requests // 2):
            engine.step()
        waited.clear()
        seconds = 0.0
        for index in range(num_steps):
            streams.append(llm.stream(prompt(sizes.prompt // 2, index), greedy(1)))
            start = time.perf_counter()
            engine.step()
            seconds += time.perf_counter() - start
        del streams
    own = (seconds - sum(waited)) / num_steps
    return {"host_ms": own * 1e3, "step_ms": seconds / num_steps * 1e3, "requests": sizes.num_requests // 2 + 1}


def count_waiting(llm: LLM) -> list[float]:
    """Seconds of each wait for a step's ids from now on."""
    runner: Any = llm._engine.runner  # type: ignore[union-attr]
    collect, waited = runner.collect, []

    def timed(launched: Any) -> Any:
        start = time.perf_counter()
        launched.wait()
        waited.append(time.perf_counter() - start)
        return collect(launched)

    runner.collect = timed
    return waited


def mixtral(bench: Bench) -> Result:
    """`throughput` of experts."""
    return throughput(bench, is_mixtral=True)


def throughput(bench: Bench, is_mixtral: bool = False) -> Result:
    """All requests at once, by `LLM.generate`."""
    sizes = bench.sizes
    prompts = [prompt(sizes.long_prompt, index) for index in range(sizes.num_requests)]
    options = {"kv_cache_dtype": "int8", "prefix_cache": False}
    with bench.llm(THROUGHPUT_SCHEME, sizes.num_requests, is_mixtral, **options) as llm:
        llm.generate(prompts[:2], greedy(4))
        start = time.perf_counter()
        outputs = llm.generate(prompts, greedy(sizes.long_output))
        seconds = time.perf_counter() - start
        preemptions, limit = llm.stats().num_preemptions, throughput_limit(bench, llm)
    count = sum(len(output.token_ids) for output in outputs)
    assert count == sizes.num_requests * sizes.long_output, "a request ended early"
    of_limit = {"limit_seconds": limit, "of_limit": limit / seconds}
    return {"output_tokens_s": count / seconds, "seconds": seconds, "preemptions": preemptions} | of_limit


def throughput_limit(bench: Bench, llm: LLM) -> float:
    """Seconds: what the steps read once, and the products of the prompts."""
    sizes, limits = bench.sizes, ceilings(bench)
    context = sizes.num_requests * (sizes.long_prompt + sizes.long_output // 2)
    step_bytes = weight_bytes(llm) + cache_bytes(llm) * context
    operations = 2 * active_parameters(llm) * sizes.num_requests * sizes.long_prompt
    rate = limits.get("fp8_products_s", limits["products_s"])
    return sizes.long_output * step_bytes / limits["copy_bytes_s"] + operations / rate


def active_parameters(llm: LLM) -> int:
    """Numbers that a token is multiplied with: of experts, those that it goes to."""
    assert llm._engine is not None
    model: Any = llm._engine.runner._model  # type: ignore[attr-defined]
    total: int = model.num_parameters()
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        size = sum(matrix.numel() for matrix in (experts.gate_up, experts.down))
        total -= size - size * model.config.moe.top_k // model.config.moe.num_experts
    return total


def load(scheme: str | None) -> Callable[[Bench], Result]:
    """Files are read once, so that they are in the page cache. The first load is what a start of a server sees; in
    later ones the buffers are pinned already."""

    def measure(bench: Bench) -> Result:
        pinned, folder = ceilings(bench)["pinned_bytes_s"], bench.folder()
        num_bytes = sum(read_through(path) for path in folder.glob("*.safetensors"))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            checkpoint = Checkpoint.open(folder)
            config = ModelConfig.from_dict(checkpoint.config)
            model = load_model(checkpoint, config, torch.bfloat16, torch.device(bench.device), quantization=scheme)
            bench.synchronize()
            seconds.append(time.perf_counter() - start)
            del model
        limit = num_bytes / pinned
        again = {"again_seconds": min(seconds[1:]), "again_of_pinned": limit / min(seconds[1:])}
        return {"seconds": seconds[0], "of_pinned": limit / seconds[0]} | again

    return measure


def read_through(path: Path) -> int:
    """Bytes of a file, all of them read."""
    with path.open("rb", buffering=0) as file:
        piece = bytearray(1 << 24)
        while file.readinto(piece):
            pass
        return file.tell()
