"""The bytes of one object of Cloud Storage, from one offset on: one GET, read into the caller's memory."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit

from torchinfer.errors import CheckpointError
from torchinfer.loader.source import TransientError, changed

CONNECT_SECONDS = 10.0
READ_BYTES = 1 << 20  # in one call: measured as the cheapest; a stall costs no more than this
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
CREDENTIALS_ADVICE = (
    "it needs the role roles/storage.objectViewer on the bucket; credentials are looked for in "
    "GOOGLE_APPLICATION_CREDENTIALS, in those of `gcloud auth application-default login`, and in the service account "
    "of the machine or pod (Workload Identity); without any, only public buckets can be read"
)


@dataclass(frozen=True, slots=True)
class PinnedObject:
    """One generation of an object."""

    address: str  # gs://..., for messages
    url: str  # of its bytes, the generation included
    generation: str
    size: int


class GcsStream:
    """The bytes [offset, stop) of an object as they come in; `position` is the next one's offset.

    Raises:
        TransientError: what failed may pass.
        CheckpointError: it will not pass, or the object is another one than was pinned.
    """

    def __init__(
        self,
        pinned: PinnedObject,
        headers: dict[str, str],
        offset: int,
        stop: int,
        *,
        tls: ssl.SSLContext,
        stall_timeout: float,
    ) -> None:
        self._pinned, self._stall_timeout = pinned, stall_timeout
        self.position, self.stop = offset, stop
        url = urlsplit(pinned.url)
        self._connection = (
            HTTPSConnection(url.netloc, timeout=CONNECT_SECONDS, context=tls)
            if url.scheme == "https"
            else HTTPConnection(url.netloc, timeout=CONNECT_SECONDS)
        )
        try:
            self._response = self._request(f"{url.path}?{url.query}", headers)
        except (TransientError, CheckpointError):
            self.close()
            raise

    def read_some(self, buffer: memoryview) -> int:
        """Fill `buffer`, or its beginning, with the next bytes; returns how many, at least 1."""
        with _network_errors(self._stall_timeout):
            count = self._response.readinto(buffer[: min(READ_BYTES, self.stop - self.position)])
        if count == 0:
            raise TransientError(f"the answer ended {self.stop - self.position} bytes early")
        self.position += count
        return count

    def close(self) -> None:
        """End the request, read to its end or not."""
        self._connection.close()

    def _request(self, target: str, headers: dict[str, str]) -> HTTPResponse:
        # gzip: without it, an object that is stored compressed would be unpacked on the way, and its size be another.
        own = {"Range": f"bytes={self.position}-{self.stop - 1}", "Accept-Encoding": "gzip"}
        with _network_errors(CONNECT_SECONDS):
            self._connection.connect()
        self._connection.sock.settimeout(self._stall_timeout)
        with _network_errors(self._stall_timeout):
            self._connection.request("GET", target, headers={**headers, **own})
            response = self._connection.getresponse()
            detail = "" if response.status in (200, 206) else _message(response.read(4096))
        self._check_status(response.status, detail)
        self._check_headers(response)
        return response

    def _check_status(self, status: int, detail: str) -> None:
        address = self._pinned.address
        if status in (200, 206):
            return
        if status in (408, 429) or status >= 500:
            raise TransientError(f"Cloud Storage answered {status}: {detail}")
        if status in (401, 403):
            raise CheckpointError(f"cannot read {address}: {status}: {detail}; {CREDENTIALS_ADVICE}")
        if status in (404, 412):  # it was there when it was pinned
            raise changed(address)
        raise CheckpointError(
            f"cannot read bytes [{self.position}, {self.stop}) of {address}: Cloud Storage answered {status}: "
            f"{detail}; check that the endpoint is Cloud Storage, and load again"
        )

    def _check_headers(self, response: HTTPResponse) -> None:
        address = self._pinned.address
        if response.headers.get("x-goog-generation", self._pinned.generation) != self._pinned.generation:
            raise changed(address)
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise CheckpointError(
                f"{address} is stored with Content-Encoding: {encoding}; ranges of it cannot be read: upload it without"
            )
        promised = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        expected = (self.position, self.stop - 1, self._pinned.size)
        if response.status != 206 or not promised or tuple(map(int, promised.groups())) != expected:
            raise CheckpointError(
                f"bytes [{self.position}, {self.stop}) of {address}, which has {self._pinned.size}, were asked for, "
                f"but the answer has status {response.status} and Content-Range "
                f"{response.headers.get('Content-Range')!r}; check what lies between here and Cloud Storage: a proxy, "
                "or an emulator"
            )


@contextlib.contextmanager
def _network_errors(timeout: float) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise CheckpointError(
            f"the certificate of Cloud Storage's endpoint is not trusted: {error.verify_message}; install the "
            "certificates of the system, or set SSL_CERT_FILE"
        ) from error
    except TimeoutError as error:
        raise TransientError(f"no byte came for {timeout:g} s") from error
    except (OSError, HTTPException) as error:
        raise TransientError(f"{type(error).__name__}: {error}") from error


def _message(body: bytes) -> str:
    """What an answer says of its error: JSON from Cloud Storage, anything from what lies between."""
    text = body.decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:200]
