"""What penalties add to a step: the host collects the edits of all requests' logits, then torch applies them.

    python benchmarks/penalties.py
    python benchmarks/penalties.py --requests 32 --tokens 1280 --vocabulary 128256

Random ids, so that nearly every token of a prompt is an edit of its own. Copying the logits once is the least that it
takes. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from torchinfer.logit_edits import collect_edits
from torchinfer.request import SamplingParams
from torchinfer.sampler import apply_edits
from torchinfer.sequence import Sequence

KINDS: dict[str, dict[str, float]] = {
    "repetition": {"repetition_penalty": 1.1},
    "presence and frequency": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "all three": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
}
OUTPUT_SHARE = 5  # one token of so many was sampled
HIDDEN = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1280, help="of each request so far")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a step of the engine
    logits = torch.randn(args.requests, args.vocabulary)
    table, ids = torch.randn(args.vocabulary, HIDDEN).bfloat16(), torch.randint(args.vocabulary, (args.requests,))
    results = {"embedding": milliseconds(lambda: functional.embedding(ids, table), args.repeats)}
    results["copy of the logits"] = milliseconds(logits.clone, args.repeats)
    for name, params in KINDS.items():
        sampled = [make_sequence(args.tokens, args.vocabulary, params) for _ in range(args.requests)]
        edits = collect_edits(sampled)
        assert edits is not None
        arrays = [torch.from_numpy(array) for array in edits.arrays]
        results[f"{name}: collect"] = milliseconds(lambda sampled=sampled: collect_edits(sampled), args.repeats)
        results[f"{name}: apply"] = milliseconds(lambda arrays=arrays: apply_edits(logits, *arrays), args.repeats)
        print(f"{name}: {len(edits.row):,} edits")
    for name, value in results.items():
        print(f"{name:32} {value:8.3f} ms")
    print(json.dumps({**vars(args), "milliseconds": results}))


def make_sequence(num_tokens: int, vocabulary: int, params: dict[str, float]) -> Sequence:
    ids = torch.randint(vocabulary, (num_tokens,)).tolist()
    num_prompt = num_tokens - num_tokens // OUTPUT_SHARE
    facts = {"priority": 0, "arrival": 0, "stop_ids": frozenset({2}), "max_length": 2 * num_tokens}
    sequence = Sequence("r", 0, ids[:num_prompt], SamplingParams(**params), **facts, sampling_record=b"")
    sequence.tokens += ids[num_prompt:]
    return sequence


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    main()
