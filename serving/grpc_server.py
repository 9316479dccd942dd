"""The gRPC server: translates between inference.proto and an AsyncEngine, and tells its health; nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from torchinfer.errors import ConfigError, EngineError
from torchinfer.request import Request
from torchinfer.serving import convert, inference_pb2_grpc
from torchinfer.serving import inference_pb2 as pb
from torchinfer.serving.options import ServerOptions
from torchinfer.serving.status import to_status
from torchinfer.serving.tls import server_credentials

if TYPE_CHECKING:
    from torchinfer.async_engine import AsyncEngine, EventStream

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH_INTERVAL_SECONDS = 0.1  # how soon a failed engine shows
FLUSH_SECONDS = 2.0  # for the last messages, after everything has ended
SECONDS_PER_OPEN_CALL = 0.0015  # at most 700 messages a second in all, until the interval reaches its maximum:
MAX_INTERVAL_SECONDS = 0.1
LARGE_MESSAGE_BYTES = 16 * 1024  # about a millisecond of tokenization: more of it must not hold up the streams


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Answers calls with `engine`, which is None while the model loads."""

    def __init__(self, stream_interval_ms: float) -> None:
        self.engine: AsyncEngine | None = None
        self.is_draining = False
        self.num_open = 0
        self._stream_interval_seconds = stream_interval_ms / 1000

    async def Generate(self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async with self._answering(context):
            responses = convert.Responses()
            async with self._submitted(message) as stream:
                while events := await stream.next_events():
                    for response in responses.messages(events):
                        await context.write(response)
                    if events[-1].usage is None and self._stream_interval_seconds:
                        await asyncio.sleep(self._seconds_to_next_message())
            if responses.failure is not None:
                raise EngineError(f"the request did not finish: {responses.failure}")

    async def GenerateOnce(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateOnceResponse:
        async with self._answering(context):
            events = []
            async with self._submitted(message) as stream:
                while more := await stream.next_events():
                    events += more
            responses = convert.Responses()
            messages = responses.messages(events)
            if responses.failure is not None:
                raise EngineError(f"the request did not finish: {responses.failure}")
            return convert.to_once(messages)

    async def Tokenize(self, message: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        async with self._answering(context):
            tokenizer = self._ready_engine().tokenizer
            if message.ByteSize() > LARGE_MESSAGE_BYTES:
                return pb.TokenizeResponse(token_ids=await asyncio.to_thread(convert.to_token_ids, message, tokenizer))
            return pb.TokenizeResponse(token_ids=convert.to_token_ids(message, tokenizer))

    async def Detokenize(
        self, message: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        async with self._answering(context):
            engine = self._ready_engine()
            return pb.DetokenizeResponse(text=convert.to_text(message, engine.tokenizer, engine.model_info.vocab_size))

    async def GetModel(self, message: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.GetModelResponse:
        async with self._answering(context):
            return convert.from_model_info(self._ready_engine().model_info, version("torchinfer"))

    @asynccontextmanager
    async def _answering(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Count the call as open; an exception becomes its status."""
        self.num_open += 1
        try:
            yield
        except Exception as error:
            status = to_status(error)
            await context.abort(status.code, status.message, status.metadata)
        finally:
            self.num_open -= 1

    @asynccontextmanager
    async def _submitted(self, message: pb.GenerateRequest) -> AsyncIterator[EventStream]:
        """The stream of a request; however the block is left, the engine is rid of the request."""
        engine = self._ready_engine()
        request = await self._request(message, engine)
        stream = engine.submit(request)
        start = time.perf_counter()
        try:
            yield stream
        finally:
            await stream.aclose()
            seconds = time.perf_counter() - start
            logger.debug("request %s: %d prompt tokens, %.3f s", request.request_id, len(request.prompt_ids), seconds)

    async def _request(self, message: pb.GenerateRequest, engine: AsyncEngine) -> Request:
        tokenizer, vocab_size = engine.tokenizer, engine.model_info.vocab_size
        if message.ByteSize() > LARGE_MESSAGE_BYTES:
            return await asyncio.to_thread(convert.to_request, message, tokenizer, vocab_size)
        return convert.to_request(message, tokenizer, vocab_size)

    def _seconds_to_next_message(self) -> float:
        """Longer with many open calls: a message costs 0.1 ms of Python, which the engine's thread waits for."""
        busy = min(self.num_open * SECONDS_PER_OPEN_CALL, MAX_INTERVAL_SECONDS)
        return max(self._stream_interval_seconds, busy)

    def _ready_engine(self) -> AsyncEngine:
        if self.is_draining:
            raise EngineError("the server is shutting down; send the request to another one")
        if self.engine is None:
            raise EngineError("the model is loading; wait until the health service says SERVING")
        return self.engine


class GrpcServer:
    """One server on one port. NOT_SERVING until `serve`, and again from `drain` on or while the engine has failed."""

    def __init__(self, options: ServerOptions) -> None:
        self.service = InferenceService(options.stream_interval_ms)
        self.port = options.port
        self._options = options
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen on `port`, then the one chosen if it was 0. Raises ConfigError."""
        await self._tell(is_serving=False)
        credentials = server_credentials(self._options)
        self._server = grpc.aio.server(
            options=_channel_options(self._options), maximum_concurrent_rpcs=self._options.max_concurrent_rpcs
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(self.service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = _bind(self._server, self._options.host, self._options.port, credentials)
        await self._server.start()

    async def serve(self, engine: AsyncEngine) -> None:
        """Answer with `engine`, which is warm."""
        self.service.engine = engine
        await self._tell(is_serving=engine.failure is None)
        self._watch = asyncio.create_task(self._watch_engine(engine))

    async def drain(self, seconds: float) -> None:
        """Refuse new calls, give the open ones `seconds`, then end the rest: each gets its final event."""
        self.service.is_draining = True
        await self._health.enter_graceful_shutdown()
        logger.info("draining: %d open calls, at most %g s", self.service.num_open, seconds)
        await self._wait_until_idle(seconds)
        if self.service.engine is not None:
            await asyncio.to_thread(self.service.engine.close)
        await self._wait_until_idle(FLUSH_SECONDS)
        await self._stop(FLUSH_SECONDS if self.service.num_open else 0.2)

    async def stop(self) -> None:
        """End at once: open calls are cancelled, the engine closed. Does nothing after `drain`."""
        await self._stop(None)
        if self.service.engine is not None:
            await asyncio.to_thread(self.service.engine.close)

    async def _stop(self, grace_seconds: float | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            await self._server.stop(grace_seconds)

    async def _wait_until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.service.num_open and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def _watch_engine(self, engine: AsyncEngine) -> None:
        was_serving = engine.failure is None
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_SECONDS)
            if (engine.failure is None) != was_serving:
                was_serving = not was_serving
                logger.error("the engine's failure is now: %s", engine.failure)
                await self._tell(is_serving=was_serving)

    async def _tell(self, *, is_serving: bool) -> None:
        codes = health_pb2.HealthCheckResponse
        for name in ("", SERVICE):
            await self._health.set(name, codes.SERVING if is_serving else codes.NOT_SERVING)


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    found = [
        ("grpc.so_reuseport", 0),  # else a second server on the port would start and take half of the calls
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Load balancers drop idle connections and keep them open with pings of their own.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    if options.max_connection_age_seconds is not None:
        found.append(("grpc.max_connection_age_ms", int(options.max_connection_age_seconds * 1000)))
    return found


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        _try_port(host, port)
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except (OSError, RuntimeError) as error:
        cause = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(
            f"cannot listen on {address}: {cause}; stop what uses the port, or choose another --port (0: any that is "
            "free) or --host (an address of this machine)"
        ) from error


def _try_port(host: str, port: int) -> None:
    """Raise the operating system's error, which names the cause; gRPC's does not."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
