"""One table: our exceptions -> gRPC status codes, and back for the client."""

from __future__ import annotations

import logging
import math
import uuid
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus

from torchinfer.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineError,
    OverloadedError,
    RequestError,
    TorchinferError,
)

logger = logging.getLogger(__name__)

RETRY_AFTER = "retry-after-ms"
MAX_MESSAGE_CHARACTERS = 2000  # a status travels in HTTP/2 headers, whose size is limited

# The first that fits counts.
CODES: tuple[tuple[type[TorchinferError], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineError, grpc.StatusCode.UNAVAILABLE),
    (CheckpointError, grpc.StatusCode.FAILED_PRECONDITION),
    (DeviceError, grpc.StatusCode.FAILED_PRECONDITION),
)


@dataclass(frozen=True, slots=True)
class Status:
    """What a call ends with."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str | bytes], ...] = ()


def to_status(error: Exception) -> Status:
    """The status of a call that raised `error`. What is not ours is logged under an id; the client sees the id only."""
    for kind, code in CODES:
        if isinstance(error, kind):
            return Status(code, _shortened(str(error)), _retry_metadata(error))
    error_id = uuid.uuid4().hex[:12]
    logger.error("internal error %s", error_id, exc_info=error)
    return Status(grpc.StatusCode.INTERNAL, f"internal error {error_id}; the server's log has the details")


def from_rpc_error(error: grpc.RpcError) -> TorchinferError:
    """The exception that a caller in the server's own process would have seen, or the nearest."""
    code, message = error.code(), error.details() or error.code().name
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        delays = [value for key, value in error.trailing_metadata() or () if key == RETRY_AFTER]
        if delays:
            return OverloadedError(message, float(delays[0]) / 1000)
        return RequestError(message)  # a message over the size limit
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return RequestError(message)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return CheckpointError(message)
    if code is grpc.StatusCode.UNAVAILABLE:
        return EngineError(message)
    return EngineError(f"{code.name}: {message}")


def _shortened(message: str) -> str:
    if len(message) <= MAX_MESSAGE_CHARACTERS:
        return message
    return f"{message[:MAX_MESSAGE_CHARACTERS]}... ({len(message)} characters in all)"


def _retry_metadata(error: Exception) -> tuple[tuple[str, str | bytes], ...]:
    """The hint when to try again: milliseconds as text for people and proxies, google.rpc.RetryInfo for libraries."""
    if not isinstance(error, OverloadedError):
        return ()
    milliseconds = max(1, math.ceil(error.retry_after_seconds * 1000))
    delay = Duration()
    delay.FromMilliseconds(milliseconds)
    details = RpcStatus(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message=str(error))
    details.details.add().Pack(RetryInfo(retry_delay=delay))
    return ((RETRY_AFTER, str(milliseconds)), ("grpc-status-details-bin", details.SerializeToString()))
