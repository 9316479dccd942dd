"""The engine on a GPU: decode against the memory's limit and against transformers, throughput, host time, loading.

    python benchmarks/cuda_engine.py --work /tmp/cuda --out results.jsonl           # all parts, one after the other
    python benchmarks/cuda_engine.py --work /tmp/cuda --parts decode-fp8,host --limits host=60
    python benchmarks/cuda_engine.py --work /tmp/tiny --tiny --device cpu            # that it runs, in under a minute

    ceilings      bytes a second of copies on the device, and from pinned memory to it; operations of bf16 products
    load-*        a checkpoint in the page cache -> parameters on the device    limit: a pinned copy of its bytes
    decode-*      one request, steps a second                                   limit: copy bandwidth / bytes of a step
    eager-*       the same without CUDA graphs
    peer          transformers' generate, static cache, compiled; the same request
    host          what the host does a step, 256 requests                       limit: the device's time of a step
    throughput    1,000 tokens in and 1,000 out, 256 requests, fp8 with inputs in 8 bits, int8 cache
                  limit: bytes of the decode steps at copy bandwidth, and operations of the prompts at bf16's rate

The checkpoint has the shapes of Llama 3 8B and random numbers, 16 GB, is made in --work if it is not there, and stays.
Each part is a process with a time limit of its own, and prints one JSON line as soon as it ends; what was lost after it
costs nothing. The last line says which parts ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
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

SCHEMES = {"bf16": None, "int8": "int8", "fp8": "fp8", "int4": "int4"}
SECONDS = {"ceilings": 60, "peer": 300, "throughput": 300, "host": 120}  # limits of parts; others 150
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


TINY = Sizes(8, 24, 8, 6, 12, 12, 1 << 20, 64, {"max_model_len": 64, "max_num_batched_tokens": 32})


@dataclass(frozen=True)
class Bench:
    """A part's surroundings."""

    folder: Path
    device: str
    sizes: Sizes

    def llm(self, scheme: str | None, num_requests: int, **options: Any) -> LLM:
        options = self.sizes.engine | {"max_num_requests": num_requests} | options
        return LLM(self.folder, device=self.device, quantization=scheme, progress=False, **options)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def parts() -> dict[str, Callable[[Bench], Result]]:
    """Name -> measurement, in the order in which a short loan of a GPU wants them."""
    found: dict[str, Callable[[Bench], Result]] = {"ceilings": ceilings}
    found |= {f"decode-{name}": decode(scheme, True) for name, scheme in SCHEMES.items()}
    found |= {"eager-bf16": decode(None, False), "peer": peer, "host": host, "throughput": throughput}
    found |= {f"load-{name}": load(SCHEMES[name]) for name in ("bf16", "fp8")}
    return found


def ceilings(bench: Bench) -> Result:
    """Bytes a second: read and written on the device; from pinned memory to the device. Operations a second."""
    size = bench.sizes.copy_bytes
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    matrix = torch.randn(bench.sizes.product, bench.sizes.product, device=bench.device).bfloat16()
    return {
        "products_s": 2 * len(matrix) ** 3 / median_seconds(bench, lambda: matrix @ matrix),
        "copy_bytes_s": 2 * size / median_seconds(bench, lambda: target.copy_(source, non_blocking=True)),
        "pinned_bytes_s": size / median_seconds(bench, lambda: target.copy_(pinned, non_blocking=True)),
    }


def median_seconds(bench: Bench, call: Callable[[], object], repeats: int = 7) -> float:
    """Of a call and the device's work behind it."""
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        bench.synchronize()
        start = time.perf_counter()
        call()
        bench.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


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
    model: Any = auto.from_pretrained(bench.folder, dtype=torch.bfloat16).to(bench.device).eval()
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


