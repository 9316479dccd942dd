"""Random steps on XLA after the warm-up: arrivals, aborts, lengths from 1 to 500. Counts compilations.

PJRT_DEVICE=CPU python benchmarks/xla_steps.py --model recipes/tiny-llama
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from torchinfer.config import EngineConfig
from torchinfer.engine import Engine
from torchinfer.launch import start_engine
from torchinfer.request import Request, SamplingParams


def random_request(rng: random.Random, index: int, vocab: int) -> Request:
    """Any length of prompt, any kind of sampling."""
    params = SamplingParams(
        max_tokens=rng.randint(1, 60),
        temperature=rng.choice([0.0, 0.8]),
        top_p=rng.choice([1.0, 0.9]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        logprobs=rng.choice([None, None, 3]),
        prompt_logprobs=rng.choice([None, None, 2]),
        ignore_eos=True,
    )
    return Request(f"r{index}", tuple(rng.randrange(vocab) for _ in range(rng.randint(1, 500))), params)


def run(engine: Engine, num_steps: int) -> tuple[int, int]:
    """Requests that came and requests that were aborted in `num_steps` steps."""
    rng = random.Random(0)
    num_requests = num_aborts = 0
    while engine.stats().num_steps < num_steps:
        if rng.random() < 0.3 and engine.num_open < 20:
            engine.add(random_request(rng, num_requests, engine.info.vocab_size))
            num_requests += 1
        if rng.random() < 0.05 and num_requests:
            engine.abort(f"r{rng.randrange(num_requests)}")
            num_aborts += 1
        engine.step()
    return num_requests, num_aborts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-num-requests", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=128)
    args = parser.parse_args()
    start = time.perf_counter()
    engine = start_engine(
        EngineConfig(
            model=args.model,
            device="xla",
            max_num_requests=args.max_num_requests,
            max_num_batched_tokens=args.max_num_batched_tokens,
        )
    )
    warm = engine.stats().num_compilations
    print(f"warm-up: {warm} compilations in {time.perf_counter() - start:.0f} s; ceiling: 0 more")
    num_requests, num_aborts = run(engine, args.steps)
    more = engine.stats().num_compilations - warm
    print(f"{args.steps} steps, {num_requests} requests, {num_aborts} aborts: {more} compilations")
    result = {"benchmark": "xla_steps", "steps": args.steps, "warm_up": warm, "compilations": more}
    print(json.dumps(result | {"requests": num_requests, "aborts": num_aborts}))


if __name__ == "__main__":
    main()
