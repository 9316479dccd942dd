"""Greedy ids of random prompts, alone against batched, chunked, preempted and prefix-cached.

python benchmarks/batch_invariance.py --model recipes/tiny-llama           # float32 on the CPU
python benchmarks/batch_invariance.py --model recipes/tiny-llama --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch

from torchinfer import LLM, SamplingParams
from torchinfer.kv_cache import tensors
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.models.config import ModelConfig
from torchinfer.startup import DTYPES


def page_bytes(model: Path, dtype: torch.dtype) -> int:
    """Bytes of a cache page of 16 tokens."""
    config = ModelConfig.from_dict(Checkpoint.open(model).config)
    return tensors.page_bytes(config, 16, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()
    options = {"device": args.device, "dtype": args.dtype, "max_model_len": 256, "progress": False}
    options["kv_cache_dtype"] = args.kv_cache_dtype
    cache_dtype = tensors.resolve_cache_dtype(args.kv_cache_dtype, DTYPES[args.dtype], torch.device("cpu"))
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0, ignore_eos=True)
    rng = random.Random(0)

    def generate(prompts: list[list[int]], llm: LLM) -> list[list[int]]:
        return [output.token_ids for output in llm.generate(prompts, params)]

    ways: dict[str, list[list[int]]] = {}
    with LLM(args.model, **options, prefix_cache=False) as llm:
        vocab = llm.model_info.vocab_size
        prompts = [[rng.randrange(4, vocab) for _ in range(rng.randint(1, 200))] for _ in range(args.prompts)]
        alone = [generate([prompt], llm)[0] for prompt in prompts]
        ways["batched"] = generate(prompts, llm)
    with LLM(args.model, **options, prefix_cache=False, max_num_requests=16, max_num_batched_tokens=19) as llm:
        ways["chunked"] = generate(prompts, llm)
    # Room for about three of the prompts at a time.
    cramped = {"prefix_cache": False, "kv_cache_memory": page_bytes(args.model, cache_dtype) * 48}
    with LLM(args.model, **options, **cramped) as llm:
        ways["preempted"] = generate(prompts, llm)
        num_preemptions = llm.stats().num_preemptions
    with LLM(args.model, **options) as llm:
        ways["prefix-cached"] = []
        for start in range(0, len(prompts), 40):  # as many as the cache can hold
            generate(prompts[start : start + 40], llm)
            ways["prefix-cached"] += generate(prompts[start : start + 40], llm)
        num_hits = llm.stats().num_prefix_hit_tokens
    equal = {name: sum(a == b for a, b in zip(alone, ids, strict=True)) for name, ids in ways.items()}
    print("ceiling: all equal")
    for name, count in equal.items():
        print(f"{name:14s} {count} of {len(prompts)} equal the prompt alone")
    print(f"preemptions {num_preemptions}, prompt tokens found in the prefix cache {num_hits}")
    print(
        json.dumps(
            {
                "benchmark": "batch_invariance",
                "dtype": args.dtype,
                "kv_cache_dtype": args.kv_cache_dtype,
                "prompts": len(prompts),
                "equal": equal,
            }
        )
    )


if __name__ == "__main__":
    main()
