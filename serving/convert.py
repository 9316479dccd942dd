"""Messages of inference.proto <-> Request, SamplingParams and TokenEvent: pure functions, no gRPC.

The server's direction first, the client's below. A client's values are checked here, all at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from torchinfer.errors import RequestError, raise_all
from torchinfer.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs, Usage
from torchinfer.serving import inference_pb2 as pb

if TYPE_CHECKING:
    from torchinfer.engine_info import ModelInfo
    from torchinfer.tokenizer import Tokenizer

MAX_REQUEST_ID_CHARACTERS = 128

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]  # text, token ids or chat

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_FROM_REASONS = {number: reason for reason, number in _REASONS.items()}


def to_request(message: pb.GenerateRequest, tokenizer: Tokenizer | None, vocab_size: int) -> Request:
    """The engine's request for a client's.

    Raises:
        RequestError: with everything in the message that cannot be honoured.
    """
    problems = _unknown_fields(message)
    params = SamplingParams()
    prompt_ids: tuple[int, ...] = ()
    with _collecting(problems):
        params = to_sampling_params(message.params)
    with _collecting(problems):
        prompt_ids = _prompt_ids(message, tokenizer, vocab_size)
    problems += _request_id_problems(message)
    raise_all(problems, RequestError, "invalid request")
    request_id = message.request_id if message.HasField("request_id") else uuid.uuid4().hex
    return Request(request_id, prompt_ids, params, message.priority)


def to_sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """Fields that are not set keep their defaults. Raises RequestError."""
    return SamplingParams(**{field.name: _plain(value) for field, value in message.ListFields()})


def to_token_ids(message: pb.TokenizeRequest, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids of a text or chat. Raises RequestError."""
    problems = _unknown_fields(message)
    ids: tuple[int, ...] = ()
    with _collecting(problems):
        ids = _encoded_ids(message, tokenizer)
    raise_all(problems, RequestError, "invalid request")
    return ids


