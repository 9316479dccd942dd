"""A connection between two processes of one engine: lists of JSON values, in order, and the end of the other process.
Paths become strings.

What is received is parsed, and never run. An end that nobody notices, because this process is busy, waiting for a
device whose program the other one takes part in, ends this process too, after `GRACE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import threading
from multiprocessing.connection import Connection
from typing import Any

from torchinfer.errors import EngineError

logger = logging.getLogger(__name__)

GRACE_SECONDS = 30.0
IDLE_SECONDS, PROBE_SECONDS, PROBES = 10, 5, 3  # after which the system says that a silent host is gone


class Link:
    """One end. `name` is what the other process is called in messages."""

    def __init__(self, peer: socket.socket, name: str) -> None:
        """Takes over a connected socket."""
        peer.setblocking(True)
        if peer.family != socket.AF_UNIX:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (("IDLE", IDLE_SECONDS), ("INTVL", PROBE_SECONDS), ("CNT", PROBES)):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option}"), value)
        self.name = name
        self.is_busy = True  # and would not notice that the other process is gone
        self._connection = Connection(peer.detach())
        self._received: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._is_closed = self._is_gone = False
        self._end = threading.Timer(GRACE_SECONDS, self._exit)
        self._end.daemon = True
        threading.Thread(target=self._receive, name="torchinfer-link", daemon=True).start()

    def send(self, *values: Any) -> None:
        """Send values as one message.

        Raises:
            EngineError: the other process is gone.
        """
        try:
            if not self._is_gone:
                self._connection.send_bytes(json.dumps(values, default=os.fspath).encode())
                return
        except OSError:
            pass  # the other end was closed in this moment
        raise self._gone()

    def receive(self, seconds: float | None = None) -> list[Any]:
        """Wait for the next message, as long as it takes if no time is given.

        Raises:
            EngineError: the other process is gone, or said nothing in time.
        """
        try:
            message = self._received.get(timeout=seconds)
        except queue.Empty:
            raise EngineError(f"{self.name} said nothing for {seconds:g} s: see what is wrong there") from None
        if message is None:
            raise self._gone()
        return message

    def close(self) -> None:
        """End the connection from this side."""
        self._is_closed = True
        self._end.cancel()
        with contextlib.suppress(OSError):  # the other end may be gone
            socket.socket(fileno=os.dup(self._connection.fileno())).shutdown(socket.SHUT_RDWR)

    def _receive(self) -> None:
        try:
            while True:
                self._received.put(json.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            self._is_gone = True
            self._received.put(None)
            if not self._is_closed:
                self._end.start()

    def _gone(self) -> EngineError:
        self._end.cancel()
        return EngineError(f"{self.name}, which computes with this process, is gone: its log says why")

    def _exit(self) -> None:
        if not self.is_busy:
            return  # whoever sends or receives next gets an error
        logger.critical("%s is gone, and this process waits for it: it ends", self.name)
        logging.shutdown()
        os._exit(1)
