"""Engine: takes requests, steps, yields events. Single-threaded; AsyncEngine and LLM drive it.

    step = schedule, run, update, collect the events

Where the device works on its own, a step is planned and launched before the last one's ids are looked at.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from torchinfer.engine_info import EngineStats, ModelInfo, validate
from torchinfer.errors import RequestError, StepMemoryError
from torchinfer.output import SampleText
from torchinfer.request import FinishReason, Request, TokenEvent, TokenLogprobs, Usage
from torchinfer.runner import Launched, Runner, StepOutput
from torchinfer.scheduler import Plan, Scheduler
from torchinfer.sequence import Sequence, Status
from torchinfer.step_input import sampling_record
from torchinfer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GOLDEN = 0x9E3779B97F4A7C15  # spreads the seeds of a request's samples


@dataclass(slots=True)
class _Open:
    """A request that has not had its final event."""

    request: Request
    sequences: list[Sequence]
    texts: list[SampleText]  # of each sample; empty without a tokenizer
    prompt_logprobs: list[TokenLogprobs | None] | None
    awaits_first_token: bool = True  # samples 1..n-1 are not queued before that
    num_finished: int = 0


@dataclass(slots=True)
class _Counters:
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_arrivals: int = 0


class Engine:
    """Requests in, events out. `launch.start_engine` makes one from an EngineConfig."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, info: ModelInfo, tokenizer: Tokenizer | None, seed: int = 0
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.runner = runner
        self._scheduler = scheduler
        self._seed = seed
        self._open: dict[str, _Open] = {}
        self._launched: Launched | None = None
        self._early_events: deque[TokenEvent] = deque()
        self._counters = _Counters()

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def has_work(self) -> bool:
        return bool(self._early_events) or self._launched is not None or self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. Exactly one of its events will carry `usage`: the last one.

        Raises:
            RequestError: when it cannot be honoured, or its id is open already.
        """
        validate(request, self.info)
        if request.request_id in self._open:
            raise RequestError(f"request_id={request.request_id!r} is open already; use another one or wait for it")
        params = request.params
        sequences = [self._new_sequence(request, index) for index in range(params.n)]
        tokenizer, prompt = self.tokenizer, list(request.prompt_ids)
        texts = [SampleText(tokenizer, prompt, params) for _ in sequences] if tokenizer else []
        logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            logprobs = [None] * len(request.prompt_ids)
        self._open[request.request_id] = _Open(request, sequences, texts, logprobs)
        self._scheduler.add(sequences[0])
        self._counters.num_prompt_tokens += len(request.prompt_ids)

    def abort(self, request_id: str) -> None:
        """End a request; its final event comes with the next `step`. An id that is not open is left alone."""
        if request_id in self._open:
            self._early_events.extend(self._end(self._open[request_id], FinishReason.ABORT, None))

    def fail(self, message: str) -> list[TokenEvent]:
        """End every open request with an error event; the engine must not be stepped any more."""
        opened = list(self._open.values())
        return list(self._early_events) + [e for o in opened for e in self._end(o, FinishReason.ERROR, message)]

    def close(self) -> None:
        """Let go of what is beside this process: nothing, unless others compute with it. Never stepped afterwards."""

    def step(self) -> list[TokenEvent]:
        """Run one step and return what came of it, in order for each sample."""
        events = list(self._early_events)
        self._early_events.clear()
        if self._launched and self._needs_host_ids():
            events += self._collect()
        plan, launched = self._scheduler.schedule(), None
        try:
            launched = self.runner.launch(plan, self._scheduler.page_table) if plan.num_tokens else None
        except StepMemoryError as error:
            events += self._end_step(plan, error)
        if self._launched:
            events += self._collect()
        self._launched = launched
        if launched and not self.runner.overlaps:
            events += self._collect()
        self._counters.num_steps += launched is not None
        return events

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        scheduler, cache = self._scheduler, self._scheduler.prefix_cache
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_used_pages=scheduler.pool.num_usable - scheduler.pool.num_available,
            num_prompt_tokens=self._counters.num_prompt_tokens,
            num_output_tokens=self._counters.num_output_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queried_tokens=cache.num_queried_tokens if cache else 0,
            num_prefix_hit_tokens=cache.num_hit_tokens if cache else 0,
            num_steps=self._counters.num_steps,
            num_compilations=self.runner.num_compilations,
            num_dropped_expert_tokens=self.runner.num_dropped_expert_tokens(),
        )

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        params = request.params
        arrival = self._counters.num_arrivals
        self._counters.num_arrivals += 1
        stop_ids = set(params.stop_token_ids) | set(() if params.ignore_eos else self.info.eos_token_ids)
        seed = params.seed + index * GOLDEN if params.seed is not None else (self._seed << 32) + arrival * GOLDEN
        return Sequence(
            request.request_id,
            index,
            list(request.prompt_ids),
            params,
            priority=request.priority,
            arrival=arrival,
            stop_ids=frozenset(stop_ids),
            max_length=min(len(request.prompt_ids) + params.max_tokens, self.info.max_model_len),
            sampling_record=sampling_record(params, seed % 2**64),
        )

    def _needs_host_ids(self) -> bool:
        return any(s.may_have_edits and s.num_pending for s in self._scheduler.running)

    def _collect(self) -> list[TokenEvent]:
        """Take the launched step's ids and make events of them."""
        assert self._launched is not None
        launched, self._launched = self._launched, None
        output = self.runner.collect(launched)
        advanced = self._scheduler.update(launched.plan, output.token_ids)
        self._take_prompt_logprobs(output)
        self._counters.num_output_tokens += len(advanced)
        return [self._event(sequence, output.logprobs.get(row)) for row, sequence in advanced]

    def _event(self, sequence: Sequence, logprobs: TokenLogprobs | None) -> TokenEvent:
        opened = self._open[sequence.request_id]
        text, match = self._text_of(sequence, opened.texts) if opened.texts else ("", sequence.stop_match)
        event = TokenEvent(sequence.request_id, sequence.index, [sequence.tokens[-1]], text)
        if logprobs is not None:
            event.logprobs = [logprobs]
        if opened.awaits_first_token:
            self._start_other_samples(opened, event)
        if sequence.finish_reason is not None:
            event.finish_reason, event.stop_match = sequence.finish_reason, match
            self._finish_sample(opened, event)
        return event

    def _start_other_samples(self, opened: _Open, event: TokenEvent) -> None:
        """With sample 0's first token the prompt is in the cache: the other samples will find it there."""
        opened.awaits_first_token = False
        event.prompt_logprobs = opened.prompt_logprobs
        opened.sequences[0].wants_prompt_logprobs = False
        for sequence in opened.sequences[1:]:
            self._scheduler.add(sequence)

    def _text_of(self, sequence: Sequence, texts: list[SampleText]) -> tuple[str, str | int | None]:
        """New text and what stopped it. A stop or EOS id has no text; a stop string ends the sample here."""
        text = texts[sequence.index]
        if sequence.finish_reason is FinishReason.STOP:
            piece, match = text.flush()
            return piece, match or sequence.stop_match
        piece, match = text.push(sequence.tokens[-1])
        if match is None and sequence.finish_reason is FinishReason.LENGTH:
            rest, match = text.flush()
            piece += rest
        if match is not None:
            if sequence.status is not Status.FINISHED:
                self._scheduler.finish(sequence, FinishReason.STOP)
            sequence.finish_reason = FinishReason.STOP
        return piece, match

    def _finish_sample(self, opened: _Open, event: TokenEvent) -> None:
        """Count a finished sample; its event is the request's final one when it is the last."""
        opened.num_finished += 1
        if opened.num_finished == len(opened.sequences):
            first = opened.sequences[0]
            num_output = sum(s.num_output for s in opened.sequences)
            event.usage = Usage(first.num_prompt, first.num_cached, num_output)
            del self._open[event.request_id]

    def _end(self, opened: _Open, reason: FinishReason, error: str | None) -> list[TokenEvent]:
        events = []
        for sequence in opened.sequences:
            if sequence.status is Status.FINISHED:
                continue
            if opened.awaits_first_token and sequence.index > 0:
                sequence.status, sequence.finish_reason = Status.FINISHED, reason
            else:
                self._scheduler.finish(sequence, reason)
            text = opened.texts[sequence.index].flush()[0] if opened.texts else ""
            event = TokenEvent(sequence.request_id, sequence.index, [], text, finish_reason=reason, error=error)
            self._finish_sample(opened, event)
            events.append(event)
        return events

    def _end_step(self, plan: Plan, error: StepMemoryError) -> list[TokenEvent]:
        """End the requests of a step that was planned and not run. Nothing of it is remembered: not its pages either,
        which is why this comes before the ids of the step before it are taken."""
        logger.error("%s", error)
        sequences = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]
        requests = dict.fromkeys(sequence.request_id for sequence in sequences)
        found = (self._open.get(request_id) for request_id in requests)
        return [event for opened in found if opened for event in self._end(opened, FinishReason.ERROR, str(error))]

    def _take_prompt_logprobs(self, output: StepOutput) -> None:
        for part in output.prompt_logprobs:
            opened = self._open.get(part.sequence.request_id)
            if opened and opened.prompt_logprobs is not None:
                opened.prompt_logprobs[part.start : part.start + len(part.entries)] = part.entries
