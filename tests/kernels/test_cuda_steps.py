"""A step on CUDA, where there is no GPU: on tensors without memory, which cannot be asked for a value, through the own
launches of the ports, which are noted. So whatever waits for the device fails here, and whatever differs between two
steps of a bucket, which a graph would not see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from torchinfer import SamplingParams, kernels
from torchinfer.batch import Batch, KVCache
from torchinfer.kv_cache.tensors import make_layer
from torchinfer.loader.schemes import quantize_model
from torchinfer.models import build_model
from torchinfer.models.config import ModelConfig
from torchinfer.models.decoder import Decoder
from torchinfer.runner import EagerRunner
from torchinfer.scheduler import Chunk, Plan
from torchinfer.sequence import Sequence
from torchinfer.step_input import sampling_record
from torchinfer.testing import tiny_config

META = torch.device("meta")
PAGE_TABLE = np.zeros((8, 16), np.int32)
EVERYTHING = {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "logprobs": 3, "repetition_penalty": 1.2}
MODELS = [
    ("llama", "int8_w8a8", torch.int8, "dropless"),
    ("gemma2", "fp8_w8a8", torch.bfloat16, "dropless"),
    ("llama-dynamic", "int4_g32", torch.float8_e4m3fn, "dropless"),
    ("qwen2-moe-window", "int8", torch.int8, "capacity"),
    ("mixtral", None, torch.bfloat16, "dropless"),
]


class Transfers(TorchDispatchMode):
    """Counts what goes between the host and the device, and refuses shapes that depend on values."""

    REFUSED = (
        "item",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "unique",
        "_local_scalar_dense",
        "repeat_interleave.Tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.num_in = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        assert not name.startswith(self.REFUSED), f"{name} waits for the device"
        result = func(*args, **kwargs)
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in [*given, *([result] if isinstance(result, Tensor) else [])]}
        if name.startswith("index") and "meta" in devices:
            is_bool = any(x.dtype == torch.bool for x in given[1:])
            assert not is_bool, f"{name} by a mask waits for the device"
        if devices == {"cpu", "meta"}:
            assert name.startswith(("copy_", "_to_copy", "to.")) and given[-1].device.type == "cpu", (
                f"{name} mixes devices"
            )
            self.num_in += 1
        return result


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is launched: kernel, grid, shapes of tensors, numbers. The ports of CUDA are those of the meta device."""
    found: list[Any] = []

    def at_grid(kernel: Any, grid: Any) -> Any:
        def note(*arguments: Any, **named: Any) -> None:
            values = {str(i): value for i, value in enumerate(arguments)} | named
            known = {k: (v.dtype, v.shape, v.stride()) if isinstance(v, Tensor) else v for k, v in values.items()}
            found.append((kernel.fn.__name__, grid, known))

        return note

    table = {}
    for op, backends in kernels.PORTS.items():
        if op in kernels.COMPOSED and "cuda" not in backends:
            continue
        port = "cuda" if "cuda" in backends else "reference"
        table[op] = getattr(import_module(f"torchinfer.kernels.{port}.{op}"), op)
    norm: Any = import_module("torchinfer.kernels.cuda.rms_norm")
    monkeypatch.setattr(type(norm.rms_norm_kernel), "__getitem__", at_grid)
    monkeypatch.setitem(kernels._loaded, "meta", table)
    monkeypatch.setitem(kernels._folders, "meta", "cuda")
    yield found


def make_runner(name: str, scheme: str | None, cache: torch.dtype, moe_mode: str) -> EagerRunner:
    raw = tiny_config(name)
    config = ModelConfig.from_dict(raw.to_dict() | {"architectures": [ARCHITECTURES[type(raw).__name__]]})
    with META:
        model: Decoder = build_model(config, moe_mode, 1.25)
    if scheme is not None:
        quantize_model(model, scheme, torch.device("cpu"))
    model.to(META, torch.bfloat16)
    model.prepare()
    caches = [
        make_layer(config, 40, 16, cache, None, lambda shape, dtype: torch.empty(shape, dtype=dtype, device=META))
        for _ in range(config.num_layers)
    ]
    return EagerRunner(model, caches, 16, META, table_width=16, max_num_requests=8, max_num_tokens=64, has_buckets=True)


