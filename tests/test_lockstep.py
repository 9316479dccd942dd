"""Several processes with one engine: each computes what the first one is asked, and none goes on alone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers

from torchinfer import LLM
from torchinfer.config import EngineConfig
from torchinfer.engine import Engine
from torchinfer.engine_info import ModelInfo
from torchinfer.errors import ConfigError, EngineError
from torchinfer.fake_runner import FakeRunner
from torchinfer.kv_cache.pages import PagePool
from torchinfer.launch import start_engine
from torchinfer.link import Link
from torchinfer.lockstep import Group, LeadingEngine, follow
from torchinfer.request import Request, SamplingParams, TokenEvent
from torchinfer.scheduler import Scheduler
from torchinfer.testing import TINY, save_random_checkpoint

VOCAB = 50
SIZES: dict[str, Any] = {"max_num_requests": 8, "max_num_batched_tokens": 16, "max_model_len": 64, "dtype": "float32"}
FOLLOW = "import sys; from torchinfer.cli import main; sys.exit(main())"


def parts_of_an_engine(vocab_size: int = VOCAB) -> tuple[Any, ...]:
    scheduler = Scheduler(
        PagePool(40), page_size=4, max_num_requests=4, max_num_batched_tokens=16, max_model_len=64, prefix_cache=None
    )
    info = ModelInfo("fake", "Fake", 0, VOCAB, 64, "int", "cpu", 40, 4, 4, (), False, "int")
    return scheduler, FakeRunner(40, 4, vocab_size, overlaps=True), info, None


@contextmanager
def followed(vocab_size: int = VOCAB) -> Iterator[tuple[LeadingEngine, list[TokenEvent], list[Exception]]]:
    """A leading engine, the events of the one that follows it in a thread, and what that ended with."""
    one, other = socket.socketpair()
    link, events, failures = Link(other, "host 0"), [], []
    follower = Engine(*parts_of_an_engine(vocab_size))
    step = follower.step

    def recorded() -> list[TokenEvent]:
        found = step()
        events.extend(found)
        return found

    def run() -> None:
        try:
            follow(follower, link)
        except EngineError as error:
            failures.append(error)
            link.close()

    follower.step = recorded  # type: ignore[method-assign]
    thread = threading.Thread(target=run)
    thread.start()
    leading = LeadingEngine(Group(True, [Link(one, "host 1")]), *parts_of_an_engine())
    try:
        yield leading, events, failures
    finally:
        leading.close()
        thread.join(10)
        assert not thread.is_alive()


def test_a_follower_takes_the_same_steps_with_the_same_tokens() -> None:
    rng = random.Random(0)
    found: list[TokenEvent] = []
    with followed() as (engine, events, failures):
        for number in range(12):
            prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 20)))
            params = SamplingParams(
                max_tokens=rng.randint(1, 9),
                n=rng.randint(1, 3),
                logit_bias={7: 0.25},
                stop_token_ids=(3,),
                seed=number,
            )
            engine.add(Request(f"r{number}", prompt, params, priority=number % 2))
            found += engine.step()
            if number % 5 == 4:
                engine.abort(f"r{number}")
                assert engine.stats().num_output_tokens > 0
        while engine.has_work:
            found += engine.step()
    assert not failures
    assert len(found) > 50
    assert events == found


def test_other_tokens_end_the_follower_and_then_the_leader() -> None:
    with followed(vocab_size=VOCAB - 1) as (engine, _, failures):
        engine.add(Request("r", (1, 2, 3), SamplingParams(max_tokens=60)))
        with pytest.raises(EngineError, match="host 1, which computes with this process, is gone: its log says why"):
            for _ in range(10_000):
                engine.step()
                time.sleep(0.001)
    (failure,) = failures
    assert str(failure) == "this process has other tokens than host 0: their weights, versions or devices differ"


def agreement(*facts: dict[str, Any]) -> list[str]:
    """What processes are told, the first one first; nothing where they fit together."""
    pairs = [socket.socketpair() for _ in facts[1:]]
    groups = [Group(True, [Link(one, f"host {at + 1}") for at, (one, _) in enumerate(pairs)])]
    groups += [Group(False, [Link(other, "host 0")]) for _, other in pairs]
    told = [""] * len(facts)

    def run(index: int) -> None:
        try:
            groups[index].agree(facts[index])
            assert groups[index].least(10 - index) == 11 - len(facts)
        except (ConfigError, EngineError) as error:
            told[index] = str(error)
            groups[index].close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    for group in groups:
        group.close()
    return told


def test_processes_agree_on_the_least() -> None:
    assert agreement({"dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16"}) == [""] * 3


def test_what_differs_is_told_in_all_processes() -> None:
    first, same, other = agreement({"seed": 0, "dtype": "x"}, {"seed": 0, "dtype": "x"}, {"seed": 1, "dtype": "y"})
    assert "seed=1 in host 2, but 0 in the first: start all with the same" in first
    assert "dtype='y' in host 2" in first
    assert same == "host 0, which computes with this process, is gone: its log says why"
    assert other.startswith("this process does not fit host 0:") and "seed=1" in other


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lockstep")
    kind, arguments = TINY["llama-tied"]
    save_random_checkpoint(getattr(transformers, kind)(**arguments), folder)
    return folder


def test_another_host_than_the_first_starts_no_engine_of_its_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "first.example,second.example")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    with pytest.raises(
        ConfigError, match=r"this is host 1 of 2 .* host 0, first\.example, is told: run `torchinfer serv"
    ):
        start_engine(EngineConfig(model=checkpoint, device="xla", tensor_parallel_size=2))
    with LLM(checkpoint, device="cpu", progress=False, **SIZES) as llm:  # one device is of one host
        assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


LEAD = """
import json, sys
from torchinfer import LLM, SamplingParams
model, options = sys.argv[1], json.loads(sys.argv[2])
params = [SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1),
          SamplingParams(max_tokens=6, temperature=0.8, top_k=9, seed=3, ignore_eos=True, frequency_penalty=0.5)]
