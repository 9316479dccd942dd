"""What `torchinfer generate` and `torchinfer client` print: text as it comes, or samples, as text or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from torchinfer.errors import EngineError
from torchinfer.request import TokenEvent, TokenLogprobs


def show(prompts: list[str], streams: Iterable[Iterator[TokenEvent]], n: int, as_json: bool) -> None:
    """Print what the streams bring: live text of a single sample, else sample by sample; a summary on stderr.

    Raises:
        EngineError: a stream ended with an error.
    """
    clock = _Clock()
    for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True), start=1):
        if n > 1 or as_json:
            for sample in _gathered(prompt, clock.timed(stream), n):
                _print_sample(sample, number, as_json)
            continue
        if len(prompts) > 1:
            print(f"=== prompt {number}")
        for event in clock.timed(stream):
            print(event.text, end="", flush=True)
        print("\n" if number < len(prompts) else "")
    clock.print_summary()
    if clock.error is not None:
        raise EngineError(clock.error)


@dataclass
class _Sample:
    prompt: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_match: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add(self, event: TokenEvent) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        if event.logprobs is not None:
            self.logprobs = (self.logprobs or []) + event.logprobs
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.stop_match = event.finish_reason.value, event.stop_match


class _Clock:
    """Counts and times the tokens of all streams; keeps the first error."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._start = time.perf_counter()
        self._first_seconds: float | None = None
        self._num_tokens = 0

    def timed(self, stream: Iterator[TokenEvent]) -> Iterator[TokenEvent]:
        for event in stream:
            if event.token_ids and self._first_seconds is None:
                self._first_seconds = time.perf_counter() - self._start
            self._num_tokens += len(event.token_ids)
            self.error = self.error or event.error
            yield event

    def print_summary(self) -> None:
        seconds = time.perf_counter() - self._start
        first = "" if self._first_seconds is None else f", first after {self._first_seconds * 1000:.0f} ms"
        speed = f"{self._num_tokens / seconds:.1f} tokens/s{first}"
        print(f"{self._num_tokens} tokens in {seconds:.2f} s, {speed}", file=sys.stderr)


def _gathered(prompt: str, stream: Iterator[TokenEvent], n: int) -> list[_Sample]:
    samples = [_Sample(prompt, index) for index in range(n)]
    for event in stream:
        samples[event.index].add(event)
    return samples


def _print_sample(sample: _Sample, number: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(sample), ensure_ascii=False), flush=True)
    else:
        print(f"=== prompt {number}, sample {sample.index + 1}\n{sample.text}", flush=True)
