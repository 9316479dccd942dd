"""The storage of figure 3 of benchmarks/loading.py: torchinfer's fake Cloud Storage, and `rclone mount` over it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from loading_run import Place

MOUNT_SECONDS = 20.0


@contextlib.contextmanager
def serve(root: Path, *, latency: float, rate: float) -> Iterator[str]:
    """The endpoint of a server in a process of its own. latency: seconds; rate: bytes per second of each stream."""
    command = [sys.executable, "-m", "torchinfer.fake_gcs", str(root), "--no-checksums"]
    command += ["--latency", str(latency), "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            endpoint = server.stdout.readline().strip()
            if not endpoint:
                raise SystemExit("the fake Cloud Storage server did not start; its message is above")
            yield endpoint
        finally:
            server.terminate()


@contextlib.contextmanager
def mount(endpoint: str, folder: str) -> Iterator[Path]:
    """`bucket/prefix` as a folder. A mount is made for each load, so that nothing is cached.

    rclone keeps a stream per file handle, as gcsfuse does, and asks for 128 MiB at a time.
    """
    if shutil.which("rclone") is None:
        raise SystemExit("rclone is not installed: figure 3 needs it (Debian packages rclone and fuse3)")
    point = Path(tempfile.mkdtemp(prefix="torchinfer-mount-"))
    command = ["rclone", "mount", f":gcs:{folder}", str(point), "--gcs-endpoint", f"{endpoint}/storage/v1/"]
    command += ["--gcs-anonymous", "--read-only", "--vfs-cache-mode", "off", "--config", os.devnull]
    with subprocess.Popen(command) as rclone:
        try:
            wait_for(point, rclone)
            yield point
        finally:
            subprocess.run(["umount", "-l", str(point)], check=False)
            rclone.terminate()
    point.rmdir()


@contextlib.contextmanager
def counted(place: Place, endpoint: str, streams: list[int]) -> Iterator[Path | str]:
    """The place; afterwards `streams` has one more entry: the most requests for data that the server had at once."""
    with place() as folder:
        server_stats(endpoint)
        yield folder
        streams.append(server_stats(endpoint)["max_in_flight"])


def server_stats(endpoint: str) -> dict[str, int]:
    """Its counts, which start again."""
    with urllib.request.urlopen(f"{endpoint}/__stat?reset") as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


def wait_for(point: Path, rclone: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + MOUNT_SECONDS
    while not os.path.ismount(point):
        if rclone.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"rclone did not mount {point} within {MOUNT_SECONDS:g} s; does /dev/fuse exist?")
        time.sleep(0.02)


def client_env(endpoint: str) -> dict[str, str]:
    """What makes gcsfs, and the streamer's Google client, talk to the server."""
    return {
        "STORAGE_EMULATOR_HOST": endpoint,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": endpoint,
        "RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS": "true",
    }