ARCHITECTURES = {
    "LlamaConfig": "LlamaForCausalLM",
    "Gemma2Config": "Gemma2ForCausalLM",
    "Qwen2MoeConfig": "Qwen2MoeForCausalLM",
    "MixtralConfig": "MixtralForCausalLM",
}


def sequence(num_prompt: int, num_computed: int, row: int, **params: Any) -> Sequence:
    sampling = SamplingParams(**({"temperature": 0.0} | params))
    made = Sequence(
        "r",
        0,
        [5] * num_prompt,
        sampling,
        priority=0,
        arrival=0,
        stop_ids=frozenset(),
        max_length=200,
        sampling_record=sampling_record(sampling, 3),
    )
    made.num_computed, made.row = num_computed, row
    return made


def decode_plan(lengths: list[int], **params: Any) -> Plan:
    decodes = [sequence(1, length, row, **params) for row, length in enumerate(lengths)]
    is_greedy = all(s.is_greedy for s in decodes)
    return Plan(decodes, [0] * len(decodes), [], len(decodes), max(lengths), list(decodes), is_greedy)


def mixed_plan(**params: Any) -> Plan:
    """A decode, a whole prompt, a part of one, and the last token of one."""
    plan = decode_plan([30], **params)
    prompts = [sequence(20, 20, 1, **params), sequence(40, 17, 2, **params), sequence(9, 9, 3, **params)]
    starts, samples = (0, 3, 8), (True, False, True)
    plan.chunks = [
        Chunk(s, start, s.num_computed, is_last) for s, start, is_last in zip(prompts, starts, samples, strict=True)
    ]
    plan.num_tokens += sum(chunk.end - chunk.start for chunk in plan.chunks)
    plan.sampled += [prompts[0], prompts[2]]
    return plan


@pytest.mark.parametrize("model", MODELS, ids=[f"{m[0]}-{m[1]}" for m in MODELS])
def test_a_captured_step_is_the_same_whatever_the_requests(model: Any, launches: list[Any]) -> None:
    runner = make_runner(*model)
    graphs: Any = runner._graphs
    noted, transfers = [], []
    for lengths in ([1, 2, 3], [200, 7, 17, 100]):
        plan = decode_plan(lengths)
        shape = graphs.shape_of(plan)
        with torch.inference_mode(), Transfers() as counted:
            hidden, packed = graphs.run(plan, PAGE_TABLE, shape)
        assert len(hidden) == 4 and packed.untyped_storage() is not None and len(packed) == shape.size
        noted.append(launches.copy())
        transfers.append(counted.num_in)
        launches.clear()
    assert noted[0] == noted[1] and len(noted[0]) > 20
    names = [name for name, _, _ in noted[0]]
    assert {*names} >= {"decode_kernel", "merge_kernel", "rms_norm_kernel"} and "chunk_kernel" not in names
    # Rotation and cache are one launch of a layer.
    assert names.count("rotate_and_write_kernel") == names.count("decode_kernel") == len(runner._kv_caches)
    assert not {"rotary_kernel", "write_kernel"} & {*names}
    assert transfers == [1, 1]


@pytest.mark.parametrize("model", MODELS, ids=[f"{m[0]}-{m[1]}" for m in MODELS])
@pytest.mark.parametrize(
    ("params", "num_transfers"),
    # Beside the step: edits of logits are four, the targets of three prompts' log-probabilities one each; a prompt that
    # has one token to compute has none left.
    [({}, 1), (EVERYTHING, 5), ({"prompt_logprobs": 2}, 3)],
    ids=["greedy", "everything", "prompt-logprobs"],
)
def test_no_step_waits_for_the_device(
    model: Any, params: dict[str, Any], num_transfers: int, launches: list[Any]
) -> None:
    runner = make_runner(*model)
    with Transfers() as counted:
        launched = runner.launch(mixed_plan(**params), PAGE_TABLE)
    assert counted.num_in == num_transfers
    assert len(launched.ids) == 3 and (launched.logprobs is not None) == ("logprobs" in params)
    assert {"chunk_kernel", "decode_kernel"} <= {name for name, _, _ in launches}
    launches.clear()
    with Transfers() as counted:
        launched = runner.launch(decode_plan([4, 40, 100], **params), PAGE_TABLE)
    assert counted.num_in == 1 + 4 * ("repetition_penalty" in params) and len(launched.ids) == 3
    names = [name for name, _, _ in launches]
    assert names.count("sample_kernel") == ("top_p" in params)


