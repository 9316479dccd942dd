"""ServerOptions: every option of the gRPC server, checked once. Imports no gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchinfer.errors import ConfigError, raise_all


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of one server.

    Raises:
        ConfigError: with all options that are out of range, their values and rules.
    """

    host: str = "0.0.0.0"
    port: int = 9000  # 0: any that is free
    max_queue: int = 1024  # requests waiting; more are refused with RESOURCE_EXHAUSTED
    drain_seconds: float = 30.0  # after SIGTERM, for open requests to end by themselves
    stream_interval_ms: float = 20.0  # tokens within it share a message, the first goes at once; up to 100 with many
    # open streams, whose messages would otherwise slow the engine down; 0: each step's tokens by themselves
    max_message_bytes: int = 4 * 2**20  # of a request
    max_connection_age_seconds: float | None = None  # then clients reconnect (and balance anew); None: never
    tls_cert: str | Path | None = None  # PEM, the server's certificate chain; None: no TLS
    tls_key: str | Path | None = None  # PEM
    tls_client_ca: str | Path | None = None  # PEM; clients must show a certificate signed by it

    def __post_init__(self) -> None:
        raise_all(_problems(self), ConfigError, "invalid server options")

    @property
    def max_concurrent_rpcs(self) -> int:
        """Wide enough that the engine's queue fills first: health checks must pass on a busy server."""
        return 2 * self.max_queue + 1024


def _problems(o: ServerOptions) -> list[str]:
    found = []
    if not 0 <= o.port <= 65535:
        found.append(f"port={o.port} must be between 0 (any that is free) and 65535")
    for name in ("max_queue", "max_message_bytes"):
        if getattr(o, name) < 1:
            found.append(f"{name}={getattr(o, name)} must be at least 1")
    for name in ("drain_seconds", "stream_interval_ms"):
        if not 0 <= getattr(o, name) <= 1e6:
            found.append(f"{name}={getattr(o, name)} must be between 0 and 1000000")
    if o.max_connection_age_seconds is not None and not 1 <= o.max_connection_age_seconds <= 1e6:
        found.append(f"max_connection_age_seconds={o.max_connection_age_seconds} must be between 1 and 1000000")
    return found + _tls_problems(o)


def _tls_problems(o: ServerOptions) -> list[str]:
    found = []
    if (o.tls_cert is None) != (o.tls_key is None):
        given, missing = ("tls_cert", "tls_key") if o.tls_key is None else ("tls_key", "tls_cert")
        found.append(f"{given} is given without {missing}; TLS needs both")
    if o.tls_client_ca is not None and o.tls_cert is None and o.tls_key is None:
        found.append("tls_client_ca is given without tls_cert and tls_key; client certificates need TLS")
    return found
