import asyncio
import socket
import threading

import grpc
import pytest

from torchinfer.errors import CheckpointError, ConfigError
from torchinfer.request import SamplingParams
from torchinfer.serving import convert, inference_pb2_grpc
from torchinfer.serving.main import StopSignals, serve
from torchinfer.serving.options import ServerOptions

OPTIONS = ServerOptions(host="localhost", port=0, drain_seconds=10, stream_interval_ms=0)
FOREVER = SamplingParams(max_tokens=100_000)


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


class Life:
    """One `serve` in this test's loop, up to its ready line."""

    def __init__(self, capsys, load, options=OPTIONS):
        self.signals = StopSignals()
        self._capsys = capsys
        self._printed = ""
        self.task = asyncio.create_task(serve(options, load, self.signals))

    async def ready_line(self):
        def is_printed():
            self._printed += self._capsys.readouterr().out
            return "\n" in self._printed or self.task.done()

        await until(is_printed)
        return self._printed

    async def stub(self):
        port = (await self.ready_line()).split("localhost:")[1].split()[0]
        return inference_pb2_grpc.InferenceStub(grpc.aio.insecure_channel(f"localhost:{port}"))


def message(params):
    return convert.to_message("abc", params, None, 0, None)


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def test_the_ready_line_tells_model_address_and_security(capsys, fake_engine):
    async def work():
        life = Life(capsys, fake_engine)
        line = await life.ready_line()
        life.signals.receive()
        await life.task
        return line

    assert run(work()).startswith("torchinfer serving fake on localhost:")
    assert "float32 on cpu, no TLS" in run(work())


def test_a_signal_drains_and_gives_exit_code_0(capsys, fake_engine):
    engine = fake_engine(seconds_per_token=0.02)

    async def work():
        life = Life(capsys, lambda: engine)
        call = (await life.stub()).Generate(message(SamplingParams(max_tokens=20)))
        await call.read()
        life.signals.receive()
        text = ""
        while (answer := await call.read()) is not grpc.aio.EOF:
            text += answer.chunk.text
        return text, await life.task

    text, code = run(work())
    assert (text, code, engine.is_closed) == ("abc" * 5, 0, True)


def test_a_second_signal_stops_at_once_with_exit_code_1(capsys, fake_engine):
    async def work():
        life = Life(capsys, lambda: fake_engine(seconds_per_token=0.02))
        call = (await life.stub()).Generate(message(FOREVER))
        await call.read()
        life.signals.receive()
        await asyncio.sleep(0.05)
        assert not life.task.done()
        life.signals.receive()
        return await life.task

    assert run(work()) == 1


def test_a_signal_while_loading_ends_without_an_exit_code(capsys):
    release = threading.Event()

    async def work():
        life = Life(capsys, lambda: release.wait(20))
        await asyncio.sleep(0.1)
        life.signals.receive()
        return await life.task

    assert run(work()) is None
    release.set()


def test_an_error_of_loading_is_raised(capsys):
    def load():
        raise CheckpointError("no weights in there")

    async def work():
        await Life(capsys, load).task

    with pytest.raises(CheckpointError, match="no weights in there"):
        run(work())


def test_a_port_in_use_is_raised_before_loading(capsys):
    loads = []

    async def work():
        await Life(capsys, lambda: loads.append(1), ServerOptions(host="localhost", port=port)).task

    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"localhost:{port}: Address already in use"):
            run(work())
    assert loads == []