with LLM(model, **options) as llm:
    print(json.dumps([output.token_ids for output in llm.generate([[5, 6, 7], [9] * 30], params)]), flush=True)
    if "--wait" in sys.argv:
        input()
        llm.generate([[1, 2]] * 40, params[0])
"""


def start(index: int, checkpoint: Path, port: int, *arguments: str, **changes: Any) -> subprocess.Popen[str]:
    """A process on a host of two: the first one with an LLM, the other one as `torchinfer serve`. XLA's CPU has no
    chips of other processes, so that each computes all of it on two of its own."""
    names = {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(index)}
    options = SIZES | {"hosts_port": port, "device": "xla", "tensor_parallel_size": 2, "progress": False} | changes
    if index == 0:
        command = ["-c", LEAD, str(checkpoint), json.dumps(options), *arguments]
    else:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "progress"]
        command = ["-c", FOLLOW, "serve", f"--model={checkpoint}", "--no-progress", *flags]
    environment = os.environ | names
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.xla
def test_two_processes_with_xla_have_the_ids_of_one_and_end_together(checkpoint: Path) -> None:
    pytest.importorskip("torch_xla")
    port = free_port()
    other, first = start(1, checkpoint, port), start(0, checkpoint, port)
    out, errors = first.communicate(timeout=240)
    told, other_errors = other.communicate(timeout=60)
    assert (first.returncode, other.returncode) == (0, 0), errors[-2000:] + other_errors[-2000:]
    assert told == "torchinfer host 1 of 2, for requests to localhost\n"
    params = [
        SamplingParams(max_tokens=6, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.8, top_k=9, seed=3, ignore_eos=True, frequency_penalty=0.5),
    ]
    with LLM(checkpoint, device="cpu", progress=False, **SIZES) as llm:
        expected = [output.token_ids for output in llm.generate([[5, 6, 7], [9] * 30], params)]
    assert out == f"{expected}\n"


@pytest.mark.xla
def test_a_signal_leaves_a_follower_at_work_and_its_death_ends_the_leader_s_requests(checkpoint: Path) -> None:
    pytest.importorskip("torch_xla")
    port = free_port()
    other, first = start(1, checkpoint, port), start(0, checkpoint, port, "--wait")
    assert first.stdout is not None and first.stdin is not None
    assert first.stdout.readline().startswith("[[")
    other.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.5)
    other.kill()
    other.wait(60)  # or the leader may end its request before the system has ended the follower
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.wait(60) == 1
    assert first.stderr is not None
    assert "host 1, localhost, which computes with this process, is gone: its log says why" in first.stderr.read()


@pytest.mark.xla
def test_hosts_with_other_options_do_not_start(checkpoint: Path) -> None:
    port = free_port()
    other, first = start(1, checkpoint, port, max_model_len=32), start(0, checkpoint, port)
    _, errors = first.communicate(timeout=120)
    _, other_errors = other.communicate(timeout=60)
    assert (first.returncode, other.returncode) == (1, 1)
    assert "max_model_len=32 in host 1, localhost, but 64 in the first: start all with the same" in errors
    assert "this process does not fit host 0, localhost: max_model_len=32" in other_errors
