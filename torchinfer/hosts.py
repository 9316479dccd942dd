"""The hosts of a TPU slice, with one process of an engine on each, and how these find each other.

GKE names them in TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, for Jobs, JobSets and LeaderWorkerSets; libtpu joins their
chips by the same names. The first one leads: the others connect to it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torchinfer.errors import ConfigError, EngineError
from torchinfer.link import Link

logger = logging.getLogger(__name__)

JOIN_SECONDS = 600.0  # in which all have to be there: pods start when their images are there
RETRY_SECONDS = 0.5
HELLO_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Hosts:
    """All hosts of a slice, and which of them this is."""

    names: tuple[str, ...]
    index: int

    @property
    def leads(self) -> bool:
        """Whether the others follow this one."""
        return self.index == 0


def find_hosts(environment: Mapping[str, str] = os.environ) -> Hosts | None:
    """The hosts of this slice; None if there is one.

    Raises:
        ConfigError: the variables do not fit together.
    """
    listed = environment.get("TPU_WORKER_HOSTNAMES", "")
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    if len(names) < 2:
        return None
    index = environment.get("TPU_WORKER_ID", "")
    if not index.isdecimal() or int(index) >= len(names):
        raise ConfigError(
            f"TPU_WORKER_ID={index!r} must be a whole number from 0 to {len(names) - 1}, the place of this host in "
            f"TPU_WORKER_HOSTNAMES={listed!r}; GKE sets both in pods that ask for google.com/tpu of a Job, a JobSet or "
            "a LeaderWorkerSet"
        )
    return Hosts(names, int(index))


def join(hosts: Hosts, port: int, seconds: float = JOIN_SECONDS) -> list[Link]:
    """Wait until all are there: links to all others, in their order, for the first, and to the first for the others.

    The first one listens on `port` and lets in nobody but the hosts that are named.

    Raises:
        ConfigError: the port is taken.
        EngineError: somebody did not come in time.
    """
    deadline = time.monotonic() + seconds
    return _accept(hosts, port, deadline) if hosts.leads else [_connect(hosts, port, deadline)]


def _accept(hosts: Hosts, port: int, deadline: float) -> list[Link]:
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ConfigError(
            f"hosts_port={port} of the first host cannot be listened on: {error}; give all another one"
        ) from error
    found: dict[int, Link] = {}
    with server:
        try:
            while len(found) < len(hosts.names) - 1:
                _accept_one(server, hosts, found, deadline)
        except BaseException:
            for link in found.values():
                link.close()
            raise
    return [found[index] for index in sorted(found)]


def _accept_one(server: socket.socket, hosts: Hosts, found: dict[int, Link], deadline: float) -> None:
    """Add the link to one more host, or send a stranger away."""
    missing = [name for index, name in enumerate(hosts.names) if index and index not in found]
    logger.info("waiting for %d of %d hosts: %s", len(missing), len(hosts.names), ", ".join(missing))
    server.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        peer, (address, *_) = server.accept()
    except TimeoutError:
        raise EngineError(f"{', '.join(missing)} did not come in time: see what is wrong there") from None
    if not any(address in _addresses(name) for name in missing):
        logger.warning("%s is none of the hosts of TPU_WORKER_HOSTNAMES that are awaited: sent away", address)
        peer.close()
        return
    link = Link(peer, address)
    try:
        (index,) = link.receive(HELLO_SECONDS)
        if index in found or index not in range(1, len(hosts.names)):
            raise EngineError(f"{address} says that it is host {index!r}: is TPU_WORKER_ID another one on each host?")
    except BaseException:
        link.close()
        raise
    link.name = f"host {index}, {hosts.names[index]}"
    found[index] = link


def _connect(hosts: Hosts, port: int, deadline: float) -> Link:
    name = hosts.names[0]
    while True:
        try:
            peer = socket.create_connection((name, port), timeout=max(deadline - time.monotonic(), 0.001))
        except OSError as error:  # it is not there yet, or its name is not known yet
            if time.monotonic() >= deadline:
                raise EngineError(f"host 0, {name}, port {port}, was not to be reached in time: {error}") from error
            time.sleep(RETRY_SECONDS)
        else:
            link = Link(peer, f"host 0, {name}")
            link.send(hosts.index)
            return link


def _addresses(name: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None, family=socket.AF_INET)}
    except OSError:
        return set()
