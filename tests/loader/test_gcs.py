"""gs:// addresses, against the server of torchinfer.fake_gcs."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import google_crc32c
import pytest
from gcsfs.core import GCSFileSystem
from google.oauth2.credentials import Credentials

from torchinfer.errors import CheckpointError
from torchinfer.fake_gcs import Behaviour, FakeGcs
from torchinfer.loader import gcs as gcs_module
from torchinfer.loader.gcs import MAX_GAP_BYTES, GcsSource
from torchinfer.loader.gcs_stream import READ_BYTES
from torchinfer.loader.retry import Attempts, PersistentReader, RetryPolicy
from torchinfer.loader.source import TransientError
from torchinfer.loader.stall import read_file

SIZE = 3_000_001
CONTENT = random.Random(0).randbytes(SIZE)
QUICK = RetryPolicy(attempts=4, first_delay=0.001, max_delay=0.002)
STALL = 1.0


@pytest.fixture
def gcs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    folder = tmp_path / "bucket" / "models" / "llama"
    (folder / "original").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(CONTENT)
    (folder / "config.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "original" / "params.json").write_text("[1]")
    with FakeGcs(tmp_path) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
        yield server


@pytest.fixture
def source(gcs: FakeGcs) -> GcsSource:
    return GcsSource("gs://bucket/models/llama", stall_timeout=STALL)


def load(source: GcsSource, attempts: Attempts | None = None) -> bytes:
    """The whole of model.safetensors, through retries."""
    buffer = bytearray(SIZE)
    stat = source.stat("model.safetensors")
    with PersistentReader(source, "model.safetensors", stat, attempts or Attempts(QUICK), end=SIZE) as reader:
        reader.read_into(0, memoryview(buffer))
    return bytes(buffer)


# Addresses


@pytest.mark.parametrize(
    "address", ["gs://bucket/models/llama/", "gs:/bucket/models/llama", Path("gs://bucket/models/llama")]
)
def test_ways_to_write_an_address(gcs: FakeGcs, address: str | Path) -> None:
    assert GcsSource(address).address == "gs://bucket/models/llama"


def test_a_bucket_alone_is_an_address(gcs: FakeGcs) -> None:
    source = GcsSource("gs://bucket")
    assert (source.names(), source.stat("models/llama/config.json").size) == ([], 2)


@pytest.mark.parametrize("address", ["gs://", "gs:///models", "gs://Bucket/models", "gs:bucket"])
def test_an_address_without_a_bucket_is_refused(address: str) -> None:
    with pytest.raises(CheckpointError, match=r"'gs:.*' is not an address in Cloud Storage; write gs://bucket/prefix"):
        GcsSource(address)


def test_without_gcsfs_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(CheckpointError, match="pip install gcsfs"):
        GcsSource("gs://bucket/models")


# Names and metadata


def test_names_are_the_sorted_objects_directly_under_the_prefix(source: GcsSource) -> None:
    assert source.names() == ["config.json", "empty", "model.safetensors"]


def test_a_list_of_many_pages_is_read_to_its_end(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(page_size=1))
    source = GcsSource("gs://bucket/models/llama")
    assert (source.names(), gcs.stats().num_lists) == (["config.json", "empty", "model.safetensors"], 4)


def test_stat_gives_size_generation_and_checksum(gcs: FakeGcs, source: GcsSource) -> None:
    generation = gcs.objects.generation("bucket", "models/llama/model.safetensors")
    stat = source.stat("model.safetensors")
    assert (stat.size, stat.version) == (SIZE, f"generation {generation}")
    assert stat.crc32c == google_crc32c.value(CONTENT)


def test_objects_without_a_checksum_have_none(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(checksums=False))
    assert GcsSource("gs://bucket/models/llama").stat("config.json").crc32c is None


def test_objects_of_subfolders_are_found_by_name(source: GcsSource) -> None:
    assert read_file(source, "original/params.json", 100) == b"[1]"
    assert "original/params.json" not in source.names()


@pytest.mark.parametrize("name", ["absent", "original/absent"])
def test_an_absent_object_is_named(source: GcsSource, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"gs://bucket/models/llama/{name} does not exist"):
        source.stat(name)
    assert not source.has(name)


def test_a_prefix_is_not_an_object(gcs: FakeGcs) -> None:
    with pytest.raises(CheckpointError, match="models/llama is a prefix, not an object"):
        GcsSource("gs://bucket").stat("models/llama")


def test_an_object_is_not_a_prefix(gcs: FakeGcs) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is an object; pass the prefix"):
        GcsSource("gs://bucket/models/llama/config.json")


@pytest.mark.parametrize("address", ["gs://absent/models", "gs://bucket/absent"])
def test_an_absent_bucket_or_prefix_is_named(gcs: FakeGcs, address: str) -> None:
    with pytest.raises(CheckpointError, match=f"{address} does not exist: there is no such bucket"):
        GcsSource(address)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a//b", ""])
def test_names_that_leave_the_prefix_are_refused(source: GcsSource, name: str) -> None:
    with pytest.raises(CheckpointError, match="leaves the checkpoint's folder"):
        source.stat(name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError("Forbidden: b/x\nno storage.objects.list"),
            r"no storage\.objects\.list; .*roles/storage\.objectViewer",
        ),
        (ValueError("Bad Request: invalid bucket"), "invalid bucket; check the network and the endpoint"),
        (TimeoutError(), "no answer within 60 s"),
    ],
)
def test_what_gcsfs_raises_becomes_an_error_of_ours(error: Exception, message: str) -> None:
    class Refusing:
        def ls(self, *_: object, **__: object) -> None:
            raise error

    with pytest.raises(CheckpointError, match=rf"cannot look at gs://bucket/m: .*{message}"):
        GcsSource("gs://bucket/m", fs=Refusing())


def test_a_server_that_does_not_answer_a_list_is_given_up(gcs: FakeGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs_module, "METADATA_SECONDS", 0.1)
    gcs.set(Behaviour(latency=10))
    with pytest.raises(CheckpointError, match=r"no answer within 0\.1 s"):
        GcsSource("gs://bucket/models/llama")


# Reading


def test_the_bytes_are_right(source: GcsSource) -> None:
    assert load(source) == CONTENT


def test_one_request_serves_every_read_up_to_the_end(gcs: FakeGcs, source: GcsSource) -> None:
    end, piece = 2_500_000, bytearray(100_000)
    with source.open("model.safetensors", source.stat("model.safetensors"), end=end) as reader:
        position = 500_000
        while position < end:
            count = reader.read_some(position, memoryview(piece))
            assert piece[:count] == CONTENT[position : position + count]
            position += count
    assert (gcs.stats().num_media, gcs.stats().num_bytes) == (1, 2_000_000)


@pytest.mark.parametrize(
    ("second", "num_requests"),
    [(10 + MAX_GAP_BYTES - 1, 1), (10 + MAX_GAP_BYTES, 2), (0, 2)],
    ids=["short gap", "long gap", "back"],
)
def test_short_gaps_are_read_over(gcs: FakeGcs, source: GcsSource, second: int, num_requests: int) -> None:
    buffer = bytearray(10)
    with source.open("model.safetensors", source.stat("model.safetensors")) as reader:
        reader.read_some(0, memoryview(buffer))
        reader.read_some(second, memoryview(buffer))
    assert (bytes(buffer), gcs.stats().num_media) == (CONTENT[second : second + 10], num_requests)


def test_a_read_beyond_the_promised_end_makes_a_request_of_its_own(gcs: FakeGcs, source: GcsSource) -> None:
    buffer = bytearray(10)
    with source.open("model.safetensors", source.stat("model.safetensors"), end=10) as reader:
        assert [reader.read_some(offset, memoryview(buffer)) for offset in (0, 10)] == [10, 10]
    assert (bytes(buffer), gcs.stats().num_media) == (CONTENT[10:20], 2)


@pytest.mark.parametrize("name", ["model.safetensors", "empty"])
def test_the_end_of_an_object_gives_no_bytes(source: GcsSource, name: str) -> None:
    stat = source.stat(name)
    with source.open(name, stat) as reader:
        assert reader.read_some(stat.size, memoryview(bytearray(10))) == 0


def test_readers_of_many_threads_get_the_right_bytes(gcs: FakeGcs, source: GcsSource) -> None:
    gcs.set(Behaviour(latency=0.05, rate=10_000_000))
    stat = source.stat("model.safetensors")
    cuts = [SIZE * number // 8 for number in range(9)]

    def read(start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        with PersistentReader(source, "model.safetensors", stat, end=stop) as reader:
            reader.read_into(start, memoryview(buffer))
        return bytes(buffer)

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(read, cuts[:-1], cuts[1:])) == CONTENT
    assert (gcs.stats().num_media, gcs.stats().num_bytes) == (8, SIZE)


def test_names_with_special_characters_are_read(gcs: FakeGcs, tmp_path: Path) -> None:
    folder = tmp_path / "bucket" / "a b+c%20"
    folder.mkdir()
    (folder / "x#1?y&z=ü.bin").write_bytes(b"here")
    assert read_file(GcsSource("gs://bucket/a b+c%20"), "x#1?y&z=ü.bin", 100) == b"here"


# Faults that pass


@pytest.mark.parametrize("fault", ["408", "429", "500", "503", "truncate", "stall"])
def test_faults_that_pass_are_survived(gcs: FakeGcs, source: GcsSource, fault: str) -> None:
    attempts = Attempts(QUICK)
    gcs.set(Behaviour(fault=fault, every=2))
    assert load(source, attempts) == CONTENT
    assert (attempts.num_retries, gcs.stats().num_media) == (1, 2)


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_read_goes_on_where_it_stopped(gcs: FakeGcs, source: GcsSource, fault: str) -> None:
    gcs.set(Behaviour(fault=fault, every=2))
    load(source)
    assert gcs.stats().num_bytes <= SIZE + READ_BYTES


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "Cloud Storage answered 503: injected; gave up after 4 attempts"),
        ("429", "Cloud Storage answered 429: injected; gave up after 4 attempts"),
    ],
)
def test_faults_that_stay_are_given_up(gcs: FakeGcs, source: GcsSource, fault: str, message: str) -> None:
    gcs.set(Behaviour(fault=fault))
    with pytest.raises(CheckpointError, match=message):
        load(source)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("truncate", r"the answer ended \d+ bytes early"), ("stall", "no byte came for 1 s")],
)
def test_a_body_that_stops_is_a_transient_error(gcs: FakeGcs, source: GcsSource, fault: str, message: str) -> None:
    gcs.set(Behaviour(fault=fault))
    with source.open("config.json", source.stat("config.json")) as reader:
        reader.read_some(0, memoryview(bytearray(1)))
        with pytest.raises(TransientError, match=message):
            reader.read_some(1, memoryview(bytearray(1)))


def test_a_server_that_is_gone_is_a_transient_error(gcs: FakeGcs, source: GcsSource) -> None:
    gcs.close()
    with pytest.raises(TransientError, match="ConnectionRefusedError"):
        source.open("config.json", source.stat("config.json")).read_some(0, memoryview(bytearray(2)))


def test_a_connection_that_is_cut_is_a_transient_error(gcs: FakeGcs, source: GcsSource) -> None:
    gcs.set(Behaviour(rate=1_000_000))
    with source.open("model.safetensors", source.stat("model.safetensors")) as reader:
        reader.read_some(0, memoryview(bytearray(10)))
        gcs.close()
        with pytest.raises(TransientError):
            for offset in range(10, SIZE, 10_000):
                reader.read_some(offset, memoryview(bytearray(10_000)))


# Faults that do not pass: each with one request


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (Behaviour(fault="401"), r"401: injected; it needs the role roles/storage\.objectViewer"),
        (Behaviour(fault="403"), r"403: injected; it needs the role .*GOOGLE_APPLICATION_CREDENTIALS"),
        (Behaviour(fault="404"), "model.safetensors was replaced or changed"),
        (Behaviour(fault="412"), "model.safetensors was replaced or changed"),
        (Behaviour(fault="416"), r"cannot read bytes \[0, 3000001\) .* answered 416: injected"),
        (Behaviour(encoding="gzip"), "is stored with Content-Encoding: gzip; .*upload it without"),
    ],
)
def test_faults_that_stay_are_not_tried_again(
    gcs: FakeGcs, source: GcsSource, behaviour: Behaviour, message: str
) -> None:
    gcs.set(behaviour)
    with pytest.raises(CheckpointError, match=message):
        load(source)
    assert gcs.stats().num_media == 1


def test_an_object_that_is_replaced_before_a_read_is_an_error(gcs: FakeGcs, source: GcsSource) -> None:
    gcs.replace("bucket/models/llama/model.safetensors")
    with pytest.raises(CheckpointError, match=r"llama/model\.safetensors was replaced or changed"):
        load(source)


def test_an_object_that_is_replaced_between_two_requests_is_an_error(
    gcs: FakeGcs, source: GcsSource, tmp_path: Path
) -> None:
    with source.open("model.safetensors", source.stat("model.safetensors"), end=10) as reader:
        reader.read_some(0, memoryview(bytearray(10)))
        path = tmp_path / "bucket" / "models" / "llama" / "model.safetensors"
        path.with_suffix(".new").write_bytes(CONTENT[::-1])
        os.replace(path.with_suffix(".new"), path)
        with pytest.raises(CheckpointError, match="was replaced or changed"):
            reader.read_some(10, memoryview(bytearray(10)))


def test_an_object_that_is_replaced_is_another_version_to_a_new_source(gcs: FakeGcs, source: GcsSource) -> None:
    gcs.replace("bucket/models/llama/model.safetensors")
    assert GcsSource(source.address).stat("model.safetensors") != source.stat("model.safetensors")


def test_a_flipped_bit_is_what_only_a_checksum_finds(gcs: FakeGcs, source: GcsSource) -> None:
    gcs.set(Behaviour(fault="flip", every=2))
    content = load(source)
    assert content != CONTENT
    assert google_crc32c.value(content) != source.stat("model.safetensors").crc32c


# Credentials


def with_credentials(gcs: FakeGcs, credentials: Credentials) -> GcsSource:
    fs = GCSFileSystem(token=credentials, endpoint_url=gcs.endpoint, skip_instance_cache=True)
    return GcsSource("gs://bucket/models/llama", fs=fs)


def test_the_access_token_is_sent_with_every_request(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(token="let-me-in"))
    assert load(with_credentials(gcs, Credentials("let-me-in"))) == CONTENT


def test_a_private_bucket_without_credentials_names_the_role(gcs: FakeGcs) -> None:
    gcs.set(Behaviour(token="let-me-in"))
    with pytest.raises(CheckpointError, match=r"Anonymous caller.*roles/storage\.objectViewer on the bucket"):
        GcsSource("gs://bucket/models/llama")


def test_credentials_that_cannot_be_renewed_are_an_error(gcs: FakeGcs) -> None:
    with pytest.raises(CheckpointError, match=r"[cC]redentials.*GOOGLE_APPLICATION_CREDENTIALS"):
        with_credentials(gcs, Credentials("old", expiry=datetime(2020, 1, 1)))


def test_credentials_that_end_while_loading_are_an_error(gcs: FakeGcs) -> None:
    credentials = Credentials("token")
    source = with_credentials(gcs, credentials)
    credentials.expiry = datetime(2020, 1, 1)
    with pytest.raises(CheckpointError, match=r"the access token cannot be renewed: .*gave up after 4 attempts"):
        load(source)
