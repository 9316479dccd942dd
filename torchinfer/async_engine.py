"""AsyncEngine: an engine in a process of its own, for any number of asyncio consumers in this one.

The engine's process has the device, the model and an interpreter lock to itself: what the server does with its
streams does not slow a step down, and a crash there ends requests, not the server. docs/benchmarks.md has the
measurement behind this.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Self

from torchinfer.config import EngineConfig
from torchinfer.engine_info import EngineStats, ModelInfo, validate
from torchinfer.engine_loop import from_wire, let_torch_threads_sleep, run, run_process
from torchinfer.errors import EngineError, OverloadedError, RequestError
from torchinfer.request import FinishReason, Request, TokenEvent, Usage
from torchinfer.tokenizer import Tokenizer
from torchinfer.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from torchinfer.engine import Engine

logger = logging.getLogger(__name__)

CLOSED = "the engine was closed"
CLOSE_SECONDS = 10.0  # for the engine to end its step; then its process is killed


class EventStream:
    """The events of one request: `async for event in stream`, or all that are ready with `next_events`."""

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.request = request
        self._abort = abort
        self._ready: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._is_finished = False
        self._open_samples = set(range(request.params.n))
        self._num_output_tokens = 0

    async def next_events(self) -> list[TokenEvent]:
        """All events that are ready, at least one; nothing after the final one."""
        await self._wait()
        events = list(self._ready)
        self._ready.clear()
        return events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        await self._wait()
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Abort the request unless it has finished. Its remaining events are dropped."""
        if not self._is_finished:
            self._abort(self.request.request_id)
        self._is_finished = True
        self._ready.clear()
        self._arrived.set()

    async def _wait(self) -> None:
        while not self._ready and not self._is_finished:
            self._arrived.clear()
            await self._arrived.wait()

    def _put(self, event: TokenEvent) -> None:
        self._num_output_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._open_samples.discard(event.index)
        if not self._is_finished:
            self._ready.append(event)
            self._is_finished = event.usage is not None
            self._arrived.set()

    def _fail(self, reason: str) -> None:
        """End what is open with an error; the last event carries the usage as far as it is known here."""
        last = max(self._open_samples)
        for index in sorted(self._open_samples):
            event = TokenEvent(self.request.request_id, index, [], "", finish_reason=FinishReason.ERROR, error=reason)
            if index == last:
                event.usage = Usage(len(self.request.prompt_ids), 0, self._num_output_tokens)
            self._put(event)


