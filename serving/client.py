"""A small synchronous client of the gRPC server.

with Client("localhost:9000") as client:
    for event in client.generate("The capital of France is", SamplingParams(max_tokens=20)):
        print(event.text, end="")
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from torchinfer.errors import EngineError, RequestError
from torchinfer.request import SamplingParams, TokenEvent
from torchinfer.serving import convert, inference_pb2_grpc
from torchinfer.serving import inference_pb2 as pb
from torchinfer.serving.convert import Prompt
from torchinfer.serving.status import from_rpc_error
from torchinfer.serving.tls import PemFile, channel_credentials

POLL_SECONDS = 0.1

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # log-probabilities of a long prompt exceed the default
    ("grpc.keepalive_time_ms", 60_000),  # notices a server that went away without a word
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class Client:
    """One connection; its methods may be called from several threads.

    Methods raise what the engine would raise in this process: RequestError for a request that cannot be honoured,
    OverloadedError for a full queue, EngineError for a server that is not there, is shutting down or has failed, and
    for a timeout. `timeout` is in seconds for the whole call; None waits for ever.
    """

    def __init__(
        self,
        target: str,  # host:port, or any name that gRPC resolves, such as dns:///service:9000
        *,
        tls: bool = False,
        tls_ca: PemFile = None,  # PEM; None: the roots that gRPC ships
        tls_cert: PemFile = None,  # PEM, for a server that asks for client certificates
        tls_key: PemFile = None,
        tls_server_name: str | None = None,  # the name in the server's certificate, if it is not the target's
    ) -> None:
        """Connects when first used. Raises ConfigError for TLS files that cannot be used."""
        options: list[tuple[str, int | str]] = list(CHANNEL_OPTIONS)
        if tls_server_name is not None:
            options.append(("grpc.ssl_target_name_override", tls_server_name))
        if tls or tls_ca is not None or tls_cert is not None or tls_key is not None:
            credentials = channel_credentials(tls_ca, tls_cert, tls_key)
            self._channel = grpc.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(target, options)
        self._target = target
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: Prompt,  # text, token ids, or a chat: [{"role": "user", "content": "..."}, ...]
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> Iterator[TokenEvent]:
        """The events as they arrive; the last one carries `usage`. Closing the iterator aborts the request."""
        request_id = uuid.uuid4().hex if request_id is None else request_id
        with _raising_ours():
            message = convert.to_message(prompt, params, request_id, priority, add_special_tokens)
            call = self._stub.Generate(message, timeout=timeout)
            try:
                for response in call:
                    yield from convert.from_response(response, request_id)
            finally:
                call.cancel()

    def generate_once(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> pb.GenerateOnceResponse:
        """Everything in one message, when all is done."""
        with _raising_ours():
            message = convert.to_message(prompt, params, request_id, priority, add_special_tokens)
            response: pb.GenerateOnceResponse = self._stub.GenerateOnce(message, timeout=timeout)
        return response

    def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool | None = None, timeout: float | None = None
    ) -> list[int]:
        """The token ids that `generate` would use for a text or a chat."""
        message = pb.TokenizeRequest()
        if add_special_tokens is not None:
            message.add_special_tokens = add_special_tokens
        if isinstance(prompt, str):
            message.text = prompt
        else:
            message.chat.CopyFrom(convert.to_chat(prompt))
        with _raising_ours():
            return list(self._stub.Tokenize(message, timeout=timeout).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = None) -> str:
        """The text of token ids."""
        with _raising_ours():
            text: str = self._stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids), timeout=timeout).text
        return text

    def get_model(self, *, timeout: float | None = None) -> pb.GetModelResponse:
        """What is served, and its limits."""
        with _raising_ours():
            response: pb.GetModelResponse = self._stub.GetModel(pb.GetModelRequest(), timeout=timeout)
        return response

    def wait_until_serving(self, timeout: float) -> None:
        """Return when the server is there and its model is loaded. Raises EngineError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (state := self._state()) != "SERVING":
            if time.monotonic() >= end:
                raise EngineError(f"{self._target} is not serving after {timeout:g} s, its state is {state}")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _state(self) -> str:
        """The health service's word, or why it has none."""
        try:
            response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
        except grpc.RpcError as error:
            return f"{error.code().name} ({error.details()})"
        name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        return name


@contextmanager
def _raising_ours() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    except (ValueError, TypeError) as error:  # protobuf refuses, such as an integer of more than 32 bits
        raise RequestError(f"the request cannot be sent: {error}") from error
