"""One engine in a process of its own, for benchmarks/cpu_peers.py: it loads a model, then measures what it is told.

    python benchmarks/cpu_peers_worker.py ENGINE MODEL [--option KEY=VALUE]...

Runs in the engine's own environment, so it imports nothing of the others. Standard input has a line of JSON for each
measurement, {"requests": 8, "prompt": 128, "new": 64}; standard output answers with a line of JSON each: the time to
the last request's first token, and the tokens a second after it. The first line that it prints tells of the load.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

THREADS = 2
MOST_TOKENS = 4096  # of a step, in all engines
Times = list[list[float]]  # of each request, when each of its tokens came


class Engine(Protocol):
    """What an engine has to do."""

    def generate(self, prompts: list[list[int]], num_new: int) -> Times: ...


class Torchinfer:
    """This library, without its server."""

    def __init__(self, model: str, options: dict[str, str]) -> None:
        from torchinfer.config import EngineConfig
        from torchinfer.launch import start_engine

        config = EngineConfig(
            model=model,
            device="cpu",
            quantization=quantization(options),
            kv_cache_dtype=options.get("kv_cache", "auto"),
            kv_cache_memory=int(options.get("cache_bytes", 2 << 30)),
            max_num_batched_tokens=int(options.get("batched_tokens", 512)),
            prefix_cache=False,
            progress=False,
        )
        self._engine = start_engine(config)
        self.token_bytes = matrix_bytes(self._engine.runner._model)
        self._ids = itertools.count()

    def generate(self, prompts: list[list[int]], num_new: int) -> Times:
        from torchinfer.request import Request, SamplingParams

        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        names = [f"r{next(self._ids)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add(Request(name, tuple(prompt), params))
        times: dict[str, list[float]] = {name: [] for name in names}
        while self._engine.has_work:
            for event in self._engine.step():
                times[event.request_id] += [time.perf_counter()] * len(event.token_ids)
        return list(times.values())


def quantization(options: dict[str, str]) -> str | dict[str, str] | None:
    """`head`: the scheme of the head, which is left as it is otherwise."""
    scheme = options.get("quantization")
    return {"lm_head": options["head"], "*": scheme} if scheme and "head" in options else scheme


class LlamaCpp:
    """llama.cpp by llama-cpp-python's bindings of its C interface."""

    def __init__(self, model: str, options: dict[str, str]) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        assert self._model, f"llama.cpp cannot load {model}"
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._shape = (0, 0)

    def generate(self, prompts: list[list[int]], num_new: int) -> Times:
        api = self._api
        self._resize(len(prompts), len(prompts[0]) + num_new)
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(max(MOST_TOKENS, len(prompts)), 0, 1)
        times: Times = [[] for _ in prompts]
        # Prompts that are longer than a batch come in parts.
        entries = [
            (token, at, row, at == len(prompt) - 1)
            for row, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        position, found = len(prompts[0]), self._run(batch, entries)
        for _ in range(num_new):
            now = time.perf_counter()
            for row in times:
                row.append(now)
            found = self._run(batch, [(token, position, row, True) for row, token in enumerate(found)])
            position += 1
        api.llama_batch_free(batch)
        return times

    def _run(self, batch: Any, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, position, request, wants logits) and give the most probable ids of those that want them."""
        import numpy as np

        found = []
        for start in range(0, len(entries), MOST_TOKENS):
            part = entries[start : start + MOST_TOKENS]
            for index, (token, position, row, wants) in enumerate(part):
                batch.token[index], batch.pos[index], batch.logits[index] = token, position, wants
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
            batch.n_tokens = len(part)
            status = self._api.llama_decode(self._context, batch)
            assert status == 0, f"llama_decode returned {status}"
            for index in (index for index, entry in enumerate(part) if entry[3]):
                logits = self._api.llama_get_logits_ith(self._context, index)
                found.append(int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))
        return found

    def _resize(self, num_requests: int, length: int) -> None:
        if self._shape[0] == num_requests and self._shape[1] >= length:
            return
        if self._context is not None:
            self._api.llama_free(self._context)
        length = -(-(length + 1) // 256) * 256
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = length * num_requests, num_requests
        params.n_batch, params.n_ubatch = MOST_TOKENS, 512
        params.n_threads = params.n_threads_batch = THREADS
        self._context = self._api.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp cannot make a context"
        self._shape = num_requests, length


class Vllm:
    """vLLM's CPU build, its engine in this process."""

    def __init__(self, model: str, options: dict[str, str]) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="2",
            VLLM_CPU_OMP_THREADS_BIND="0-1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS=str(THREADS),
        )
        import torch
        import vllm

        torch.set_num_threads(THREADS)
        self._vllm = vllm
        self._llm = vllm.LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=8192,
            max_num_seqs=128,
            max_num_batched_tokens=MOST_TOKENS,
            enable_prefix_caching=False,
            disable_log_stats=True,
            skip_tokenizer_init=True,
        )
        self._ids = itertools.count()

    def generate(self, prompts: list[list[int]], num_new: int) -> Times:
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        times: dict[str, list[float]] = {}
        for prompt in prompts:
            name = f"r{next(self._ids)}"
            times[name] = []
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                known = times[output.request_id.split("-")[0]]  # newer versions add to the name
                known += [time.perf_counter()] * (len(output.outputs[0].token_ids) - len(known))
        return list(times.values())


