"""The Cloud Storage server for tests, asked with plain HTTP: what gcsfs gets from it is in loader/test_gcs.py."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import google_crc32c
import pytest

from torchinfer.errors import ConfigError
from torchinfer.fake_gcs import Behaviour, FakeGcs, Stats

CONTENT = bytes(range(256)) * 40
OBJECT = "/storage/v1/b/bucket/o/folder%2Fa.bin"
MEDIA = f"{OBJECT}?alt=media"


@pytest.fixture
def gcs(tmp_path: Path) -> Iterator[FakeGcs]:
    folder = tmp_path / "bucket" / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.bin").write_bytes(CONTENT)
    for name in ("b", "c", "deeper/d", "deeper/e"):
        (folder / name).write_text(name)
    with FakeGcs(tmp_path) as server:
        yield server


def ask(
    gcs: FakeGcs, target: str, *, method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection(urlsplit(gcs.endpoint).netloc, timeout=20)
    try:
        connection.request(method, target, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def ask_json(gcs: FakeGcs, target: str) -> dict[str, Any]:
    content = json.loads(ask(gcs, target)[2])
    assert isinstance(content, dict)
    return content


def names(page: dict[str, Any]) -> list[str]:
    return [item["name"] for item in page["items"]]


def test_a_list_with_a_delimiter_shows_folders_once(gcs: FakeGcs) -> None:
    page = ask_json(gcs, "/storage/v1/b/bucket/o?prefix=folder/&delimiter=/")
    assert (names(page), page["prefixes"]) == (["folder/a.bin", "folder/b", "folder/c"], ["folder/deeper/"])


def test_a_list_without_a_delimiter_shows_everything_below(gcs: FakeGcs) -> None:
    assert names(ask_json(gcs, "/storage/v1/b/bucket/o?prefix=folder/d")) == ["folder/deeper/d", "folder/deeper/e"]


@pytest.mark.parametrize("settings", [Behaviour(page_size=2), Behaviour()])
def test_pages_go_on_where_the_last_one_ended(gcs: FakeGcs, settings: Behaviour) -> None:
    gcs.set(settings)
    first = ask_json(gcs, "/storage/v1/b/bucket/o?maxResults=2")
    second = ask_json(gcs, f"/storage/v1/b/bucket/o?maxResults=2&pageToken={first['nextPageToken']}")
    assert names(first) + names(second) == ["folder/a.bin", "folder/b", "folder/c", "folder/deeper/d"]


def test_metadata_have_size_and_checksum(gcs: FakeGcs) -> None:
    found = ask_json(gcs, OBJECT)
    checksum = base64.b64encode(google_crc32c.value(CONTENT).to_bytes(4, "big")).decode()
    assert (found["size"], found["crc32c"], "md5Hash" in found) == (str(len(CONTENT)), checksum, False)


def test_the_generation_changes_when_the_file_is_replaced(gcs: FakeGcs, tmp_path: Path) -> None:
    before = ask_json(gcs, OBJECT)["generation"]
    (tmp_path / "new").write_bytes(CONTENT)
    os.replace(tmp_path / "new", tmp_path / "bucket" / "folder" / "a.bin")
    assert ask_json(gcs, OBJECT)["generation"] != before


def test_the_media_link_of_a_replaced_object_is_gone(gcs: FakeGcs) -> None:
    link = ask_json(gcs, OBJECT)["mediaLink"].removeprefix(gcs.endpoint)
    before = ask(gcs, link)[0]
    gcs.replace("bucket/folder/a.bin")
    assert (before, ask(gcs, link)[0]) == (200, 404)


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=0-9", 0, 10), ("bytes=10000-", 10000, 10240), ("bytes=10000-99999", 10000, 10240)],
)
def test_ranges(gcs: FakeGcs, asked: str, start: int, stop: int) -> None:
    status, headers, body = ask(gcs, MEDIA, Range=asked)
    assert (status, headers["Content-Range"]) == (206, f"bytes {start}-{stop - 1}/10240")
    assert body == CONTENT[start:stop]


def test_without_a_range_the_whole_object_comes(gcs: FakeGcs) -> None:
    status, headers, body = ask(gcs, f"/download{MEDIA}")
    assert (status, body) == (200, CONTENT)
    assert headers["x-goog-generation"] == gcs.objects.generation("bucket", "folder/a.bin")


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        (MEDIA, {"Range": "bytes=10240-"}, 416),
        (f"{MEDIA}&generation=1", {}, 404),
        ("/storage/v1/b/bucket/o/absent?alt=media", {}, 404),
        ("/storage/v1/b/bucket/o/..%2F..%2Fpasswd", {}, 404),
        ("/storage/v1/b/absent/o", {}, 404),
        ("/elsewhere", {}, 404),
    ],
)
def test_refusals(gcs: FakeGcs, target: str, headers: dict[str, str], status: int) -> None:
    found, _, body = ask(gcs, target, **headers)
    assert (found, json.loads(body)["error"]["code"]) == (status, status)


def test_a_fault_meets_the_first_request_and_each_nth_after_it(gcs: FakeGcs) -> None:
    ask(gcs, MEDIA)
    gcs.set(Behaviour(fault="503", every=3))
    assert [ask(gcs, MEDIA)[0] for _ in range(7)] == [503, 200, 200, 503, 200, 200, 503]


def test_a_fault_leaves_metadata_alone(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(fault="503"))
    assert ask(gcs, OBJECT)[0] == 200


def test_truncate_ends_the_body_in_the_middle(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(fault="truncate"))
    with pytest.raises(IncompleteRead) as caught:
        ask(gcs, MEDIA)
    assert caught.value.partial == CONTENT[: len(CONTENT) // 2]


def test_flip_turns_one_bit_over(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(fault="flip"))
    difference = int.from_bytes(ask(gcs, MEDIA)[2], "big") ^ int.from_bytes(CONTENT, "big")
    assert difference.bit_count() == 1


def test_stall_waits_in_the_middle_and_goes_on(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(fault="stall", stall_seconds=0.2))
    before = time.monotonic()
    assert ask(gcs, MEDIA)[2] == CONTENT
    assert time.monotonic() - before >= 0.2


@pytest.mark.parametrize("target", [MEDIA, OBJECT, "/storage/v1/b/bucket/o"])
def test_latency_comes_before_each_answer(gcs: FakeGcs, target: str) -> None:
    gcs.set(Behaviour(latency=0.1))
    before = time.monotonic()
    ask(gcs, target)
    assert time.monotonic() - before >= 0.1


def test_a_stream_is_not_faster_than_its_rate(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(rate=20_480))
    before = time.monotonic()
    ask(gcs, MEDIA)
    assert time.monotonic() - before >= 0.4  # of 0.5


def test_requests_and_bytes_are_counted(gcs: FakeGcs) -> None:
    ask(gcs, MEDIA, Range="bytes=0-99")
    ask(gcs, OBJECT)
    ask(gcs, "/storage/v1/b/bucket/o")
    assert ask_json(gcs, "/__stat?reset=1") == {
        "num_media": 1,
        "num_lists": 1,
        "num_infos": 1,
        "num_bytes": 100,
        "in_flight": 0,
        "max_in_flight": 1,
    }
    assert gcs.stats() == Stats()


def test_streams_in_flight_are_counted(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(fault="stall"))
    threads = [threading.Thread(target=_ask_until_cut, args=(gcs,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    while gcs.stats().in_flight < 3:
        time.sleep(0.01)
    gcs.close()
    for thread in threads:
        thread.join()
    assert gcs.stats().max_in_flight == 3


def _ask_until_cut(gcs: FakeGcs) -> None:
    with pytest.raises((IncompleteRead, ConnectionError)):
        ask(gcs, MEDIA)


def test_behaviour_can_be_changed_over_http(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(latency=0.01))
    status, _, _ = ask(gcs, "/__control", method="POST", body='{"fault": "429", "every": 5}')
    assert (status, gcs.behaviour) == (200, Behaviour(latency=0.01, fault="429", every=5))


def test_an_object_can_be_replaced_over_http(gcs: FakeGcs) -> None:
    before = ask_json(gcs, OBJECT)["generation"]
    ask(gcs, "/__control", method="POST", body='{"replace": "bucket/folder/a.bin"}')
    assert ask_json(gcs, OBJECT)["generation"] != before


@pytest.mark.parametrize("body", ['{"fault": "418"}', '{"speed": 1}', "[]", "{"])
def test_an_unknown_setting_over_http_is_refused(gcs: FakeGcs, body: str) -> None:
    assert ask(gcs, "/__control", method="POST", body=body)[0] == 400
    assert gcs.behaviour == Behaviour()


@pytest.mark.parametrize("settings", [{"latency": -1.0}, {"rate": -1.0}, {"every": 0}, {"page_size": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Behaviour(**settings)


def test_it_runs_as_a_program(gcs: FakeGcs, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchinfer.fake_gcs", str(tmp_path), "--fault", "503", "--every", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            netloc = urlsplit(process.stdout.readline().strip()).netloc
            found = []
            for _ in range(2):
                connection = HTTPConnection(netloc, timeout=20)
                connection.request("GET", MEDIA)
                found.append(connection.getresponse().status)
                connection.close()
        finally:
            process.terminate()
    assert found == [503, 200]


@pytest.mark.skipif(
    not (shutil.which("rclone") and shutil.which("fusermount3") and os.path.exists("/dev/fuse")),
    reason="needs rclone, fuse3 and /dev/fuse",
)
def test_rclone_mounts_it(gcs: FakeGcs, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    command = ["rclone", "mount", ":gcs:bucket", str(mount), "--gcs-endpoint", f"{gcs.endpoint}/storage/v1/"]
    command += ["--gcs-anonymous", "--read-only", "--vfs-cache-mode", "off", "--config", str(tmp_path / "none")]
    with subprocess.Popen(command) as process:
        try:
            while not os.path.ismount(mount):
                assert process.poll() is None
                time.sleep(0.05)
            read = ["timeout", "-k", "1", "20", "cat", str(mount / "folder" / "a.bin")]
            assert subprocess.run(read, stdout=subprocess.PIPE, check=True).stdout == CONTENT
        finally:
            subprocess.run(["umount", "-l", str(mount)], check=False)
            process.terminate()
