"""A deterministic engine with AsyncEngine's interface, and a server around it in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from torchinfer.engine_info import ModelInfo
from torchinfer.errors import EngineError, OverloadedError, RequestError
from torchinfer.request import FinishReason, Request, TokenEvent, TokenLogprobs, Usage
from torchinfer.serving.client import Client
from torchinfer.serving.grpc_server import GrpcServer
from torchinfer.serving.options import ServerOptions

VOCAB_SIZE = 300
BOS = 256


class ByteTokenizer:
    """One token a byte of UTF-8; BOS is 256."""

    eos_token_id = 257
    vocab_size = VOCAB_SIZE

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<answer>")


@dataclass
class FakeEngine:
    """Repeats the prompt's tokens, each sample from one place further on, until max_tokens or a stop id."""

    seconds_per_token: float = 0.0
    capacity: int = 1000  # open requests
    fail_after_tokens: int | None = None  # of any one sample; then the whole engine fails
    crash: Exception | None = None  # raised by submit
    tokenizer: ByteTokenizer | None = field(default_factory=ByteTokenizer)
    failure: str | None = None
    is_closed: bool = False
    aborted: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    streams: dict[str, FakeStream] = field(default_factory=dict)

    @property
    def model_info(self) -> ModelInfo:
        return ModelInfo(
            name="fake",
            architecture="FakeForCausalLM",
            num_parameters=7,
            vocab_size=VOCAB_SIZE,
            max_model_len=64,
            dtype="float32",
            device="cpu",
            num_pages=100,
            page_size=16,
            max_num_requests=8,
            eos_token_ids=(257,),
            has_tokenizer=self.tokenizer is not None,
            kv_cache_dtype="float32",
        )

    @property
    def num_open(self) -> int:
        return len(self.streams)

    def submit(self, request: Request) -> FakeStream:
        if self.crash is not None:
            raise self.crash
        if self.failure is not None or self.is_closed:
            raise EngineError(f"the engine stopped: {self.failure}")
        if request.request_id in self.streams:
            raise RequestError(f"request_id={request.request_id!r} is open already")
        if self.num_open >= self.capacity:
            raise OverloadedError(f"the queue is full: {self.capacity} requests wait", retry_after_seconds=1.25)
        stream = FakeStream(self, request)
        self.requests.append(request)
        self.streams[request.request_id] = stream
        stream.task = asyncio.create_task(self._run(stream))
        return stream

    def abort(self, request_id: str) -> None:
        if request_id in self.streams:
            self.aborted.append(request_id)
            self._end(self.streams[request_id], FinishReason.ABORT, None)

    def close(self) -> None:
        self.is_closed = True
        for stream in list(self.streams.values()):
            stream.loop.call_soon_threadsafe(self._end, stream, FinishReason.ABORT, None)

    def fail(self, message: str) -> None:
        self.failure = message
        for stream in list(self.streams.values()):
            self._end(stream, FinishReason.ERROR, message)

    async def _run(self, stream: FakeStream) -> None:
        request, params = stream.request, stream.request.params
        for step in range(params.max_tokens):
            await asyncio.sleep(self.seconds_per_token)
            if step == self.fail_after_tokens:
                self.fail("step 7 ran out of memory")
                return
            for index in range(params.n):
                if index in stream.unfinished:
                    self._emit(stream, index, step)
            if not stream.unfinished:
                del self.streams[request.request_id]
                return

    def _emit(self, stream: FakeStream, index: int, step: int) -> None:
        request, params = stream.request, stream.request.params
        token_id = request.prompt_ids[(index + step) % len(request.prompt_ids)]
        text = self.tokenizer.decode([token_id]) if self.tokenizer else ""
        event = TokenEvent(request.request_id, index, [token_id], text)
        if params.logprobs is not None:
            event.logprobs = [self._logprobs(token_id, params.logprobs)]
        if params.prompt_logprobs is not None and index == step == 0:
            rest = [self._logprobs(i, params.prompt_logprobs) for i in request.prompt_ids[1:]]
            event.prompt_logprobs = [None, *rest]
        stream.num_output += 1
        if token_id in params.stop_token_ids:
            event.finish_reason, event.stop_match = FinishReason.STOP, token_id
        elif event.text in params.stop:
            event.finish_reason, event.stop_match, event.text = FinishReason.STOP, event.text, ""
        elif step + 1 == params.max_tokens:
            event.finish_reason = FinishReason.LENGTH
        stream.push(event)

    def _logprobs(self, token_id: int, count: int) -> TokenLogprobs:
        return TokenLogprobs(token_id, -token_id / 4, 1 + token_id % 3, [(i, -i / 2) for i in range(count)])

    def _end(self, stream: FakeStream, reason: FinishReason, error: str | None) -> None:
        if self.streams.pop(stream.request.request_id, None) is None:
            return
        stream.task.cancel()
        for index in sorted(stream.unfinished):
            stream.push(TokenEvent(stream.request.request_id, index, [], "", finish_reason=reason, error=error))


class FakeStream:
    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self.task: asyncio.Task[None]
        self.unfinished = set(range(request.params.n))
        self.num_output = 0
        self._engine = engine
        self._events: list[TokenEvent] = []
        self._ready = asyncio.Event()
        self._is_over = False

    def push(self, event: TokenEvent) -> None:
        if event.finish_reason is not None:
            self.unfinished.remove(event.index)
            if not self.unfinished:
                event.usage = Usage(len(self.request.prompt_ids), 3, self.num_output)
        self._events.append(event)
        self._ready.set()

    async def next_events(self) -> list[TokenEvent]:
        if self._is_over:
            return []
        await self._ready.wait()
        self._ready.clear()
        events, self._events = self._events, []
        self._is_over = events[-1].usage is not None
        return events

    async def aclose(self) -> None:
        self._engine.abort(self.request.request_id)


class RunningServer:
    """A GrpcServer in a thread with its own event loop."""

    def __init__(self, options: ServerOptions) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.run(self._start(options))

    async def _start(self, options: ServerOptions) -> GrpcServer:
        server = GrpcServer(options)
        await server.start()
        return server

    @property
    def target(self) -> str:
        return f"localhost:{self.server.port}"

    def run(self, work):
        """The result of a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def stop(self) -> None:
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


Serve = Callable[..., RunningServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(engine, **server_options): a running server; engine None leaves it as while the model loads."""
    running = []

    def start(engine: FakeEngine | None, **options) -> RunningServer:
        defaults = {"host": "localhost", "port": 0, "stream_interval_ms": 0}
        server = RunningServer(ServerOptions(**{**defaults, **options}))
        running.append(server)
        if engine is not None:
            server.run(server.server.serve(engine))
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def connect(serve: Serve):
    """connect(engine, **server_options): a context with the server and a client of it."""

    @contextmanager
    def open_client(engine: FakeEngine | None, **options):
        server = serve(engine, **options)
        with Client(server.target) as client:
            yield server, client

    return open_client


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()