class AsyncEngine:
    """Serves one engine to the tasks of one event loop."""

    def __init__(
        self, info: ModelInfo, tokenizer: Tokenizer | None, connection: Connection, max_queue: int = 1024
    ) -> None:
        """Over a connection to a running `engine_loop.run`; `from_config` and `in_thread` make one."""
        self.model_info = info
        self.tokenizer = tokenizer
        self.failure: str | None = None
        self._max_open = info.max_num_requests + max_queue
        self._connection = connection
        self._streams: dict[str, EventStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stats = EngineStats()
        self._last_end = time.monotonic()
        self._seconds_between_ends = 1.0  # a running mean
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._worker: BaseProcess | threading.Thread | None = None
        self._receiver = threading.Thread(target=self._receive, daemon=True)
        self._receiver.start()
        threading.Thread(target=self._send, daemon=True).start()

    @classmethod
    def from_config(cls, config: EngineConfig, *, max_queue: int = 1024) -> Self:
        """Start the engine's process and wait until it is warm.

        `max_queue` requests may wait while `config.max_num_requests` run. The process starts Python anew, so a script
        that calls this needs `if __name__ == "__main__":`.

        Raises:
            TorchinferError: what start_engine raises there; EngineError when the process dies.
        """
        context = multiprocessing.get_context("spawn")
        connection, other = context.Pipe()
        log_level = logging.getLogger("torchinfer").getEffectiveLevel()
        process = context.Process(
            target=run_process, args=(other, config, log_level), name="torchinfer-engine", daemon=True
        )
        let_torch_threads_sleep()
        process.start()
        other.close()
        try:
            tokenizer = load_tokenizer(config.model)  # while the process loads
            kind, value = connection.recv()
        except EOFError:
            process.join()
            raise EngineError(f"the engine's process ended while loading, with code {process.exitcode}") from None
        except BaseException:
            process.kill()
            raise
        if kind == "error":
            raise value
        engine = cls(value, tokenizer, connection, max_queue)
        engine._worker = process
        # Before multiprocessing's own handler, which would wait for the process.
        atexit.register(engine.close)
        return engine

    @classmethod
    def in_thread(cls, engine: Engine, *, max_queue: int = 1024) -> Self:
        """Run an engine that is there already in a thread of this process: for tests and notebooks."""
        connection, other = multiprocessing.Pipe()
        found = cls(engine.info, engine.tokenizer, connection, max_queue)
        found._worker = threading.Thread(target=run, args=(engine, other), name="torchinfer-engine", daemon=True)
        found._worker.start()
        return found

    @property
    def num_open(self) -> int:
        """Requests that wait or run."""
        return len(self._streams)

    def stats(self) -> EngineStats:
        """The engine's counters, at most a second old while it works."""
        return self._stats

    def submit(self, request: Request) -> EventStream:
        """Queue a request; call from the event loop that will read the stream.

        Raises:
            RequestError: it cannot be honoured, or its id is open.
            OverloadedError: as many requests as allowed are open.
            EngineError: the engine has stopped.
        """
        validate(request, self.model_info)
        stream = EventStream(request, self.abort)
        with self._lock:
            self._check_open(request.request_id)
            self._loop = asyncio.get_running_loop()
            self._streams[request.request_id] = stream
        self._outbox.put(("add", request))
        return stream

    def abort(self, request_id: str) -> None:
        """End a request within one step. An id that is not open is left alone."""
        self._outbox.put(("abort", request_id))

    def close(self) -> None:
        """End the engine; every open request gets an error event. Returns when it has ended."""
        atexit.unregister(self.close)
        self._outbox.put(("close", None))
        self._receiver.join(CLOSE_SECONDS)
        if self._receiver.is_alive() and isinstance(self._worker, BaseProcess):
            logger.warning("the engine did not end within %g s; its process is killed", CLOSE_SECONDS)
            self._worker.kill()
            self._receiver.join()

    def _check_open(self, request_id: str) -> None:
        if self.failure is not None:
            raise EngineError(f"no new requests: {self.failure}")
        if request_id in self._streams:
            raise RequestError(f"request_id={request_id!r} is open already; use another one or wait for it")
        if len(self._streams) >= self._max_open:
            raise OverloadedError(
                f"{len(self._streams)} requests are open, which is the limit; retry later", self._seconds_between_ends
            )

    def _send(self) -> None:
        """In a thread: a large prompt must not hold up the event loop while the engine is in a step."""
        is_closing = False
        while not is_closing:
            command = self._outbox.get()
            is_closing = command[0] == "close"
            try:
                self._connection.send(command)
            except OSError:
                return  # `_receive` sees the end too, and says so

    def _receive(self) -> None:
        reason = ""
        while not reason:
            try:
                kind, value, *rest = self._connection.recv()
            except (EOFError, OSError):
                reason = self._why_it_ended()
            else:
                if kind == "failed":
                    reason = value
                else:
                    self._stats = rest[0] or self._stats
                    self._in_loop(self._put, [from_wire(item) for item in value])
        with self._lock:
            self.failure = reason
        self._in_loop(self._fail, reason)
        self._outbox.put(("close", None))

    def _why_it_ended(self) -> str:
        """Only this thread may wait for the process: of two that do, one never learns that it has ended."""
        if self._worker is not None:
            self._worker.join()
        if isinstance(self._worker, BaseProcess) and self._worker.exitcode != 0:
            return f"the engine's process ended with code {self._worker.exitcode}"
        return CLOSED

    def _in_loop(self, function: Callable[[Any], None], argument: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    def _put(self, events: list[TokenEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream._put(event)
                if event.usage is not None:
                    self._end(event.request_id)

    def _end(self, request_id: str) -> None:
        del self._streams[request_id]
        now = time.monotonic()
        self._seconds_between_ends += 0.1 * (now - self._last_end - self._seconds_between_ends)
        self._last_end = now

    def _fail(self, reason: str) -> None:
        while self._streams:
            self._streams.popitem()[1]._fail(reason)