@pytest.mark.parametrize("heads", [(71, 1), (8, 2)])
def test_a_step_of_many_tokens_is_within_the_limits_of_a_grid(heads: tuple[int, int], launches: list[Any]) -> None:
    num_tokens, (num_heads, num_kv_heads) = 200_000, heads
    ints = torch.empty(2, dtype=torch.int32, device=META)
    batch = Batch(*[ints] * 6, ints[:1], ints.view(1, 2), 16, 0, 0, ((0, 0, num_tokens, num_tokens),))
    query = torch.empty(num_tokens, num_heads, 64, dtype=torch.bfloat16, device=META)
    kv_cache = KVCache(torch.empty(2, 9, 16, num_kv_heads, 64, dtype=torch.bfloat16, device=META))
    kernels.paged_attention(query, kv_cache, batch, scale=0.1)
    key, angles, slot = query[:, :num_kv_heads], query[:, 0, :8].float(), query[:, 0, 0].int()
    kernels.write_kv_pages(key, key, kv_cache, slot)
    kernels.rotate_and_write(query, key, angles, angles, False, kv_cache, slot)
    kernels.rms_norm(query, query[0, 0], 1e-6)
    names = {"chunk_kernel", "write_kernel", "rotate_and_write_kernel", "rms_norm_kernel"}
    assert {name for name, _, _ in launches} == names
    for name, grid, _ in launches:
        assert all(size <= 65_535 for size in grid[1:]) and grid[0] < 2**31, (name, grid)


PROGRAM = """
import json, sys
import numpy as np, torch, triton
from torchinfer.batch import KVCache
from torchinfer.kernels.cuda.offline import OfflineDriver
from torchinfer.kernels.cuda.paged_attention import paged_attention
from torchinfer.kernels.cuda.quantized_matmul import quantized_matmul
from torchinfer.kernels.cuda.rms_norm import rms_norm
from torchinfer.kernels.cuda.rotate_and_write import rotate_and_write
from torchinfer.kernels.cuda.sample import sample
from torchinfer.quantization import SCHEMES
from torchinfer.step_input import StepShape, unpack, unpack_sampling

triton.runtime.driver.set_active(OfflineDriver((9, 0)))
found = set()
def note(**named):
    found.add(named["fn"].name + str(named["key"]))
    return True  # as if somebody else compiled it
triton.knobs.runtime.jit_cache_hook = note

def step(tokens, rows, width, is_decode=False):
    shape = StepShape(tokens, rows, width, is_decode)
    memory = torch.zeros(shape.size, dtype=torch.int32)
    batch = unpack(memory[: shape.num_forward], shape, 16, None).batch
    x = torch.zeros(tokens, 256, dtype=torch.bfloat16)
    heads = torch.zeros(tokens, 12, 64, dtype=torch.bfloat16)
    specs = SCHEMES["int8"].tensors(128, 256)
    weight = SCHEMES["int8"].weight({n: torch.ones(s.shape).to(s.dtype) for n, s in specs.items()}, 256, ())
    rms_norm(x, x[0], 1e-6, 0.0)
    quantized_matmul(x, weight)
    angles = torch.zeros(tokens, 32)
    query = rotate_and_write(heads[:, :10], heads[:, 10:], angles, angles, False, cache, batch.slot)
    paged_attention(query, cache, batch, 0.1, None, None)
    sample(torch.zeros(rows, 160), unpack_sampling(memory[shape.num_forward :]), True)

cache = KVCache(torch.zeros(2, 9, 16, 2, 64, dtype=torch.int8), torch.zeros(2, 9, 16, 2))
counts = []
for sizes in eval(sys.argv[1]):
    step(*sizes)
    counts.append(len(found))
print(json.dumps(counts))
"""


def test_sizes_of_a_step_do_not_compile_a_kernel_anew() -> None:
    # Tokens, rows, pages of a row: odd ones, ones, multiples of 16, and views into a step at any alignment.
    decodes = [(8, 8, 16, True), (1, 1, 1, True), (3, 3, 7, True), (2, 2, 33, True), (16, 16, 128, True)]
    chunks = [(16, 2, 16), (9, 1, 1), (13, 3, 5), (15, 1, 128), (12, 4, 9)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, repr(decodes + chunks)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == [6] * 4 + [7] + [8] * len(chunks)
    # Six kernels, one of them anew for tiles of 16 rows, and with chunks of several tokens one more.
