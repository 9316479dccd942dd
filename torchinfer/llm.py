"""LLM: offline generation in the caller's thread."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from torchinfer.config import EngineConfig
from torchinfer.engine import Engine
from torchinfer.engine_info import EngineStats, ModelInfo, validate
from torchinfer.errors import EngineError, RequestError
from torchinfer.request import FinishReason, Request, SamplingParams, TokenEvent, TokenLogprobs, Usage
from torchinfer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Message = Mapping[str, str]


@dataclass(slots=True)
class Output:
    """A finished sample."""

    prompt: Prompt
    index: int = 0  # which of the n samples
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_match: str | int | None = None  # the stop string, or the stop or EOS id, that ended it
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of sample 0
    error: str | None = None  # with FinishReason.ERROR: why it ended
    usage: Usage | None = None  # of the whole request, on its sample that finished last


class LLM:
    """A model in this process. Close it, or use it in a `with` block; several can live side by side.

        with LLM("path/to/checkpoint", device="cpu") as llm:
            for output in llm.generate(["def main("], SamplingParams(max_tokens=64)):
                print(output.text)

    Options are those of `EngineConfig`. Calls from several threads take turns.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        from torchinfer.launch import start_engine

        self._engine: Engine | None = start_engine(EngineConfig(model=model, **options))
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._events: dict[str, deque[TokenEvent]] = {}

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._require().tokenizer

    @property
    def model_info(self) -> ModelInfo:
        return self._require().info

    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._require().stats()

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Complete prompts, each a string or a list of token ids; n outputs for each, in order.

        `params` is for all prompts, or one for each.

        Raises:
            RequestError: when any of them cannot be honoured; nothing is computed then.
        """
        given = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(given)
        if len(each) != len(given):
            raise RequestError(f"{len(each)} sampling parameters for {len(given)} prompts; give one, or one for each")
        requests = [self._request(prompt, p) for prompt, p in zip(given, each, strict=True)]
        with self._lock:
            for request in requests:
                validate(request, self.model_info)
            try:
                streams = [self._open(request) for request in requests]
                return [
                    output
                    for prompt, request, stream in zip(given, requests, streams, strict=True)
                    for output in _gather(prompt, request.params.n, stream)
                ]
            finally:
                for request in requests:
                    self._discard(request.request_id)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> list[Output]:
        """Answer a conversation, a list of {"role": ..., "content": ...}, with the checkpoint's chat template."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("chat needs a tokenizer with a chat template, and this checkpoint has no tokenizer")
        return self.generate([tokenizer.apply_chat_template(list(messages))], params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Complete one prompt and yield its events as they come. Leaving the iterator aborts the request."""
        return self._open(self._request(prompt, params or SamplingParams()))

    def close(self) -> None:
        """Free the model and the cache. Streams that are open end with an error."""
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                self._sort(engine.fail("the LLM was closed"))
                engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _require(self) -> Engine:
        if self._engine is None:
            raise EngineError("the LLM is closed; make a new one")
        return self._engine

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("the checkpoint has no tokenizer; give the prompt as a list of token ids")
            prompt = self.tokenizer.encode(prompt)
        return Request(f"llm-{next(self._ids)}", tuple(prompt), params)

    def _open(self, request: Request) -> Iterator[TokenEvent]:
        with self._lock:
            self._require().add(request)
            self._events[request.request_id] = deque()
        return self._read(request.request_id)

    def _read(self, request_id: str) -> Iterator[TokenEvent]:
        ready = self._events[request_id]
        try:
            while True:
                with self._lock:
                    if not ready:
                        self._sort(self._require().step())
                while ready:
                    event = ready.popleft()
                    yield event
                    if event.usage is not None:
                        return
        finally:
            self._discard(request_id)

    def _discard(self, request_id: str) -> None:
        """Forget a request; it is aborted if it has not finished."""
        with self._lock:
            self._events.pop(request_id, None)
            if self._engine is not None:
                self._engine.abort(request_id)

    def _sort(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.request_id in self._events:
                self._events[event.request_id].append(event)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _gather(prompt: Prompt, n: int, stream: Iterator[TokenEvent]) -> list[Output]:
    outputs = [Output(prompt, index) for index in range(n)]
    for event in stream:
        output = outputs[event.index]
        output.text += event.text
        output.token_ids += event.token_ids
        output.finish_reason = event.finish_reason
        output.stop_match = event.stop_match
        output.usage, output.error = event.usage, event.error
        if event.logprobs is not None:
            output.logprobs = (output.logprobs or []) + event.logprobs
        if event.prompt_logprobs is not None:
            output.prompt_logprobs = event.prompt_logprobs
    return outputs
