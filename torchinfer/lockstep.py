"""Processes that compute one model together: each has the same engine, and does what the first one's is told.

What a step is depends on nothing but what the engine was told before: requests, aborts, steps. So that is all that
travels between them, some bytes a step; schedulers, samplers and caches are in every process, and launch the same
programs in the same order. With each step goes a checksum of the tokens so far: a process that has others ends.

    to the others    ["add", request] | ["abort", request id] | ["step", checksum] | ["stats"] | ["close"]
"""

from __future__ import annotations

import contextlib
import json
import logging
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from torchinfer.config import EngineConfig
from torchinfer.engine import Engine
from torchinfer.engine_info import EngineStats
from torchinfer.errors import ConfigError, EngineError, raise_all
from torchinfer.link import Link
from torchinfer.loader.checkpoint import Checkpoint
from torchinfer.request import Request, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)


OWN_OPTIONS = ("model", "compile_cache", "load_memory", "load_readers", "load_direct", "verify", "progress")


def facts(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """What has to be the same in all processes: options, but for those that are each one's own, and the checkpoint."""
    options = {name: value for name, value in asdict(config).items() if name not in OWN_OPTIONS}
    tensors = {name: [str(entry.dtype), *entry.shape] for name, entry in checkpoint.tensors.items()}
    texts = {"config.json": checkpoint.config, "tensors": tensors}
    sums = {f"CRC32 of {name}": zlib.crc32(json.dumps(each, sort_keys=True).encode()) for name, each in texts.items()}
    found: dict[str, Any] = json.loads(json.dumps({"torchinfer": version("torchinfer")} | options | sums, default=str))
    return found


class Group:
    """The processes of an engine; `links` go to all others from the first, and to the first from each other one."""

    def __init__(self, leads: bool, links: list[Link], after: Callable[[], None] | None = None) -> None:
        """`after` is called when all connections have ended."""
        self.leads = leads
        self.links = links
        self._after = after

    def agree(self, facts: dict[str, Any]) -> None:
        """Compare what has to be the same in all processes, values of JSON.

        Raises:
            ConfigError: with all that differs; in all processes.
        """
        if not self.leads:
            (link,) = self.links
            link.send(facts)
            raise_all(link.receive()[0], ConfigError, f"this process does not fit {link.name}")
            return
        found = [_differences(link.name, facts, link.receive()[0]) for link in self.links]
        for link, problems in zip(self.links, found, strict=True):
            link.send(problems)
        raise_all([each for problems in found for each in problems], ConfigError, "the processes do not fit together")

    def least(self, number: int) -> int:
        """The smallest that any process has."""
        if not self.leads:
            (link,) = self.links
            link.send(number)
            return int(link.receive()[0])
        found = min([number, *(int(link.receive()[0]) for link in self.links)])
        self.tell(found)
        return found

    def tell(self, *values: Any) -> None:
        """Send all others a message."""
        for link in self.links:
            link.send(*values)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While this process waits for what the others take part in."""
        for link in self.links:
            link.is_busy = True
        try:
            yield
        finally:
            for link in self.links:
                link.is_busy = False

    def close(self) -> None:
        """End all connections."""
        for link in self.links:
            link.close()
        if self._after is not None:
            self._after()


class LeadingEngine(Engine):
    """The engine that is asked; the others do as it does, until it is closed, or nobody has it any more."""

    def __init__(self, group: Group, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group, self._checksum = group, 0
        self._release = weakref.finalize(self, _release, group)
        for link in group.links:
            link.is_busy = False

    def add(self, request: Request) -> None:
        super().add(request)
        self._group.tell("add", asdict(request))

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        self._group.tell("abort", request_id)

    def step(self) -> list[TokenEvent]:
        self._group.tell("step", self._checksum)
        with self._group.busy():
            events = super().step()
        self._checksum = checksum(events, self._checksum)
        return events

    def stats(self) -> EngineStats:
        self._group.tell("stats")  # it reads tensors that all processes have a part of
        with self._group.busy():
            return super().stats()

    def close(self) -> None:
        super().close()
        self._release()


def _release(group: Group) -> None:
    for link in group.links:
        try:
            link.send("close")
        except EngineError as error:
            logger.warning("%s", error)
    group.close()


def follow(engine: Engine, link: Link) -> None:
    """Do as the leading engine does, until it is closed.

    Raises:
        EngineError: it is gone, or has got other tokens.
    """
    found = 0
    while True:
        command, *arguments = link.receive()
        if command == "step":
            if arguments[0] != found:
                raise EngineError(
                    f"this process has other tokens than {link.name}: their weights, versions or devices differ"
                )
            found = checksum(engine.step(), found)
        elif command == "add":
            engine.add(to_request(arguments[0]))
        elif command == "abort":
            engine.abort(arguments[0])
        elif command == "stats":
            engine.stats()
        else:
            link.close()
            return


def checksum(events: Iterable[TokenEvent], before: int) -> int:
    """CRC32 of the tokens of events, after others."""
    return zlib.crc32(array("q", [token for event in events for token in event.token_ids]).tobytes(), before)


def to_request(fields: dict[str, Any]) -> Request:
    """A request from what `asdict` and JSON made of it."""
    params = fields["params"]
    bias = {int(token): value for token, value in params["logit_bias"].items()}
    return Request(
        fields["request_id"],
        tuple(fields["prompt_ids"]),
        SamplingParams(**params | {"logit_bias": bias}),
        fields["priority"],
    )


def _differences(name: str, own: dict[str, Any], other: dict[str, Any]) -> list[str]:
    keys = dict.fromkeys((*own, *other))
    return [
        f"{key}={other.get(key)!r} in {name}, but {own.get(key)!r} in the first: start all with the same"
        for key in keys
        if own.get(key) != other.get(key)
    ]
