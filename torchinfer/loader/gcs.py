"""`gs://bucket/prefix` as a source.

gcsfs finds credentials and the endpoint, and lists objects; FSSPEC_GS_... variables and STORAGE_EMULATOR_HOST mean
what they mean there. The bytes come by requests of our own (gcs_stream.py): gcsfs would copy each of them two or three
times, on the one thread of its event loop, and wait without end for a stream that stalls.

Every request names the generation that the list gave when the source was opened, so an object that is replaced
meanwhile is an error, never a mixture. Not supported: zonal buckets (Rapid Storage), which speak gRPC only, and client
certificates (mutual TLS).
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import os
import re
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchinfer.errors import CheckpointError
from torchinfer.loader.gcs_stream import CREDENTIALS_ADVICE, GcsStream, PinnedObject
from torchinfer.loader.source import FileStat, Reader, Source, TransientError, check_inside

if TYPE_CHECKING:
    from gcsfs.core import GCSFileSystem

METADATA_SECONDS = 60.0  # for one list or one look at an object, gcsfs's own retries included
STALL_SECONDS = 20.0
MAX_GAP_BYTES = 1 << 20  # up to here bytes are read and dropped; beyond, a new request is sooner there, and sends less
SKIP_BYTES = 64 << 10
REFUSED = re.compile(r"^Forbidden|credential", re.IGNORECASE)  # how gcsfs's messages say it
ADDRESS = re.compile(r"gs://?([a-z0-9][a-z0-9._-]*)(?:/(.*))?")


class GcsSource(Source):
    """The objects under one prefix. They are listed once, when it is opened: `stat` tells what was true then.

    `fs`: a gcsfs.GCSFileSystem to use in place of one with the default credentials.
    `stall_timeout`: seconds without a byte after which a read fails with TransientError.

    Raises:
        CheckpointError: gcsfs is missing, the address names no bucket, or the prefix cannot be listed.
    """

    is_network = True
    kind = "gs"
    max_gap_bytes = MAX_GAP_BYTES - 1

    def __init__(
        self, address: str | Path, *, fs: GCSFileSystem | None = None, stall_timeout: float = STALL_SECONDS
    ) -> None:
        self._folder = _folder(str(address))
        self.address = f"gs://{self._folder}"
        self._stall_timeout = stall_timeout
        self._tls = ssl.create_default_context()  # once: it reads all certificates of the system
        _require_gcsfs()
        with _metadata_errors(self.address):
            self._fs = fs or _connect()
            entries = self._fs.ls(self._folder, detail=True, refresh=True, timeout=METADATA_SECONDS)
        files = [entry for entry in entries if entry["type"] == "file"]
        if any(entry["name"] == self._folder for entry in files):
            raise CheckpointError(f"{self.address} is an object; pass the prefix that holds it")
        self._stats = {entry["name"].removeprefix(f"{self._folder}/"): _file_stat(entry) for entry in files}
        self._names = sorted(self._stats)

    def names(self) -> list[str]:
        return list(self._names)

    def stat(self, name: str) -> FileStat:
        check_inside(name)
        if name not in self._stats:
            self._stats[name] = self._look_at(name)
        return self._stats[name]

    def open(self, name: str, stat: FileStat, *, end: int | None = None, direct: bool = False) -> GcsReader:
        """See Source; the request is made by the first read, and there is no page cache for `direct` to avoid."""
        check_inside(name)
        generation = stat.version.removeprefix("generation ")
        url = f"{self._fs.url(f'{self._folder}/{name}')}&generation={generation}"
        pinned = PinnedObject(f"{self.address}/{name}", url, generation, stat.size)
        return GcsReader(self, pinned, stat.size if end is None else min(end, stat.size))

    def stream(self, pinned: PinnedObject, offset: int, stop: int) -> GcsStream:
        """A request for the bytes [offset, stop)."""
        return GcsStream(pinned, self._headers(), offset, stop, tls=self._tls, stall_timeout=self._stall_timeout)

    def _look_at(self, name: str) -> FileStat:
        """At an object that the list did not show, as it shows none of subfolders."""
        address = f"{self.address}/{name}"
        if "/" not in name:
            raise CheckpointError(f"{address} does not exist; under this prefix are: {', '.join(self._names[:20])}")
        with _metadata_errors(address):
            entry = self._fs.info(f"{self._folder}/{name}", timeout=METADATA_SECONDS)
        if entry["type"] != "file":
            raise CheckpointError(f"{address} is a prefix, not an object; a checkpoint has regular files only")
        return _file_stat(entry)

    def _headers(self) -> dict[str, str]:
        """With an access token that is valid for some minutes."""
        headers = {"User-Agent": "torchinfer"}
        try:
            self._fs.credentials.apply(headers)
        except (
            Exception
        ) as error:  # of several libraries; the credentials were good enough for the list, so it may pass
            raise TransientError(f"the access token cannot be renewed: {type(error).__name__}: {error}") from error
        if self._fs.requester_pays:
            payer = self._fs.requester_pays
            headers["x-goog-user-project"] = payer if isinstance(payer, str) else self._fs.project
        return headers


class GcsReader(Reader):
    """One object, read forward: the bytes from the first offset to `end` come by one request."""

    def __init__(self, source: GcsSource, pinned: PinnedObject, end: int) -> None:
        self._source, self._pinned, self._end = source, pinned, end
        self._stream: GcsStream | None = None

    def read_some(self, offset: int, buffer: memoryview) -> int:
        if offset >= self._pinned.size or not buffer:
            return 0
        try:
            return self._stream_at(offset).read_some(buffer)
        except (TransientError, CheckpointError):
            self.close()
            raise

    def check(self) -> None:
        """Nothing to do: every request names the generation."""

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _stream_at(self, offset: int) -> GcsStream:
        stream = self._stream
        if stream and stream.position <= offset < min(stream.stop, stream.position + MAX_GAP_BYTES):
            while stream.position < offset:
                self.skipped_bytes += stream.read_some(memoryview(bytearray(min(SKIP_BYTES, offset - stream.position))))
            return stream
        self.close()
        self._stream = self._source.stream(self._pinned, offset, self._end if offset < self._end else self._pinned.size)
        return self._stream


def is_gcs_address(path: str | Path) -> bool:
    """Whether it means Cloud Storage; also as a Path, which makes one slash of two, and none of those at the end."""
    return str(path) == "gs:" or str(path).startswith("gs:/")


def _folder(address: str) -> str:
    """bucket/prefix, without a slash at its end."""
    found = ADDRESS.fullmatch(address)
    if not found:
        raise CheckpointError(
            f"{address!r} is not an address in Cloud Storage; write gs://bucket/prefix (a bucket's name has lower-case "
            "letters, digits, '-', '_' and '.')"
        )
    return "/".join(part for part in (found[1], (found[2] or "").strip("/")) if part)


def _require_gcsfs() -> None:
    if importlib.util.find_spec("gcsfs") is None:
        raise CheckpointError(
            "gs:// needs the package gcsfs, which is not installed: pip install gcsfs, or mount the bucket with gcsfuse"
            " and pass the folder"
        )


def _connect() -> GCSFileSystem:
    # This class, and not gcsfs.GCSFileSystem, which asks the gRPC API for each bucket's kind before anything else, and
    # waits for 60 s where that cannot be reached.
    from gcsfs.core import GCSFileSystem

    # Not shared with others who use gcsfs in this process: its lists are kept for ever, and this one may only read.
    options: dict[str, Any] = {"access": "read_only", "skip_instance_cache": True, "use_listings_cache": False}
    if os.environ.get("STORAGE_EMULATOR_HOST", "") not in ("", "default"):
        options["token"] = "anon"  # the search for credentials asks the metadata server, for seconds
    return GCSFileSystem(**options)


def _file_stat(entry: dict[str, Any]) -> FileStat:
    checksum = entry.get("crc32c")  # base64, big-endian; each object has it, emulators may not give it
    return FileStat(
        entry["size"],
        f"generation {entry['generation']}",
        int.from_bytes(base64.b64decode(checksum), "big") if checksum else None,
    )


@contextlib.contextmanager
def _metadata_errors(address: str) -> Iterator[None]:
    """All that gcsfs raises, as our error: its own classes, which differ by version, and those of four libraries."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{address} does not exist: there is no such bucket, or nothing under this prefix; pass the prefix that "
            "holds config.json and *.safetensors"
        ) from error
    except TimeoutError as error:
        raise CheckpointError(
            f"cannot look at {address}: no answer within {METADATA_SECONDS:g} s; check the network and the endpoint"
        ) from error
    except Exception as error:
        message = " ".join(str(error).split())
        is_refused = getattr(error, "code", None) in (401, 403) or REFUSED.search(message)
        advice = CREDENTIALS_ADVICE if is_refused else "check the network and the endpoint"
        raise CheckpointError(f"cannot look at {address}: {type(error).__name__}: {message}; {advice}") from error
