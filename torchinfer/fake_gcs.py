"""A Cloud Storage server on this machine, for tests and benchmarks: the part of its JSON API that gcsfs and
`rclone mount` use, with a latency, a rate per stream and faults that can be set while it runs.

    with FakeGcs("folder") as gcs:            # folder/<bucket>/<object>
        gcs.set(Behaviour(fault="503", every=3))

    python -m torchinfer.fake_gcs folder --port 9024 --latency 0.045 --rate 200e6
    curl localhost:9024/__control -d '{"fault": "stall", "every": 10}'; curl localhost:9024/__stat
    STORAGE_EMULATOR_HOST=http://127.0.0.1:9024 ...    # for gcsfs
    rclone mount :gcs:bucket mnt --gcs-endpoint http://127.0.0.1:9024/storage/v1/ --gcs-anonymous --read-only

Source: https://cloud.google.com/storage/docs/json_api/v1
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self, cast
from urllib.parse import parse_qs, unquote, urlsplit

from torchinfer.errors import ConfigError
from torchinfer.fake_gcs_objects import Objects

STATUS_FAULTS = ("401", "403", "404", "408", "412", "416", "429", "500", "503")
BODY_FAULTS = ("truncate", "stall", "flip")
MAX_SEND_BYTES = 8 << 20
PACE_SECONDS = 0.01  # a stream with a rate sends once in this time
BURST_SECONDS = 0.05  # of a late stream: so much of what it missed may be made up for
STORAGE_PATH = re.compile(r"(?:/download)?(?:/storage/v1)?/b/([^/]+)(/o(?:/(.+))?)?")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Behaviour:
    """What can be set at run time.

    Faults meet requests for an object's bytes: the first one after the setting, and each `every`-th after it. A status
    is the whole answer; in the middle of the body, "truncate" ends the connection, "stall" waits for `stall_seconds`,
    and "flip" turns one bit over.
    """

    latency: float = 0.0  # seconds to an answer's first byte
    rate: float = 0.0  # bytes per second of each stream; 0 is without limit
    fault: str = ""
    every: int = 1
    stall_seconds: float = 60.0
    page_size: int = 1000  # most entries in one page of a list
    checksums: bool = True  # crc32c in the metadata: each file is read once for it
    encoding: str = ""  # a Content-Encoding that is claimed for every object
    token: str = ""  # an access token without which nothing is answered

    def __post_init__(self) -> None:
        if self.fault not in ("", *STATUS_FAULTS, *BODY_FAULTS):
            raise ConfigError(f"fault={self.fault!r} is unknown; use one of {', '.join(STATUS_FAULTS + BODY_FAULTS)}")
        for name, low in (("latency", 0), ("rate", 0), ("every", 1), ("stall_seconds", 0), ("page_size", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} is too little; it is at least {low}")


@dataclass
class Stats:
    """Counts since the last reset; a request that met a fault counts too."""

    num_media: int = 0  # requests for an object's bytes
    num_lists: int = 0
    num_infos: int = 0
    num_bytes: int = 0  # handed to the system's sockets, whether the client read them or not
    in_flight: int = 0
    max_in_flight: int = 0


class FakeGcs:
    """The server; it serves from the moment it is made until `close`, at `endpoint`.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, root: str | Path, port: int = 0, behaviour: Behaviour | None = None) -> None:
        self.objects = Objects(Path(root))
        self.behaviour = behaviour or Behaviour()
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._stats = Stats()
        self._num_since_set = 0
        self._server = _Server(self, port)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake-gcs", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and end every connection."""
        self.stopped.set()
        self._server.shutdown()
        self._server.end_connections()
        self._server.server_close()

    def set(self, behaviour: Behaviour) -> None:
        """From now on; the count of requests to the next fault starts again."""
        with self._lock:
            self.behaviour = behaviour
            self._num_since_set = 0

    def replace(self, path: str) -> None:
        """From now on, the object "<bucket>/<name>" has another generation, as if it had been uploaded again."""
        with self._lock:
            self.objects.num_uploads[path] = self.objects.num_uploads.get(path, 0) + 1

    def stats(self, *, reset: bool = False) -> Stats:
        """The counts; with `reset`, they start again, except for the requests in flight."""
        with self._lock:
            found = dataclasses.replace(self._stats)
            if reset:
                self._stats = Stats(in_flight=found.in_flight, max_in_flight=found.in_flight)
            return found

    def count(self, *, lists: int = 0, infos: int = 0, num_bytes: int = 0) -> None:
        with self._lock:
            self._stats.num_lists += lists
            self._stats.num_infos += infos
            self._stats.num_bytes += num_bytes

    @contextlib.contextmanager
    def media_request(self) -> Iterator[str]:
        """Counted as in flight inside of the block; gives the fault that meets this request, or ""."""
        with self._lock:
            fault = self.behaviour.fault if self._num_since_set % self.behaviour.every == 0 else ""
            self._num_since_set += 1
            self._stats.num_media += 1
            self._stats.in_flight += 1
            self._stats.max_in_flight = max(self._stats.max_in_flight, self._stats.in_flight)
        try:
            yield fault
        finally:
            with self._lock:
                self._stats.in_flight -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, gcs: FakeGcs, port: int) -> None:
        self.gcs = gcs
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        self._connections.discard(cast(socket.socket, request))
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave in the middle are what tests and mounts do; anything else is our bug and is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(cast(socket.socket, request), client_address)

    def end_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # it ended by itself
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line for each request would cost more than the request."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if url.path == "/__stat":
            return self._answer(dataclasses.asdict(self.server.gcs.stats(reset="reset" in query)))
        behaviour = self.server.gcs.behaviour
        if query.get("alt") != "media":  # it counts as in flight while it waits
            self._wait(behaviour.latency)
        if behaviour.token and self.headers.get("Authorization") != f"Bearer {behaviour.token}":
            return self._refuse(401, "Anonymous caller does not have storage.objects.get access")
        place = STORAGE_PATH.fullmatch(url.path)
        if not place:
            return self._refuse(404, "Not Found")
        bucket, objects, name = unquote(place[1]), place[2], place[3]
        if name:
            return self._object(bucket, unquote(name), query)
        if objects:
            return self._list(bucket, query)
        return self._answer({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/__control":
            return self._refuse(404, "Not Found")
        gcs = self.server.gcs
        try:
            changes = json.loads(body)
            if path := changes.pop("replace", None):
                gcs.replace(path)
            gcs.set(Behaviour(**{**dataclasses.asdict(gcs.behaviour), **changes}))
        except (ValueError, TypeError, AttributeError) as error:
            return self._refuse(400, str(error))
        return self._answer(dataclasses.asdict(gcs.behaviour))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        gcs, delimiter = self.server.gcs, query.get("delimiter", "")
        gcs.count(lists=1)
        entries = gcs.objects.entries(bucket, query.get("prefix", ""), delimiter)
        if entries is None:
            return self._refuse(404, "The specified bucket does not exist.")
        start = int(query.get("pageToken", 0))
        stop = start + min(gcs.behaviour.page_size, int(query.get("maxResults", 1000)))
        page = entries[start:stop]
        folders = [name for name in page if delimiter and name.endswith(delimiter)]
        items = [self._metadata(bucket, name) for name in page if name not in folders]
        token = {"nextPageToken": str(stop)} if stop < len(entries) else {}
        return self._answer({"kind": "storage#objects", "items": items, "prefixes": folders, **token})

    def _metadata(self, bucket: str, name: str) -> dict[str, str]:
        gcs = self.server.gcs
        return gcs.objects.metadata(bucket, name, gcs.endpoint, checksums=gcs.behaviour.checksums)

    def _object(self, bucket: str, name: str, query: dict[str, str]) -> None:
        gcs = self.server.gcs
        path = gcs.objects.path(bucket, name)
        if path is None:
            return self._refuse(404, f"No such object: {bucket}/{name}")
        generation = gcs.objects.generation(bucket, name)
        if query.get("generation", generation) != generation:
            return self._refuse(404, f"No such object: {bucket}/{name}#{query['generation']}")
        if query.get("alt") != "media":
            gcs.count(infos=1)
            return self._answer(self._metadata(bucket, name))
        with gcs.media_request() as fault:
            self._wait(gcs.behaviour.latency)
            if fault in STATUS_FAULTS:
                return self._refuse(int(fault), "injected")
            return self._media(path, generation, fault)

    def _media(self, path: Path, generation: str, fault: str) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            asked = RANGE.fullmatch(self.headers.get("Range") or "")
            start, stop = (int(asked[1]), min(int(asked[2] or size) + 1, size)) if asked else (0, size)
            if asked and start >= size:
                return self._refuse(416, "The requested range cannot be satisfied.")
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("x-goog-generation", generation)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            if self.server.gcs.behaviour.encoding:
                self.send_header("Content-Encoding", self.server.gcs.behaviour.encoding)
            self.end_headers()
            self._body(file.fileno(), start, stop, fault)

    def _body(self, file: int, start: int, stop: int, fault: str) -> None:
        gcs, pace = self.server.gcs, _Pace(self.server.gcs)
        middle = (start + stop) // 2
        if fault:
            self._send(file, start, middle, pace)
            start = middle
        if fault == "truncate":
            self.close_connection = True
            return
        if fault == "stall":
            self._wait(gcs.behaviour.stall_seconds)
        if fault == "flip":
            byte = os.pread(file, 1, start)
            self.wfile.write(bytes([byte[0] ^ 1]))
            start += 1
        self._send(file, start, stop, pace)

    def _send(self, file: int, start: int, stop: int, pace: _Pace) -> None:
        while start < stop and not self.server.gcs.stopped.is_set():
            wanted = min(pace.step, stop - start)
            pace.wait(wanted)
            count = self._send_some(file, start, wanted)
            if count == 0:  # the file was cut off meanwhile
                self.close_connection = True
                return
            start += count

    def _send_some(self, file: int, start: int, wanted: int) -> int:
        """Bytes that were sent. They are counted first: a client that has them may ask for the counts at once."""
        self.server.gcs.count(num_bytes=wanted)
        count = 0
        try:
            count = os.sendfile(self.connection.fileno(), file, start, wanted)
        finally:
            self.server.gcs.count(num_bytes=count - wanted)
        return count

    def _wait(self, seconds: float) -> None:
        self.server.gcs.stopped.wait(seconds)

    def _refuse(self, status: int, message: str) -> None:
        self._answer({"error": {"code": status, "message": message}}, status)

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Pace:
    """When a stream may send on. Of the time that a slow client loses, BURST_SECONDS are made up for."""

    def __init__(self, gcs: FakeGcs) -> None:
        self._gcs, self._rate = gcs, gcs.behaviour.rate
        self.step = min(MAX_SEND_BYTES, max(1, int(self._rate * PACE_SECONDS))) if self._rate else MAX_SEND_BYTES
        self._due = time.monotonic()

    def wait(self, num_bytes: int) -> None:
        """Until it is time for so many bytes to be there."""
        if self._rate:
            now = time.monotonic()
            self._due = max(self._due, now - BURST_SECONDS) + num_bytes / self._rate
            self._gcs.stopped.wait(max(0.0, self._due - now))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torchinfer.fake_gcs", description="A Cloud Storage server for tests"
    )
    parser.add_argument("root", type=Path, help="folder with a folder for each bucket")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to the first byte of each answer")
    parser.add_argument("--rate", type=float, default=0.0, help="bytes per second of each stream")
    parser.add_argument("--fault", default="", help=", ".join(STATUS_FAULTS + BODY_FAULTS))
    parser.add_argument("--every", type=int, default=1, help="the fault meets the first request and each n-th after it")
    parser.add_argument("--stall-seconds", type=float, default=60.0)
    parser.add_argument("--no-checksums", dest="checksums", action="store_false", help="leave out crc32c")
    options = vars(parser.parse_args())
    root, port = options.pop("root"), options.pop("port")
    with FakeGcs(root, port, Behaviour(**options)) as gcs:
        print(gcs.endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            gcs.stopped.wait()


if __name__ == "__main__":
    main()
