"""TLS credentials from PEM files, checked before gRPC sees them: its own errors name neither file nor cause."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from torchinfer.errors import ConfigError, raise_all
from torchinfer.serving.options import ServerOptions

PemFile = str | Path | None


def server_credentials(options: ServerOptions) -> grpc.ServerCredentials | None:
    """Credentials of a server, None without TLS. Raises ConfigError with every file that cannot be used."""
    if options.tls_cert is None or options.tls_key is None:
        return None
    _check(options.tls_cert, options.tls_key, options.tls_client_ca, "--tls-client-ca")
    return grpc.ssl_server_credentials(
        [(Path(options.tls_key).read_bytes(), Path(options.tls_cert).read_bytes())],
        root_certificates=_read(options.tls_client_ca),
        require_client_auth=options.tls_client_ca is not None,
    )


def channel_credentials(ca: PemFile, cert: PemFile, key: PemFile) -> grpc.ChannelCredentials:
    """Credentials of a client; without `ca` the roots that gRPC ships. Raises ConfigError."""
    if (cert is None) != (key is None):
        raise ConfigError("--tls-cert and --tls-key go together: a client certificate needs its key")
    _check(cert, key, ca, "--tls-ca")
    return grpc.ssl_channel_credentials(_read(ca), _read(key), _read(cert))


def _check(cert: PemFile, key: PemFile, ca: PemFile, ca_option: str) -> None:
    problems = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if cert is not None:
        try:
            context.load_cert_chain(cert, key, password=_no_password)
        except (OSError, ValueError) as error:
            problems.append(f"--tls-cert {cert} and --tls-key {key} are not a PEM certificate and its key ({error})")
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ValueError) as error:
            problems.append(f"{ca_option} {ca} is not a PEM file of certificates ({error})")
    raise_all(problems, ConfigError, "cannot use the TLS files")


def _no_password() -> str:
    """Without this OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted; give one without a password")


def _read(path: PemFile) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
