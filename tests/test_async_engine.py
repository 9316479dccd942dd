"""Threads and streams: every accepted request ends, whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from torchinfer.async_engine import AsyncEngine
from torchinfer.config import EngineConfig
from torchinfer.engine import Engine
from torchinfer.engine_info import ModelInfo
from torchinfer.engine_loop import let_torch_threads_sleep
from torchinfer.errors import CheckpointError, EngineError, OverloadedError, RequestError, StepMemoryError
from torchinfer.fake_runner import FakeRunner, expected_output
from torchinfer.kv_cache.pages import PagePool
from torchinfer.llm import LLM
from torchinfer.request import FinishReason, Request, SamplingParams, TokenEvent
from torchinfer.runner import Launched
from torchinfer.scheduler import Plan, Scheduler
from torchinfer.step_input import Ints

VOCAB = 50


class SlowRunner(FakeRunner):
    """A step takes a moment; after `fail_after` steps it raises."""

    fail_after = 10**9
    failure: Exception = RuntimeError("the device fell off")

    def launch(self, plan: Plan, page_table: Ints) -> Launched:
        time.sleep(0.002)
        self.fail_after -= 1
        if self.fail_after < 0:
            raise self.failure
        return super().launch(plan, page_table)


def with_engine(test: Callable[[AsyncEngine, Scheduler, SlowRunner], Awaitable[None]], max_queue: int = 8) -> None:
    pool = PagePool(400)
    scheduler = Scheduler(
        pool, page_size=4, max_num_requests=4, max_num_batched_tokens=64, max_model_len=256, prefix_cache=None
    )
    info = ModelInfo("fake", "Fake", 0, VOCAB, 256, "int", "cpu", 400, 4, 4, (), False, "int")
    runner = SlowRunner(400, 4, VOCAB)
    engine = AsyncEngine.in_thread(Engine(scheduler, runner, info, None), max_queue=max_queue)

    async def main() -> None:
        await asyncio.wait_for(test(engine, scheduler, runner), timeout=30)

    try:
        asyncio.run(main())
    finally:
        engine.close()


def request(name: str, max_tokens: int = 5) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_tokens=max_tokens))


def test_streams_of_many_requests_hold_their_own_tokens() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        async def consume(name: str, length: int) -> list[int]:
            stream = engine.submit(Request(name, tuple(range(length)), SamplingParams(max_tokens=6)))
            return [token async for event in stream for token in event.token_ids]

        lengths = range(1, 12)
        found = await asyncio.gather(*(consume(f"r{length}", length) for length in lengths))
        assert found == [expected_output(range(length), 6, VOCAB) for length in lengths]
        assert engine.num_open == 0

    with_engine(test)


def test_next_events_gives_all_that_are_ready_and_nothing_after_the_end() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        stream = engine.submit(request("a"))
        events = []
        while found := await stream.next_events():
            events += found
        assert sum(len(event.token_ids) for event in events) == 5 and events[-1].usage is not None
        assert await stream.next_events() == []

    with_engine(test)


def test_closing_a_stream_frees_its_pages() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        stream = engine.submit(request("a", max_tokens=200))
        await stream.next_events()
        assert scheduler.pool.num_available < scheduler.pool.num_usable
        await stream.aclose()
        while engine.num_open:
            await asyncio.sleep(0.001)
        assert scheduler.pool.num_available == scheduler.pool.num_usable

    with_engine(test)


def test_a_full_queue_is_overloaded_and_recovers() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        streams = [engine.submit(request(f"r{i}")) for i in range(6)]
        with pytest.raises(OverloadedError, match="6 requests are open, which is the limit") as error:
            engine.submit(request("one more"))
        assert error.value.retry_after_seconds > 0
        for stream in streams:
            while await stream.next_events():
                pass
        assert await engine.submit(request("one more")).next_events()

    with_engine(test, max_queue=2)


def test_a_bad_request_is_refused_at_once_and_harms_nobody() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        stream = engine.submit(request("good", max_tokens=20))
        with pytest.raises(RequestError, match=r"\[99\]"):
            engine.submit(Request("bad", (99,), SamplingParams()))
        with pytest.raises(RequestError, match="'good' is open already"):
            engine.submit(request("good"))
        ids = [token async for event in stream for token in event.token_ids]
        assert ids == expected_output((1, 2, 3), 20, VOCAB)

    with_engine(test)


def test_a_failed_step_ends_every_stream_with_an_error_and_refuses_new_ones() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        runner.fail_after = 5
        streams = [engine.submit(request(f"r{i}", max_tokens=200)) for i in range(8)]
        for stream in streams:
            events = [event async for event in stream]
            assert events[-1].finish_reason is FinishReason.ERROR
            assert "the device fell off" in (events[-1].error or "")
            assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]
        assert engine.failure is not None and "the device fell off" in engine.failure
        with pytest.raises(EngineError, match="the device fell off"):
            engine.submit(request("late"))

    with_engine(test)


def test_a_step_without_memory_ends_its_streams_and_the_engine_serves_the_next_ones() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        runner.fail_after, runner.failure = 5, StepMemoryError("a step of 4 tokens did not fit")
        streams = [engine.submit(request(f"r{i}", max_tokens=200)) for i in range(4)]
        for stream in streams:
            events = [event async for event in stream]
            assert events[-1].finish_reason is FinishReason.ERROR and events[-1].usage is not None
            assert events[-1].error == "a step of 4 tokens did not fit"
        runner.fail_after = 10**9
        ids = [token async for event in engine.submit(request("next")) for token in event.token_ids]
        assert ids == expected_output((1, 2, 3), 5, VOCAB) and engine.failure is None
        assert scheduler.pool.num_available == scheduler.pool.num_usable

    with_engine(test)


def test_closing_the_engine_ends_open_streams() -> None:
    async def test(engine: AsyncEngine, scheduler: Scheduler, runner: SlowRunner) -> None:
        stream = engine.submit(request("a", max_tokens=200))
        await stream.next_events()
        await asyncio.to_thread(engine.close)
        events = [event async for event in stream]
        assert events[-1].finish_reason is FinishReason.ERROR and "closed" in (events[-1].error or "")

    with_engine(test)


CHECKPOINT = Path(__file__).parents[1] / "recipes" / "tiny-llama"


def test_an_engine_in_its_own_process_gives_the_same_ids_and_its_death_ends_the_streams() -> None:
    config = EngineConfig(model=CHECKPOINT, device="cpu", dtype="float32", progress=False)
    engine = AsyncEngine.from_config(config)
    greedy = SamplingParams(max_tokens=12, temperature=0, logprobs=1, prompt_logprobs=0)

    async def main() -> list[TokenEvent]:
        stream = engine.submit(Request("whole", (5, 6, 7), greedy))
        events = [event async for event in stream]
        endless = SamplingParams(max_tokens=500, ignore_eos=True, n=2)
        streams = [engine.submit(Request(f"r{i}", (5, 6, 7), endless)) for i in range(3)]
        await streams[0].next_events()
        assert engine._worker is not None
        os.kill(engine._worker.pid, signal.SIGKILL)  # type: ignore[union-attr, arg-type]
        for stream in streams:
            rest = [event async for event in stream]
            finals = [event for event in rest if event.finish_reason is FinishReason.ERROR]
            assert [event.index for event in finals] == [0, 1]
            assert [event.usage is not None for event in rest] == [False] * (len(rest) - 1) + [True]
            assert "process ended with code -9" in (rest[-1].error or "")
        with pytest.raises(EngineError, match="process ended with code -9"):
            engine.submit(Request("late", (5,), greedy))
        return events

    try:
        events = asyncio.run(main())
    finally:
        engine.close()
    with LLM(CHECKPOINT, device="cpu", dtype="float32", progress=False) as llm:
        expected = llm.generate([[5, 6, 7]], greedy)[0]
    assert [token for event in events for token in event.token_ids] == expected.token_ids
    assert "".join(event.text for event in events) == expected.text
    assert [entry for event in events for entry in event.logprobs or []] == expected.logprobs
    assert events[0].prompt_logprobs == expected.prompt_logprobs


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="tells the environment of another process")
def test_torch_threads_sleep_between_ops_in_the_engines_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    engine = AsyncEngine.from_config(EngineConfig(model=CHECKPOINT, device="cpu", progress=False))
    try:
        assert engine._worker is not None
        environment = Path(f"/proc/{engine._worker.pid}/environ").read_text()  # type: ignore[union-attr]
    finally:
        engine.close()
    assert "OMP_WAIT_POLICY=PASSIVE" in environment.split("\0")


def test_torch_threads_do_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_torch_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_server_s_own_process_does_without_torch() -> None:
    program = "import sys, torchinfer.async_engine, torchinfer.serving.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_the_engines_process_refuses_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        AsyncEngine.from_config(EngineConfig(model=tmp_path, progress=False))


def test_a_program_that_forgets_to_close_its_engine_ends(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from torchinfer import AsyncEngine, EngineConfig\n"
        "if __name__ == '__main__':\n"
        f"    engine = AsyncEngine.from_config(EngineConfig(model={str(CHECKPOINT)!r}, device='cpu'))\n"
        "    print(engine.model_info.name)\n"
    )
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stdout) == (0, "tiny-llama\n"), result.stderr
