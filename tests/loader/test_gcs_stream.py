"""One request for an object's bytes: TLS, and answers that Cloud Storage would not give."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from torchinfer.errors import CheckpointError
from torchinfer.loader.gcs_stream import GcsStream, PinnedObject
from torchinfer.loader.source import TransientError

GOOD = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nContent-Length: 10\r\n\r\n0123456789"


@contextlib.contextmanager
def answering(answer: bytes, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The address of a server that gives this answer, whatever it is asked, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ssl.SSLError):  # the client does not trust us
                stream = tls.wrap_socket(connection, server_side=True) if tls else connection
                stream.recv(65536)
                stream.sendall(answer)
                stream.close()

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.getsockname()[1]}/x?alt=media"
        thread.join()


def ask(url: str, tls: ssl.SSLContext | None = None) -> bytes:
    """All ten bytes of an object."""
    content = bytearray(10)
    pinned = PinnedObject("gs://b/x", url, "1", 10)
    stream = GcsStream(pinned, {}, 0, 10, tls=tls or ssl.create_default_context(), stall_timeout=10)
    try:
        while stream.position < 10:
            stream.read_some(memoryview(content)[stream.position :])
    finally:
        stream.close()
    return bytes(content)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Signed by itself, for 127.0.0.1, with its key in the same file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(private + signed.public_bytes(pem))
    return tmp_path / "server.pem"


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_https_with_a_trusted_certificate(certificate: Path, server_tls: ssl.SSLContext) -> None:
    with answering(GOOD, server_tls) as url:
        assert ask(url, ssl.create_default_context(cafile=str(certificate))) == b"0123456789"


def test_a_certificate_that_is_not_trusted_is_refused(server_tls: ssl.SSLContext) -> None:
    with answering(GOOD, server_tls) as url, pytest.raises(CheckpointError, match=r"is not trusted: self.signed"):
        ask(url)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 11\r\n\r\n<h1>502</h1>", "answered 502: <h1>502</h1"),
        (b'HTTP/1.1 503 Slow\r\nContent-Length: 12\r\n\r\n{"error": 1}', 'answered 503: {"error": 1}'),
        (b"nonsense\r\n", "BadStatusLine: nonsense"),
        (b"", "RemoteDisconnected"),
    ],
)
def test_answers_that_are_none_are_transient_errors(answer: bytes, message: str) -> None:
    with answering(answer) as url, pytest.raises(TransientError, match=message):
        ask(url)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/10\r\nx-goog-generation: 2\r\n\r\n",
            "gs://b/x was replaced or changed",
        ),
        (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/11\r\n\r\n", r"which has 10, .*Content-Range 'bytes 0-9/11'"),
        (b"HTTP/1.1 206 OK\r\nContent-Range: bytes 1-9/10\r\n\r\n", r"bytes \[0, 10\) .*'bytes 1-9/10'"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "status 200 and Content-Range None"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "answered 302"),
    ],
)
def test_an_answer_to_another_question_is_refused(answer: bytes, message: str) -> None:
    with answering(answer) as url, pytest.raises(CheckpointError, match=message):
        ask(url)
