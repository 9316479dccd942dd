import shutil
import subprocess

import pytest

from torchinfer.errors import ConfigError, EngineError
from torchinfer.request import SamplingParams
from torchinfer.serving.client import Client

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")


def openssl(*arguments, cwd):
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A folder with ca.pem and with server and client certificates that it signed, and another.pem that it did not."""
    folder = tmp_path_factory.mktemp("pki")
    (folder / "names.txt").write_text("subjectAltName=DNS:localhost\n")
    for name in ("ca", "another"):
        new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}")
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.pem", cwd=folder)
    for name in ("server", "client"):
        new = ("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}")
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=folder)
        signed = ("x509", "-req", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1")
        openssl(*signed, "-extfile", "names.txt", "-in", f"{name}.csr", "-out", f"{name}.pem", cwd=folder)
    return folder


def answer(client):
    return client.generate_once([97, 98], SamplingParams(max_tokens=2), timeout=10).outputs[0].text


def server_files(pki):
    return {"tls_cert": pki / "server.pem", "tls_key": pki / "server.key"}


def client_files(pki):
    return {"tls_ca": pki / "ca.pem", "tls_cert": pki / "client.pem", "tls_key": pki / "client.key"}


def test_a_tls_server_answers_a_client_that_trusts_it(serve, fake_engine, pki):
    server = serve(fake_engine(), **server_files(pki))
    with Client(server.target, tls_ca=pki / "ca.pem") as client:
        assert answer(client) == "ab"


def test_a_client_that_does_not_trust_the_server_gets_no_answer(serve, fake_engine, pki):
    server = serve(fake_engine(), **server_files(pki))
    with Client(server.target, tls_ca=pki / "another.pem") as client, pytest.raises(EngineError, match="connect"):
        answer(client)


def test_a_tls_server_does_not_answer_plain_text(serve, fake_engine, pki):
    server = serve(fake_engine(), **server_files(pki))
    with Client(server.target) as client, pytest.raises(EngineError):
        answer(client)


def test_mutual_tls_answers_a_client_with_a_certificate(serve, fake_engine, pki):
    server = serve(fake_engine(), **server_files(pki), tls_client_ca=pki / "ca.pem")
    with Client(server.target, **client_files(pki)) as client:
        assert answer(client) == "ab"


def test_mutual_tls_refuses_a_client_without_a_certificate(serve, fake_engine, pki):
    server = serve(fake_engine(), **server_files(pki), tls_client_ca=pki / "ca.pem")
    with Client(server.target, tls_ca=pki / "ca.pem") as client, pytest.raises(EngineError):
        answer(client)


def test_a_key_of_another_certificate_is_a_config_error(serve, fake_engine, pki):
    with pytest.raises(ConfigError, match=r"server\.pem and --tls-key .*client\.key are not a PEM certificate and its"):
        serve(fake_engine(), tls_cert=pki / "server.pem", tls_key=pki / "client.key")


def test_an_encrypted_key_is_a_config_error(serve, fake_engine, pki):
    arguments = ("rsa", "-aes256", "-passout", "pass:x", "-in", "server.key", "-out", "locked.key")
    openssl(*arguments, cwd=pki)
    with pytest.raises(ConfigError, match="the key is encrypted"):
        serve(fake_engine(), tls_cert=pki / "server.pem", tls_key=pki / "locked.key")


def test_all_files_that_cannot_be_used_are_named(pki, tmp_path):
    with pytest.raises(ConfigError) as caught:
        Client("localhost:1", tls_ca=tmp_path / "no-ca", tls_cert=tmp_path / "no-cert", tls_key=pki / "client.key")
    assert "no-ca" in str(caught.value) and "no-cert" in str(caught.value)


def test_a_client_certificate_needs_its_key(pki):
    with pytest.raises(ConfigError, match="go together"):
        Client("localhost:1", tls_cert=pki / "client.pem")
