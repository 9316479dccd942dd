"""Run by test_spmd.py in a process for itself, which can choose XLA's chips only once: NUM_CHIPS IS_WARM CASES.

Each case is a checkpoint and options; for each a line of JSON: ids and log-probabilities of the chips and of the CPU,
compilations after the warm-up, what experts dropped, and the matrices that are packed. Without IS_WARM programs are
compiled when they are first needed, which are fewer. An option is not the engine's: with `packs` chips pack what a
TPU's kernels take.
"""

from __future__ import annotations

import json
import random
import sys
import weakref
from collections.abc import Sequence
from typing import Any

from torchinfer import LLM, SamplingParams, startup
from torchinfer.models.layers import PreparedMatrix
from torchinfer.parallel import DividedModel, tensors_of
from torchinfer.request import TokenLogprobs
from torchinfer.spmd_matrices import prepare_chips
from torchinfer.xla_runner import XlaRunner

COMMON: dict[str, Any] = {
    "dtype": "float32",
    "max_num_requests": 8,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "progress": False,
}
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
# Something to draw, edit and tell in the rows of every chip, of 2, 4 or 8.
WARM = [
    SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=1, repetition_penalty=1.2),
    SamplingParams(**GREEDY, logprobs=2, prompt_logprobs=1),
    SamplingParams(**GREEDY),
    SamplingParams(**GREEDY | {"temperature": 1.0}, top_k=7, seed=2, logprobs=3),
    SamplingParams(**GREEDY, logit_bias={5: 3.0}, presence_penalty=0.5, frequency_penalty=0.5, logprobs=1),
    SamplingParams(max_tokens=8, temperature=1.2, min_p=0.01, seed=3, min_tokens=8, stop_token_ids=list(range(64))),
    SamplingParams(**GREEDY, frequency_penalty=1.5, prompt_logprobs=0),
    SamplingParams(**GREEDY | {"temperature": 0.7}, top_k=4, seed=4, logit_bias={159: -100.0}, logprobs=0),
]
packed: list[str] = []


def main() -> None:
    startup.prepare_chips = pack
    num_chips, is_warm, cases = int(sys.argv[1]), bool(int(sys.argv[2])), json.loads(sys.argv[3])
    if not is_warm:
        XlaRunner.warm_up = lambda self, progress: None  # type: ignore[method-assign]
    for model, options in cases:
        packs, is_among = options.pop("packs", False), options.pop("expert_parallel", False)
        startup.tensor_cores = lambda device, packs=packs: 0 if packs and device.type == "xla" else None
        chips = run(model, is_warm, device="xla", tensor_parallel_size=num_chips, expert_parallel=is_among, **options)
        cpu = run(model, is_warm, device="cpu", **options)
        print(json.dumps({"chips": chips, "cpu": cpu}), flush=True)


def run(model: str, is_warm: bool, **options: Any) -> dict[str, Any]:
    rng = random.Random(0)
    params = WARM if is_warm else [SamplingParams(**GREEDY)] * 3
    prompts = [[rng.randrange(3, 160) for _ in range(rng.randint(1, 40))] for _ in params]
    packed.clear()
    with LLM(model, **COMMON | options) as llm:
        before = llm.stats().num_compilations
        outputs = llm.generate(prompts, params)
        stats = llm.stats()
    return {
        "ids": [output.token_ids for output in outputs],
        "logprobs": [values_of(output.logprobs) for output in outputs],
        "prompt_logprobs": [values_of(output.prompt_logprobs) for output in outputs],
        "compiled": stats.num_compilations - before,
        "dropped": stats.num_dropped_expert_tokens,
        "packed": list(packed),
    }


def values_of(logprobs: Sequence[TokenLogprobs | None] | None) -> list[Any]:
    """Of each position the token, its rank, and the ids of the most probable; then all log-probabilities."""
    known = [each for each in logprobs or () if each is not None]
    ids = [[each.token_id, each.rank, *(token for token, _ in each.top)] for each in known]
    return [ids, [value for each in known for value in (each.logprob, *(value for _, value in each.top))]]


def pack(model: DividedModel, *arguments: Any) -> None:
    held = {name: weakref.ref(tensor) for name, tensor in model.tensors.items()}
    prepare_chips(model, *arguments)
    packed.extend(name for name, module in model.local.named_modules() if isinstance(module, PreparedMatrix))
    assert all(tensor.is_meta for tensor in tensors_of(model.whole).values())
    left = {name for name, tensor in held.items() if tensor() is not None}
    assert left == {name for name in held if not name.startswith(tuple(packed))}


if __name__ == "__main__":
    main()