def throughput(bench: Bench) -> Result:
    """All requests at once, by `LLM.generate`."""
    sizes = bench.sizes
    prompts = [prompt(sizes.long_prompt, index) for index in range(sizes.num_requests)]
    with bench.llm(THROUGHPUT_SCHEME, sizes.num_requests, kv_cache_dtype="int8", prefix_cache=False) as llm:
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
    """Seconds."""
    sizes, limits = bench.sizes, ceilings(bench)
    context = sizes.num_requests * (sizes.long_prompt + sizes.long_output // 2)
    step_bytes = weight_bytes(llm) + cache_bytes(llm) * context
    operations = 2 * llm.model_info.num_parameters * sizes.num_requests * sizes.long_prompt
    return sizes.long_output * step_bytes / limits["copy_bytes_s"] + operations / limits["products_s"]


def load(scheme: str | None) -> Callable[[Bench], Result]:
    """Read once, so that the files are in the page cache, then timed."""

    def measure(bench: Bench) -> Result:
        pinned = ceilings(bench)["pinned_bytes_s"]
        num_bytes = sum(path.stat().st_size for path in bench.folder.glob("*.safetensors"))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            checkpoint = Checkpoint.open(bench.folder)
            config = ModelConfig.from_dict(checkpoint.config)
            model = load_model(checkpoint, config, torch.bfloat16, torch.device(bench.device), quantization=scheme)
            bench.synchronize()
            seconds.append(time.perf_counter() - start)
            del model
        limit = num_bytes / pinned
        return {"seconds": min(seconds[1:]), "first_seconds": seconds[0], "of_pinned": limit / min(seconds[1:])}

    return measure


def run_part(bench: Bench, name: str) -> Result:
    """In this process."""
    start = time.perf_counter()
    result = parts()[name](bench)
    gpu = torch.cuda.get_device_name() if bench.device == "cuda" else "none"
    common = {"part": name, "part_seconds": time.perf_counter() - start, "gpu": gpu, "torch": torch.__version__}
    return common | result


def run_apart(name: str, arguments: list[str], limit: float) -> Result:
    """In a process of its own, which is killed after `limit` seconds."""
    command = [sys.executable, __file__, *arguments, "--parts", name, "--together"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"part": name, "error": f"ran past its limit of {limit:g} s"}
    if done.returncode:
        return {"part": name, "error": f"ended with code {done.returncode}; see above"}
    result: Result = json.loads(done.stdout.splitlines()[-2])
    return result


def main() -> None:
    args = parse()
    folder = args.work / ("tiny" if args.tiny else "llama3-8b")
    if not (folder / "config.json").exists():
        make_checkpoint(folder, 0.01, kind="dense" if args.tiny else "llama3-8b", shards=1 if args.tiny else 4)
    bench = Bench(folder, args.device, TINY if args.tiny else Sizes())
    limits = SECONDS | {name: float(value) for name, _, value in (each.partition("=") for each in args.limits)}
    arguments = ["--work", str(args.work), "--device", args.device, *(["--tiny"] if args.tiny else [])]
    ended, failed = [], []
    for name in args.parts.split(",") if args.parts else parts():
        result = run_part(bench, name) if args.together else run_apart(name, arguments, limits.get(name, 150))
        (failed if "error" in result else ended).append(name)
        print(json.dumps(result), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
    print(json.dumps({"benchmark": "cuda_engine", "ended": ended, "failed": failed}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", help=f"some of {','.join(parts())}; all if left out")
    parser.add_argument("--limits", nargs="*", default=[], metavar="PART=SECONDS")
    parser.add_argument("--out", type=Path, help="file to which each part's line is added, too")
    parser.add_argument("--tiny", action="store_true", help="a model of some layers, and few tokens")
    parser.add_argument("--together", action="store_true", help="all in this process, without limits")
    args = parser.parse_args()
    unknown = [name for name in (args.parts or "").split(",") if name and name not in parts()]
    if unknown:
        parser.error(f"no part is named {', '.join(unknown)}; there are {', '.join(parts())}")
    return args


if __name__ == "__main__":
    main()
