"""The life of a server process: listen, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from torchinfer.config import EngineConfig
from torchinfer.serving.grpc_server import GrpcServer
from torchinfer.serving.options import ServerOptions

if TYPE_CHECKING:
    from torchinfer.async_engine import AsyncEngine
    from torchinfer.hosts import Hosts

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StopSignals:
    """The first SIGTERM or SIGINT asks for a drain, the second for the end."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def receive(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.receive)


def run_server(config: EngineConfig, options: ServerOptions) -> int:
    """Serve until a signal; the exit code of the process. Raises any TorchinferError of loading or listening.

    On another host than the first of several: compute what that one is asked, until it ends.
    """
    from torchinfer.launch import hosts_of

    hosts = hosts_of(config)
    if hosts is None or hosts.leads:
        return asyncio.run(_run(config, options))
    return _follow(config, hosts)


async def serve(options: ServerOptions, load: Callable[[], AsyncEngine], signals: StopSignals) -> int | None:
    """Listen at once, so that probes see NOT_SERVING while `load` runs in a thread; then serve until a signal.

    Returns the exit code: 0 after a drain, 1 if a second signal cut it short, None if `load` was cut short: its
    thread still runs.
    """
    server = GrpcServer(options)
    await server.start()
    try:
        engine = await _until(_in_thread(load), signals.first)
        if engine is None:
            return None
        await server.serve(engine)
        print(_ready_line(engine, options, server.port), flush=True)
        await signals.first.wait()
        drained = await _until(_drained(server, options.drain_seconds), signals.second)
        return 0 if drained else 1
    finally:
        await server.stop()


def _follow(config: EngineConfig, hosts: Hosts) -> int:
    from torchinfer.launch import run_follower

    def receive(number: int, frame: object) -> None:
        logger.info("host %d goes on until host 0 ends; a second signal ends it at once", hosts.index)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    # A slice ends as one: all pods get the signal together, and the first one's requests need this host.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, receive)
    print(f"torchinfer host {hosts.index} of {len(hosts.names)}, for requests to {hosts.names[0]}", flush=True)
    run_follower(config, hosts)
    return 0


async def _run(config: EngineConfig, options: ServerOptions) -> int:
    signals = StopSignals()
    signals.install()
    exit_code = await serve(options, lambda: _load(config, options), signals)
    if exit_code is None:
        # The loading thread cannot be stopped, and the interpreter must not be torn down under it.
        logger.info("stopped while loading")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return exit_code


def _load(config: EngineConfig, options: ServerOptions) -> AsyncEngine:
    from torchinfer.async_engine import AsyncEngine

    return AsyncEngine.from_config(config, max_queue=options.max_queue)


def _in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Like asyncio.to_thread, but in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        future.set_exception(error) if error is not None else future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        try:
            result, failure = function(), None
        except Exception as error:  # raised again where the future is awaited
            result, failure = None, error
        with suppress(RuntimeError):  # the loop was closed in the meantime: nobody waits any more
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=work, name="torchinfer-load", daemon=True).start()
    return future


async def _drained(server: GrpcServer, seconds: float) -> bool:
    await server.drain(seconds)
    return True


async def _until(work: Awaitable[T], event: asyncio.Event) -> T | None:
    """The result of `work`, or None if `event` comes first: then `work` is cancelled."""
    task, stop = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if task.done():
        return task.result()
    task.cancel()
    return None


def _ready_line(engine: AsyncEngine, options: ServerOptions, port: int) -> str:
    info = engine.model_info
    security = "no TLS" if options.tls_cert is None else "TLS" if options.tls_client_ca is None else "mutual TLS"
    size = f"{info.num_parameters / 1e6:,.1f} M parameters"
    return (
        f"torchinfer serving {info.name} on {options.host}:{port} ({size}, {info.dtype} on {info.device}, {security})"
    )
