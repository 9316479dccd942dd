"""Sequence: one sample of one request, as the scheduler and the runner see it. No tensors, no text."""

from __future__ import annotations

import enum

from torchinfer.request import FinishReason, SamplingParams


class Status(enum.Enum):
    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Sequence:
    """Progress is arithmetic on three counters; there is no prefill or decode mode.

    tokens              known ids: prompt, then output
    num_pending         ids that are sampled on the device but not yet known here (0 or 1 when a step is planned)
    num_computed        tokens whose keys and values are in the cache once the launched steps have run

    0 ........ num_computed ........ len(tokens) + num_pending
    [  in the cache  )[   to compute: 1 is a decode, more is a chunk  )
    """

    __slots__ = (
        "arrival",
        "digests",
        "finish_reason",
        "has_filter",
        "index",
        "is_greedy",
        "max_length",
        "may_have_edits",
        "next_full_page",
        "num_cached",
        "num_computed",
        "num_pending",
        "num_prompt",
        "num_remembered",
        "pages",
        "params",
        "pending_row",
        "priority",
        "request_id",
        "row",
        "sampling_record",
        "status",
        "stop_ids",
        "stop_match",
        "tokens",
        "wants_prompt_logprobs",
    )

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int,
        arrival: int,
        stop_ids: frozenset[int],
        max_length: int,
        sampling_record: bytes,
    ) -> None:
        self.request_id = request_id
        self.index = index  # which of the request's n samples
        self.params = params
        self.priority = priority
        self.arrival = arrival
        self.stop_ids = stop_ids
        self.max_length = max_length  # tokens of prompt and output after which it ends
        self.sampling_record = sampling_record  # of params and seed, see step_input.py
        self.tokens = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.num_computed = 0
        self.num_pending = 0
        self.pending_row = -1  # where the last launched step sampled for this sequence
        self.num_cached = 0  # prompt tokens found in the prefix cache at the first admission
        self.row = -1  # of the page table, while running
        self.pages: list[int] = []
        self.digests: list[bytes] = []  # of full pages of `tokens`, as far as they were needed
        self.num_remembered = 0  # pages that the prefix cache was told of
        self.next_full_page = 0  # num_computed at which the next page is full
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_match: int | None = None
        self.is_greedy = params.is_greedy
        self.has_filter = not params.is_greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
        self.may_have_edits = params.needs_history or bool(params.logit_bias) or params.min_tokens > 0
        self.wants_prompt_logprobs = params.prompt_logprobs is not None and index == 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: smaller priority value, then earlier arrival."""
        return (self.priority, self.arrival)
