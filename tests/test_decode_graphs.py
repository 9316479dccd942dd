"""Capture and replay without a GPU: a graph in software notes every operation of a step with its tensors, and computes
them again in their memory, as CUDA does. What a step takes from the host, or from tensors that do not stay, shows then.

On a GPU, where nobody has run them yet, the last tests do the same with CUDA's own graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchinfer import LLM, DeviceError, SamplingParams, kernels, startup
from torchinfer.decode_graphs import DecodeGraphs
from torchinfer.llm import Output
from torchinfer.runner import EagerRunner
from torchinfer.step_input import StepShape
from torchinfer.testing import save_random_checkpoint, tiny_config

OPTIONS: dict[str, Any] = {"max_num_requests": 6, "max_num_batched_tokens": 16, "max_model_len": 96, "page_size": 8}
OPTIONS |= {"progress": False}


class SoftwareGraph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.num_replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        # Views, and what is written in place, have no memory of their own.
        is_own = all(x.untyped_storage().data_ptr() not in given for x in made)
        self.operations.append((func, args, kwargs or {}, made if is_own else []))
        return result

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, made in self.operations:
            result = func(*args, **kwargs)
            for target, value in zip(made, tree_leaves(result), strict=False):
                target.copy_(value)


class FakeStream:
    """Everything happens at once."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def software_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SoftwareGraph]]:
    """torch.cuda's graphs on a CPU, all that are made; ops are the reference's, which this mode sees."""
    made: list[SoftwareGraph] = []

    @contextlib.contextmanager
    def capture(graph: SoftwareGraph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        made.append(graph)
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SoftwareGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("torchinfer.decode_graphs.LEAST_LENGTH", 40)
    table = {op: getattr(import_module(f"torchinfer.kernels.reference.{op}"), op) for op in kernels.PORTS}
    monkeypatch.setitem(kernels._folders, "cpu", "reference")
    monkeypatch.setitem(kernels._loaded, "cpu", table)
    yield made


class CapturingRunner(EagerRunner):
    """As on CUDA."""

    def __init__(self, *arguments: Any, **sizes: Any) -> None:
        super().__init__(*arguments, **(sizes | {"has_buckets": True}))
        self.overlaps = True  # so that ids are fed on the device

    def warm_up(self, progress: bool) -> None:
        assert self._graphs is not None
        self._graphs.capture(progress)


def generate(folder: Path, **options: Any) -> list[Output]:
    prompts = [[3 + (7 * i + 5 * k) % 150 for k in range(2 + 5 * i)] for i in range(8)]
    params = [
        SamplingParams(max_tokens=4 + 2 * i, temperature=0.8 * (i % 2), top_p=0.9, seed=i, logprobs=2, ignore_eos=True)
        for i in range(8)
    ]
    with LLM(folder, **OPTIONS, **options) as llm:
        return llm.generate(prompts, params)


def compare_replays(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From now on each replay must have the bits of the same step, computed op by op; how many were compared."""
    run, compared = DecodeGraphs.run, []

    def both(self: DecodeGraphs, plan: Any, page_table: Any, shape: StepShape) -> tuple[Tensor, Tensor]:
        hidden, packed = run(self, plan, page_table, shape)
        replayed = hidden.clone()
        computed = self._forward(packed, shape)  # which writes the same keys and values
        assert torch.equal(replayed.view(torch.uint8), computed.view(torch.uint8)), shape
        compared.append(shape)
        return replayed, packed

    monkeypatch.setattr(DecodeGraphs, "run", both)
    return lambda: len(compared)


def assert_equal(outputs: list[Output], expected: list[Output], tolerance: float) -> None:
    for output, truth in zip(outputs, expected, strict=True):
        assert output.token_ids == truth.token_ids
        for mine, theirs in zip(output.logprobs or [], truth.logprobs or [], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=tolerance)


@pytest.mark.parametrize(("name", "cache"), [("llama", "auto"), ("gemma2", "int8"), ("llama-dynamic", "auto")])
def test_replays_of_captured_steps_give_the_ids_of_steps_that_are_computed(
    name: str, cache: str, software_graphs: list[SoftwareGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_checkpoint(tiny_config(name), tmp_path)
    expected = generate(tmp_path, device="cpu", kv_cache_dtype=cache)
    monkeypatch.setattr(startup, "EagerRunner", CapturingRunner)
    num_compared = compare_replays(monkeypatch)
    outputs = generate(tmp_path, device="cpu", kv_cache_dtype=cache)
    assert num_compared() > 15
    assert len(software_graphs) == 8  # 1, 2, 4, 6 rows of 5 and 12 pages
    assert all(len(graph.operations) > 50 for graph in software_graphs)
    assert sum(graph.num_replays for graph in software_graphs) > 15
    assert_equal(outputs, expected, 1e-4)


class CompilationError(Exception):
    """Triton's are no RuntimeErrors."""


@pytest.mark.parametrize("kind", [RuntimeError, CompilationError])
def test_a_step_that_cannot_be_captured_says_how_to_go_without(
    kind: type[Exception], software_graphs: list[SoftwareGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def refuse(graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        raise kind("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(startup, "EagerRunner", CapturingRunner)
    save_random_checkpoint(tiny_config("llama"), tmp_path)
    with pytest.raises(DeviceError, match=r"6 requests with 12 pages .* not permitted .* --no-cuda-graphs"):
        generate(tmp_path, device="cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2-moe"])
def test_graphs_of_a_gpu_give_the_ids_of_its_eager_steps_and_of_the_cpu(name: str, tmp_path: Path) -> None:
    save_random_checkpoint(tiny_config(name), tmp_path)
    expected = generate(tmp_path, device="cpu")
    for cuda_graphs in (False, True):
        assert_equal(generate(tmp_path, device="cuda", cuda_graphs=cuda_graphs), expected, 1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("name", "quantization", "cache"),
    [
        ("llama", None, "auto"),
        ("gemma2", "fp8_w8a8", "int8"),
        ("llama-dynamic", "int4_g32", "fp8"),
        ("mixtral", None, "auto"),
    ],
)
def test_graphs_of_a_gpu_have_the_bits_of_its_eager_steps(
    name: str, quantization: str | None, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_checkpoint(tiny_config(name), tmp_path)
    num_compared = compare_replays(monkeypatch)
    generate(tmp_path, device="cuda", dtype="bfloat16", quantization=quantization, kv_cache_dtype=cache)
    assert num_compared() > 15


@pytest.mark.cuda
def test_on_a_gpu_no_launch_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = EagerRunner.launch

    def strict(self: EagerRunner, *arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    save_random_checkpoint(tiny_config("qwen2-moe"), tmp_path)
    expected = generate(tmp_path, device="cuda")
    monkeypatch.setattr(EagerRunner, "launch", strict)
    assert_equal(generate(tmp_path, device="cuda"), expected, 1e-2)


@pytest.mark.cuda
def test_on_a_gpu_the_ids_of_a_step_come_before_a_later_one_has_ended() -> None:
    from torchinfer.device import start_copies

    ids = torch.arange(8, device="cuda")
    torch.cuda.synchronize()
    (copy,), wait = start_copies([ids])
    torch.cuda._sleep(2_000_000_000)  # cycles: a second or more
    after = torch.cuda.Event()
    after.record()
    wait()
    assert copy.tolist() == list(range(8)) and not after.query()
    torch.cuda.synchronize()
