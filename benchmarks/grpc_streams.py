"""gRPC against the same engine in-process, and a thousand streams at once.

1. `--streams` concurrent greedy streams of `--max-tokens` tokens: `LLM.generate` in a process of its own, then a
   server with an asyncio client beside it, in turn, `--pairs` times. The ceiling is the in-process figure.
2. `--burst` streams opened at once on a bounded queue, several times: each must end, and the server's memory must
   not grow from one round to the next.

    OMP_NUM_THREADS=1 python benchmarks/grpc_streams.py --model recipes/tiny-llama

One thread, because the model is tiny and the client needs a core too. A larger model, with prompts of ids:

    python benchmarks/grpc_streams.py --model DIR --quantization int8_w8a8 --streams 32 --prompt-tokens 128 --burst 0
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from torchinfer.serving import inference_pb2 as pb
from torchinfer.serving import inference_pb2_grpc
from torchinfer.serving.client import Client

PROMPTS = ["def main(", "class Parser(", "import os\nimport ", "for name in sorted(", "try:\n    ", "return "]
IN_PROCESS = """
import json, sys, time
from torchinfer import LLM, SamplingParams
model, quantization, max_tokens, prompts = json.loads(sys.argv[1])
params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
options = dict(device="cpu", quantization=quantization, max_num_requests=len(prompts), progress=False)
with LLM(model, **options) as llm:
    llm.generate(prompts[:4], params)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    print(sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start))
"""


class Server:
    """`torchinfer serve` in a process of its own."""

    def __init__(
        self, model: Path, max_num_requests: int, dtype: str = "auto", quantization: str | None = None
    ) -> None:
        command = [sys.executable, "-m", "torchinfer.cli", "serve", "--model", str(model), "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", "0", "--max-queue", "1024", "--no-progress"]
        command += ["--log-level", "warning"]
        command += ["--max-num-requests", str(max_num_requests), "--dtype", dtype]
        command += ["--quantization", quantization] if quantization else []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.target = next(word for word in self._process.stdout.readline().split() if word.startswith("127.0.0.1:"))
        with Client(self.target) as client:
            client.wait_until_serving(300)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def memory_mib(self) -> float:
        """Resident memory of the server and its engine now."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task").glob("*/children")
        pids = [pid, *(int(child) for path in children for child in path.read_text().split())]
        pages = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def make_prompts(count: int, num_tokens: int) -> list[str] | list[list[int]]:
    """Texts, or prompts of `num_tokens` ids."""
    if not num_tokens:
        return [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    return [[4 + (31 * index + 7 * at) % 1000 for at in range(num_tokens)] for index in range(count)]


def request_of(prompt: str | list[int], params: pb.SamplingParams) -> pb.GenerateRequest:
    if isinstance(prompt, str):
        return pb.GenerateRequest(text=prompt, params=params)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), params=params)


async def stream_all(
    target: str, prompts: Sequence[str] | Sequence[list[int]], max_tokens: int
) -> tuple[float, list[int]]:
    """Seconds for all streams, and the tokens of each; -1 for a stream that did not finish."""
    message = pb.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)

    async def one(stub: inference_pb2_grpc.InferenceStub, prompt: str | list[int]) -> int:
        count, is_finished = 0, False
        async for response in stub.Generate(request_of(prompt, message), timeout=300):
            count += len(response.chunk.token_ids)
            is_finished = is_finished or response.HasField("finish")
        return count if is_finished else -1

    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        start = time.perf_counter()
        counts = await asyncio.gather(*(one(stub, prompt) for prompt in prompts))
        return time.perf_counter() - start, list(counts)


def in_process(model: Path, quantization: str | None, prompts: Any, max_tokens: int) -> float:
    """Tokens a second of LLM.generate."""
    argument = json.dumps([str(model), quantization, max_tokens, prompts])
    result = subprocess.run([sys.executable, "-c", IN_PROCESS, argument], capture_output=True, text=True, check=True)
    return float(result.stdout)


def served(model: Path, quantization: str | None, prompts: Any, max_tokens: int) -> float:
    """Tokens a second of as many streams of one client process."""
    with Server(model, len(prompts), quantization=quantization) as server:
        asyncio.run(stream_all(server.target, prompts[:4], max_tokens))
        seconds, counts = asyncio.run(stream_all(server.target, prompts, max_tokens))
    assert counts == [max_tokens] * len(prompts), "a stream lost tokens"
    return sum(counts) / seconds


def burst(model: Path, num_streams: int, rounds: int, dtype: str) -> dict[str, object]:
    """Open all streams at once, `rounds` times."""
    with Server(model, 64, dtype) as server:
        memory, lost = [], 0
        for index in range(rounds):
            seconds, counts = asyncio.run(stream_all(server.target, make_prompts(num_streams, 0), 16))
            lost += sum(count != 16 for count in counts)
            memory.append(round(server.memory_mib(), 1))
            print(
                f"round {index}: {num_streams} streams in {seconds:.1f} s, server memory {memory[-1]} MiB, lost {lost}"
            )
    return {"streams": num_streams, "lost": lost, "memory_mib": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=0, help="prompts of so many ids, for any model")
    parser.add_argument("--quantization")
    parser.add_argument("--burst", type=int, default=1000, help="0: none")
    parser.add_argument("--rounds", type=int, default=5)
    # In bfloat16 oneDNN's caches, which are bounded, fill up over the first rounds and hide a leak.
    parser.add_argument("--burst-dtype", default="float32")
    args = parser.parse_args()
    prompts = make_prompts(args.streams, args.prompt_tokens)
    pairs = []
    for _ in range(args.pairs):
        ceiling = in_process(args.model, args.quantization, prompts, args.max_tokens)
        got = served(args.model, args.quantization, prompts, args.max_tokens)
        pairs.append((ceiling, got))
        print(f"in-process {ceiling:7.0f} tokens/s, gRPC {got:7.0f} tokens/s, {got / ceiling:.2f} of it")
    ratio = statistics.median(got / ceiling for ceiling, got in pairs)
    print(f"median of {args.pairs} pairs: {ratio:.2f} of in-process")
    result = burst(args.model, args.burst, args.rounds, args.burst_dtype) if args.burst else None
    print(json.dumps({"benchmark": "grpc_streams", "streams": args.streams, "ratio": round(ratio, 3), "burst": result}))


if __name__ == "__main__":
    main()
