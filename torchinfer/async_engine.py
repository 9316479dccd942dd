"""AsyncEngine: one thread that steps the engine, any number of asyncio consumers.

Commands go to the thread through a queue and are taken between two steps, so an abort takes effect within one step.
Events go back in one call into the event loop per step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Self

from torchinfer.config import EngineConfig
from torchinfer.engine import Engine, EngineStats, ModelInfo
from torchinfer.errors import EngineError, OverloadedError, RequestError
from torchinfer.request import Request, TokenEvent
from torchinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class EventStream:
    """The events of one request: `async for event in stream`, or all that are ready with `next_events`."""

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._ready: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._is_finished = False

    async def next_events(self) -> list[TokenEvent]:
        """All events that are ready, at least one; nothing after the final one."""
        while not self._ready and not self._is_finished:
            self._arrived.clear()
            await self._arrived.wait()
        events = list(self._ready)
        self._ready.clear()
        return events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        while not self._ready and not self._is_finished:
            self._arrived.clear()
            await self._arrived.wait()
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Abort the request unless it has finished. Its remaining events are dropped."""
        if not self._is_finished:
            self._abort(self.request_id)
        self._is_finished = True
        self._ready.clear()
        self._arrived.set()

    def _put(self, event: TokenEvent) -> None:
        if not self._is_finished:
            self._ready.append(event)
            self._is_finished = event.usage is not None
            self._arrived.set()


class AsyncEngine:
    """Serves one engine to asyncio tasks of one event loop."""

    def __init__(self, engine: Engine, *, max_queue: int = 1024) -> None:
        self.failure: str | None = None
        self._engine = engine
        self._max_open = engine.info.max_num_requests + max_queue
        self._streams: dict[str, EventStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="torchinfer-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig, *, max_queue: int = 1024) -> Self:
        """Load the model and warm up; blocks until that is done.

        `max_queue` requests may wait while `config.max_num_requests` run.
        """
        from torchinfer.startup import start_engine

        return cls(start_engine(config), max_queue=max_queue)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def model_info(self) -> ModelInfo:
        return self._engine.info

    @property
    def num_open(self) -> int:
        """Requests that wait or run."""
        return len(self._streams)

    def stats(self) -> EngineStats:
        """The engine's counters, as of the last step or a little later."""
        return self._engine.stats()

    def submit(self, request: Request) -> EventStream:
        """Queue a request; call from the event loop that will read the stream.

        Raises:
            RequestError: it cannot be honoured, or its id is open.
            OverloadedError: as many requests as allowed are open.
            EngineError: the engine has stopped.
        """
        self._engine.validate(request)
        stream = EventStream(request.request_id, self.abort)
        with self._lock:
            self._check_open(request.request_id)
            self._loop = asyncio.get_running_loop()
            self._streams[request.request_id] = stream
            self._commands.put(lambda: self._engine.add(request))
        return stream

    def abort(self, request_id: str) -> None:
        """End a request within one step. An id that is not open is left alone."""
        self._commands.put(lambda: self._engine.abort(request_id))

    def close(self) -> None:
        """End every open request with an error event and stop the thread."""
        self._commands.put(None)
        self._thread.join()

    def _check_open(self, request_id: str) -> None:
        if self.failure is not None:
            raise EngineError(f"no new requests: {self.failure}")
        if request_id in self._streams:
            raise RequestError(f"request_id={request_id!r} is open already; use another one or wait for it")
        if len(self._streams) >= self._max_open:
            raise OverloadedError(
                f"{len(self._streams)} requests are open, which is the limit; retry later", retry_after_seconds=1.0
            )

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._deliver(self._engine.step())
            self._stop("the engine was closed")
        except Exception as error:
            logger.exception("a step failed; the engine stops")
            self._stop(f"a step of the engine failed: {type(error).__name__}: {error}")

    def _take_commands(self) -> bool:
        """Run what was asked for; wait while there is no work. False when the engine was closed."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _stop(self, reason: str) -> None:
        with self._lock:
            self.failure = reason
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                command()
        self._deliver(self._engine.fail(reason))

    def _deliver(self, events: list[TokenEvent]) -> None:
        if events and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, events)

    def _put(self, events: list[TokenEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream._put(event)
                if event.usage is not None:
                    del self._streams[event.request_id]