class OpenVino:
    """OpenVINO GenAI with continuous batching."""

    def __init__(self, model: str, options: dict[str, str]) -> None:
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.cache_size = MOST_TOKENS, 128, 2
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, False
        threads = {"INFERENCE_NUM_THREADS": THREADS}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", threads)
        self._ids = itertools.count()

    def generate(self, prompts: list[list[int]], num_new: int) -> Times:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_new
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        handles = [self._pipeline.add_request(next(self._ids), ids, config) for ids in inputs]
        times: Times = [[] for _ in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for row, handle in zip(times, handles, strict=True):
                while handle.can_read():
                    row += [now] * sum(len(output.generated_ids) for output in handle.read().values())
        return times


class CTranslate2:
    """CTranslate2's generator."""

    def __init__(self, model: str, options: dict[str, str]) -> None:
        os.environ["CT2_FORCE_CPU_ISA"] = "AVX512"  # by itself it takes AVX2 on AMD's processors
        import ctranslate2

        self._generator = ctranslate2.Generator(model, device="cpu", intra_threads=THREADS, inter_threads=1)
        self._words = json.loads((Path(model) / "vocabulary.json").read_text())

    def generate(self, prompts: list[list[int]], num_new: int) -> Times:
        times: Times = [[] for _ in prompts]

        def note(step: Any) -> bool:
            times[step.batch_id].append(time.perf_counter())
            return False

        words = [[self._words[token] for token in prompt] for prompt in prompts]
        lengths = {"max_length": num_new, "min_length": num_new, "include_prompt_in_result": False}
        self._generator.generate_batch(words, **lengths, callback=note)
        return times


class OnnxRuntime:
    """ONNX Runtime GenAI."""

    def __init__(self, model: str, options: dict[str, str]) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(model)
        session = {"intra_op_num_threads": THREADS}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, prompts: list[list[int]], num_new: int) -> Times:
        import numpy as np

        length, times = len(prompts[0]) + num_new, []
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=len(prompts))
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(num_new):
            generator.generate_next_token()
            generator.get_next_tokens()
            times.append(time.perf_counter())
        return [times] * len(prompts)


class Transformers:
    """transformers' generate, in bfloat16."""

    def __init__(self, model: str, options: dict[str, str]) -> None:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._model.generation_config.update(eos_token_id=None, pad_token_id=0, do_sample=False)

        class Clock(transformers.StoppingCriteria):
            """Notes when each token of the batch has come."""

            def __init__(self) -> None:
                self.times: list[float] = []

            def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
                self.times.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool)

        self._clock, self._list = Clock, transformers.StoppingCriteriaList

    def generate(self, prompts: list[list[int]], num_new: int) -> Times:
        ids, clock = self._torch.tensor(prompts), self._clock()
        lengths = {"max_new_tokens": num_new, "min_new_tokens": num_new}
        with self._torch.inference_mode():
            mask = self._torch.ones_like(ids)
            self._model.generate(ids, attention_mask=mask, stopping_criteria=self._list([clock]), **lengths)
        return [clock.times] * len(prompts)


ENGINES: dict[str, type[Any]] = {
    "torchinfer": Torchinfer,
    "llama.cpp": LlamaCpp,
    "vllm": Vllm,
    "openvino": OpenVino,
    "ctranslate2": CTranslate2,
    "onnxruntime": OnnxRuntime,
    "transformers": Transformers,
}


def matrix_bytes(model: Any) -> int:
    """Bytes of our matrices that each token needs: all but the table of embeddings, unless that is the head."""
    names = [(module, name) for module in model.modules() for name in getattr(module, "MATRICES", ())]
    prepared = [getattr(module, name) for module, name in names]
    if model.prepared_head is not None:
        prepared.append(model.prepared_head)
    return sum(matrix.num_bytes for matrix in prepared)


def make_prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    """The same ids for every engine; other seeds share no prefix."""
    state, ids = (seed * 2654435761 + 12345) % 2**32, []
    for _ in range(length):
        state = (state * 1664525 + 1013904223) % 2**32
        ids.append(10 + (state >> 8) % (vocab_size - 20))
    return ids


def measure(engine: Engine, task: dict[str, int], seeds: itertools.count[int]) -> dict[str, float]:
    """Tokens of the prompts a second, and of the outputs after the last first token."""
    prompts = [make_prompt(task["prompt"], next(seeds), task["vocab_size"]) for _ in range(task["requests"])]
    start = time.perf_counter()
    times = engine.generate(prompts, task["new"])
    assert all(len(row) == task["new"] for row in times), [len(row) for row in times]
    first, last = max(row[0] for row in times), max(row[-1] for row in times)
    after = sum(moment > first for row in times for moment in row)
    found = {"prefill": task["requests"] * task["prompt"] / (first - start), "seconds": last - start}
    if after:
        found["decode"] = after / (last - first)
    return found


def peak_rss() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--option", action="append", default=[])
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    start = time.perf_counter()
    engine = ENGINES[args.engine](args.model, dict(option.split("=", 1) for option in args.option))
    loaded = {"load_seconds": time.perf_counter() - start, "peak_rss": peak_rss()}
    if args.engine == "torchinfer":
        loaded["token_bytes"] = engine.token_bytes
    print(json.dumps(loaded), file=answers, flush=True)
    seeds = itertools.count(1)
    for line in sys.stdin:
        found = measure(engine, json.loads(line), seeds)
        print(json.dumps(found | {"peak_rss": peak_rss()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