def to_text(message: pb.DetokenizeRequest, tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """The text of token ids. Raises RequestError."""
    problems = _unknown_fields(message) + _vocabulary_problems(message.token_ids, vocab_size)
    if tokenizer is None:
        problems.append("the model has no tokenizer, so it has no text")
    raise_all(problems, RequestError, "invalid request")
    assert tokenizer is not None
    return tokenizer.decode(list(message.token_ids))


class Responses:
    """The messages of one stream; remembers how each sample ended until the final event."""

    def __init__(self) -> None:
        self._outcomes: dict[int, pb.Outcome] = {}

    def messages(self, events: Iterable[TokenEvent]) -> list[pb.GenerateResponse]:
        """As few messages as possible: one chunk a sample that has news, and the finish after the final event."""
        chunks: dict[int, pb.Chunk] = {}
        finish: list[pb.GenerateResponse] = []
        for event in events:
            if event.token_ids or event.text or event.prompt_logprobs:
                _append(chunks.setdefault(event.index, pb.Chunk(index=event.index)), event)
            if event.finish_reason is not None:
                self._outcomes[event.index] = _outcome(event)
            if event.usage is not None:
                finish.append(pb.GenerateResponse(finish=self._finish(event.request_id, event.usage)))
        return [pb.GenerateResponse(chunk=chunk) for chunk in chunks.values()] + finish

    @property
    def failure(self) -> str | None:
        """Why a sample ended before its time, or None."""
        for outcome in self._outcomes.values():
            if outcome.reason == pb.FINISH_REASON_ERROR:
                return outcome.error or "the engine failed"
            if outcome.reason == pb.FINISH_REASON_ABORT:
                return "the request was ended by the server"
        return None

    def _finish(self, request_id: str, usage: Usage) -> pb.Finish:
        outcomes = [self._outcomes[index] for index in sorted(self._outcomes)]
        return pb.Finish(request_id=request_id, outcomes=outcomes, usage=_usage(usage))


def to_once(messages: Iterable[pb.GenerateResponse]) -> pb.GenerateOnceResponse:
    """The one message that says the same as a whole stream."""
    once = pb.GenerateOnceResponse()
    chunks: dict[int, pb.Chunk] = {}
    finish = pb.Finish()
    for message in messages:
        if message.HasField("finish"):
            finish = message.finish
        else:
            _merge(chunks.setdefault(message.chunk.index, pb.Chunk()), message.chunk)
    for outcome in finish.outcomes:
        chunk = chunks.get(outcome.index, pb.Chunk())
        once.outputs.add(token_ids=chunk.token_ids, text=chunk.text, logprobs=chunk.logprobs, outcome=outcome)
        once.prompt_logprobs.extend(chunk.prompt_logprobs)
    once.request_id = finish.request_id
    once.usage.CopyFrom(finish.usage)
    return once


def from_model_info(info: ModelInfo, server_version: str) -> pb.GetModelResponse:
    """What `GetModel` answers."""
    return pb.GetModelResponse(
        name=info.name,
        architecture=info.architecture,
        num_parameters=info.num_parameters,
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        dtype=info.dtype,
        device=info.device,
        num_pages=info.num_pages,
        page_size=info.page_size,
        max_num_requests=info.max_num_requests,
        eos_token_ids=info.eos_token_ids,
        has_tokenizer=info.has_tokenizer,
        server_version=server_version,
        kv_cache_dtype=info.kv_cache_dtype,
    )


def to_message(
    prompt: Prompt,
    params: SamplingParams | None,
    request_id: str | None,
    priority: int,
    add_special_tokens: bool | None,
) -> pb.GenerateRequest:
    """The client's message. Raises RequestError for a prompt that is none of the three kinds."""
    message = pb.GenerateRequest(request_id=request_id)
    if add_special_tokens is not None:
        message.add_special_tokens = add_special_tokens
    if priority:
        message.priority = priority
    if params is not None:
        message.params.CopyFrom(from_sampling_params(params))
    if isinstance(prompt, str):
        message.text = prompt
    elif all(isinstance(item, int) for item in prompt):
        message.token_ids.CopyFrom(pb.TokenIds(ids=cast("Sequence[int]", prompt)))
    else:
        message.chat.CopyFrom(to_chat(prompt))
    return message


def to_chat(prompt: Sequence[int] | Sequence[Mapping[str, str]]) -> pb.Chat:
    """The chat message of [{"role": ..., "content": ...}, ...]. Raises RequestError."""
    turns = []
    for item in prompt:
        if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
            raise RequestError(
                f"a prompt holds {type(item).__name__}; give text, token ids or [{{'role': ..., 'content': ...}}, ...]"
            )
        turns.append(pb.ChatMessage(role=item["role"], content=item["content"]))
    return pb.Chat(messages=turns)


def from_sampling_params(params: SamplingParams) -> pb.SamplingParams:
    """All fields that differ from the defaults."""
    defaults = SamplingParams()
    message = pb.SamplingParams()
    for name in (field.name for field in fields(SamplingParams)):
        value = getattr(params, name)
        if value == getattr(defaults, name):
            continue
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def from_response(message: pb.GenerateResponse, request_id: str) -> Iterator[TokenEvent]:
    """The events of one message; the last one of a finish carries the usage."""
    if message.HasField("chunk"):
        yield _from_chunk(message.chunk, request_id)
        return
    finish = message.finish
    for place, outcome in enumerate(finish.outcomes, start=1):
        yield TokenEvent(
            request_id=finish.request_id,
            index=outcome.index,
            token_ids=[],
            text="",
            finish_reason=_FROM_REASONS[outcome.reason],
            stop_match=_stop_match(outcome),
            error=outcome.error or None,
            usage=_from_usage(finish.usage) if place == len(finish.outcomes) else None,
        )


def _unknown_fields(message: Message) -> list[str]:
    """Problems of this message and those within it: fields that this server's proto does not have."""
    name, unknown = message.DESCRIPTOR.name, UnknownFieldSet(message)
    found = [
        f"{name} has a field {unknown[i].field_number} that this server does not know; is the client newer?"
        for i in range(len(unknown))
    ]
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for inner in [value] if isinstance(value, Message) else value:
            found += _unknown_fields(inner)
    return found


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Turn a RequestError into lines of `problems`."""
    try:
        yield
    except RequestError as error:
        first, *rest = str(error).split("\n  - ")
        problems += rest or [first]


def _plain(value: Any) -> Any:
    """A protobuf container as the tuple or dict that SamplingParams holds."""
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _prompt_ids(message: pb.GenerateRequest, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    if message.WhichOneof("prompt") != "token_ids":
        ids = _encoded_ids(message, tokenizer)
    else:
        ids = tuple(message.token_ids.ids)
        problems = _vocabulary_problems(ids, vocab_size) + _special_token_problems(message)
        raise_all(problems, RequestError, "invalid prompt")
    if not ids:
        raise RequestError("the prompt has no tokens; at least 1 is needed")
    return ids


def _encoded_ids(message: pb.GenerateRequest | pb.TokenizeRequest, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise RequestError(f"prompt is missing; set one of {_prompt_kinds(message)}")
    if tokenizer is None:
        raise RequestError(f"prompt is {kind}, but the model has no tokenizer; send token_ids")
    if kind == "text":
        special = message.add_special_tokens if message.HasField("add_special_tokens") else True
        return tuple(tokenizer.encode(message.text, add_special_tokens=special))
    raise_all(_special_token_problems(message) + _chat_problems(message.chat), RequestError, "invalid prompt")
    turns = [{"role": turn.role, "content": turn.content} for turn in message.chat.messages]
    return tuple(tokenizer.apply_chat_template(turns))


def _prompt_kinds(message: Message) -> str:
    return ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["prompt"].fields)


def _special_token_problems(message: pb.GenerateRequest | pb.TokenizeRequest) -> list[str]:
    if not message.HasField("add_special_tokens"):
        return []
    return [
        f"add_special_tokens goes with a text prompt only, this one is {message.WhichOneof('prompt')}; leave it out"
    ]


def _chat_problems(chat: pb.Chat) -> list[str]:
    if not chat.messages:
        return ["chat has no messages; at least 1 is needed"]
    return [f"chat.messages[{i}] has no role" for i, turn in enumerate(chat.messages) if not turn.role]


def _vocabulary_problems(ids: Sequence[int], vocab_size: int) -> list[str]:
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return []
    wrong = [(i, token_id) for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size]
    place, token_id = wrong[0]
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"token_ids[{place}]={token_id} is not in the vocabulary{others}; ids must be in [0, {vocab_size})"]


def _request_id_problems(message: pb.GenerateRequest) -> list[str]:
    name = message.request_id
    if not message.HasField("request_id"):
        return []
    if 0 < len(name) <= MAX_REQUEST_ID_CHARACTERS and name.isascii() and name.isprintable():
        return []
    rule = f"must be 1 to {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters"
    return [f"request_id={name[:40]!r} of {len(name)} characters {rule}; leave it out to get one"]


def _append(chunk: pb.Chunk, event: TokenEvent) -> None:
    chunk.token_ids.extend(event.token_ids)
    chunk.text += event.text
    if event.logprobs:
        chunk.logprobs.extend(_logprobs(entry) for entry in event.logprobs)
    if event.prompt_logprobs:
        chunk.prompt_logprobs.extend(_logprobs(entry) for entry in event.prompt_logprobs if entry is not None)


def _merge(chunk: pb.Chunk, other: pb.Chunk) -> None:
    """Like Chunk.MergeFrom, but the text is joined, not replaced."""
    text = chunk.text + other.text
    chunk.MergeFrom(other)
    chunk.text = text


def _logprobs(entry: TokenLogprobs) -> pb.TokenLogprobs:
    top = [pb.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top]
    return pb.TokenLogprobs(token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, top=top)


def _outcome(event: TokenEvent) -> pb.Outcome:
    assert event.finish_reason is not None
    outcome = pb.Outcome(index=event.index, reason=_REASONS[event.finish_reason], error=event.error or "")
    if isinstance(event.stop_match, str):
        outcome.stop_string = event.stop_match
    elif event.stop_match is not None:
        outcome.stop_token_id = event.stop_match
    return outcome


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_output_tokens=usage.num_output_tokens,
    )


def _from_usage(usage: pb.Usage) -> Usage:
    return Usage(usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens)


def _from_chunk(chunk: pb.Chunk, request_id: str) -> TokenEvent:
    logprobs = [_from_logprobs(entry) for entry in chunk.logprobs]
    prompt_logprobs = [_from_logprobs(entry) for entry in chunk.prompt_logprobs]
    return TokenEvent(
        request_id=request_id,
        index=chunk.index,
        token_ids=list(chunk.token_ids),
        text=chunk.text,
        logprobs=logprobs or None,
        prompt_logprobs=[None, *prompt_logprobs] if prompt_logprobs else None,
    )


def _from_logprobs(entry: pb.TokenLogprobs) -> TokenLogprobs:
    top = [(item.token_id, item.logprob) for item in entry.top]
    return TokenLogprobs(entry.token_id, entry.logprob, entry.rank, top)


def _stop_match(outcome: pb.Outcome) -> str | int | None:
    kind = outcome.WhichOneof("stop_match")
    return None if kind is None else getattr(outcome, kind)
