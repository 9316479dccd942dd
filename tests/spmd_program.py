"""Run by test_spmd.py in a process for itself, which can choose XLA's chips only once: NUM_CHIPS IS_WARM CASES.

Each case is a checkpoint and options; for each a line of JSON: ids of the chips and of the CPU, compilations after the
warm-up, what experts dropped, and the matrices that are packed. Without IS_WARM programs are compiled when they are
first needed, which are fewer. An option is not the engine's: with `packs` chips pack what a TPU's kernels take.
"""

from __future__ import annotations

import json
import random
import sys
import weakref
from typing import Any

from torchinfer import LLM, SamplingParams, startup
from torchinfer.models.layers import PreparedMatrix
from torchinfer.parallel import DividedModel, tensors_of
from torchinfer.spmd_matrices import prepare_chips
from torchinfer.xla_runner import XlaRunner

COMMON: dict[str, Any] = {
    "dtype": "float32",
    "max_num_requests": 8,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "progress": False,
}
packed: list[str] = []


def main() -> None:
    startup.prepare_chips = pack
    num_chips, is_warm, cases = int(sys.argv[1]), bool(int(sys.argv[2])), json.loads(sys.argv[3])
    if not is_warm:
        XlaRunner.warm_up = lambda self, progress: None  # type: ignore[method-assign]
    for model, options in cases:
        packs = options.pop("packs", False)
        startup.tensor_cores = lambda device, packs=packs: 0 if packs and device.type == "xla" else None
        chips = run(model, is_warm, device="xla", tensor_parallel_size=num_chips, **options)
        cpu = run(model, is_warm, device="cpu", **options)
        print(json.dumps({"chips": chips, "cpu": cpu}), flush=True)


def run(model: str, is_warm: bool, **options: Any) -> dict[str, Any]:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 160) for _ in range(rng.randint(1, 40))] for _ in range(3)]
    params = [SamplingParams(max_tokens=8, temperature=0, ignore_eos=True) for _ in prompts]
    if is_warm:
        params[0] = SamplingParams(max_tokens=8, temperature=0.8, top_p=0.9, seed=1, repetition_penalty=1.2)
        params[1] = SamplingParams(max_tokens=8, temperature=0, logprobs=2, prompt_logprobs=1)
    packed.clear()
    with LLM(model, **COMMON | options) as llm:
        before = llm.stats().num_compilations
        outputs = llm.generate(prompts, params)
        stats = llm.stats()
    return {
        "ids": [output.token_ids for output in outputs],
        "compiled": stats.num_compilations - before,
        "dropped": stats.num_dropped_expert_tokens,
        "packed": list(packed),
    }


def pack(model: DividedModel, *arguments: Any) -> None:
    held = {name: weakref.ref(tensor) for name, tensor in model.tensors.items()}
    prepare_chips(model, *arguments)
    packed.extend(name for name, module in model.local.named_modules() if isinstance(module, PreparedMatrix))
    assert all(tensor.is_meta for tensor in tensors_of(model.whole).values())
    left = {name for name, tensor in held.items() if tensor() is not None}
    assert left == {name for name in held if not name.startswith(tuple(packed))}


if __name__ == "__main__":
    main()
