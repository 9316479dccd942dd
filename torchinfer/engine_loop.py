"""The loop around an engine that is driven over a connection, in a process or a thread of its own.

    to the engine     ("add", Request) | ("abort", request id) | ("close", None)
    from the engine   ("events", list of Wire, EngineStats or None) after a step | ("failed", reason)

Commands are taken between two steps, so an abort takes effect within one. Whoever is at the other end closes what is
open when the engine has failed or the connection ends.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from torchinfer.config import EngineConfig
from torchinfer.engine_info import EngineStats
from torchinfer.errors import TorchinferError
from torchinfer.request import TokenEvent

if TYPE_CHECKING:
    from torchinfer.engine import Engine

logger = logging.getLogger(__name__)

STATS_SECONDS = 1.0
PARENT_SECONDS = 1.0  # how soon the process notices, while it loads, that nobody waits for it any more

Wire = TokenEvent | tuple[str, int, list[int], str]


def let_torch_threads_sleep() -> None:
    """In processes that start from now on torch's threads sleep between two ops, unless the environment says otherwise.

    By default they spin for milliseconds: where torch multiplies what the CPU library has no kernel for, on the cores
    that the library computes on.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when OpenMP is loaded, which torch does at its import


def run_process(connection: Connection, config: EngineConfig, log_level: int) -> None:
    """The main function of an engine's process: say ("ready", ModelInfo) or ("error", exception), then `run`."""
    # Ctrl-C reaches the whole process group, but the server decides how its engine ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("torchinfer").setLevel(log_level)
    from torchinfer.launch import start_engine

    try:
        engine = start_engine(config)
    except TorchinferError as error:
        connection.send(("error", error))
        return
    connection.send(("ready", engine.info))
    run(engine, connection)


def run(engine: Engine, connection: Connection) -> None:
    """Step the engine and exchange messages until "close", the end of the connection, or a failed step."""
    stats_time = 0.0
    try:
        while _take_commands(engine, connection):
            events = engine.step()
            stats: EngineStats | None = None
            if (now := time.monotonic()) > stats_time or not engine.has_work:
                stats, stats_time = engine.stats(), now + STATS_SECONDS
            if events or stats:
                connection.send(("events", [to_wire(event) for event in events], stats))
    except (EOFError, BrokenPipeError):
        logger.info("the other end is gone; the engine ends")
    except Exception as error:
        logger.exception("a step failed; the engine stops")
        connection.send(("failed", f"a step of the engine failed: {type(error).__name__}: {error}"))
    finally:
        engine.close()
        connection.close()


def _take_commands(engine: Engine, connection: Connection) -> bool:
    """Do what was asked for; wait while there is no work. False when that is to close."""
    while not engine.has_work or connection.poll():
        command, argument = connection.recv()
        if command == "close":
            return False
        if command == "add":
            engine.add(argument)
        else:
            engine.abort(argument)
    return True


def to_wire(event: TokenEvent) -> Wire:
    """An event as it is sent: most hold nothing but a token, and a tuple is packed ten times as fast."""
    if event.finish_reason is None and event.logprobs is None and event.prompt_logprobs is None:
        return event.request_id, event.index, event.token_ids, event.text
    return event


def from_wire(item: Wire) -> TokenEvent:
    """The event that was sent."""
    return TokenEvent(*item) if isinstance(item, tuple) else item


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)
