"""Decides what each step computes: which sequences, how many tokens each, in which pages. No tensors.

A step has a budget of tokens. Running sequences with one token to compute (decode) come first, then running ones
with more (a chunk of a prompt), then waiting ones while rows, pages and budget last. When pages run out, the
sequence that is last in order gives all of its pages back and is computed again later (preemption by recompute).
Order is by priority, then arrival; the first in order can always go on, so everything ends.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np

from torchinfer.kv_cache.pages import PagePool
from torchinfer.kv_cache.prefix import PrefixCache
from torchinfer.request import FinishReason
from torchinfer.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a sequence that has more than one to compute."""

    sequence: Sequence
    start: int
    end: int
    samples: bool  # whether the chunk ends at the last known token, so that a new one is sampled


@dataclass(slots=True)
class Plan:
    """One step. Its request rows are `decodes`, then `chunks`; all decodes and some chunks sample."""

    decodes: list[Sequence] = field(default_factory=list)
    feed: list[int] = field(default_factory=list)  # of each decode: row of its token in the last step's ids; -1: known
    chunks: list[Chunk] = field(default_factory=list)
    num_tokens: int = 0
    max_decode_kv_length: int = 0  # tokens in the cache of the longest decode, its new one included
    sampled: list[Sequence] = field(default_factory=list)  # who gets a token, in row order
    all_greedy: bool = True  # no sampled sequence needs a random number

    @property
    def max_kv_length(self) -> int:
        """Tokens in the cache of the longest request once the step has run."""
        return max([self.max_decode_kv_length, *(chunk.end for chunk in self.chunks)])


class Scheduler:
    """Owns the queues, the pages and the page table.

    `page_table` is [max_num_requests, max_pages] int32; a running sequence has the row `sequence.row`.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_requests: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        prefix_cache: PrefixCache | None,
    ) -> None:
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.page_size = page_size
        self.token_budget = max_num_batched_tokens
        self.page_table = np.zeros((max_num_requests, -(-max_model_len // page_size)), dtype=np.int32)
        self.running: list[Sequence] = []  # sorted by order
        self.num_preemptions = 0
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # a heap; finished ones are dropped when met
        self._num_waiting = 0
        self._free_rows = list(range(max_num_requests - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def has_work(self) -> bool:
        return bool(self.running) or self._num_waiting > 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Its `max_length` must fit the page table and the pool."""
        heapq.heappush(self._waiting, (sequence.order, sequence))
        self._num_waiting += 1

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now and give its pages back; a token that is still on the device will be ignored."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.status is Status.WAITING:
            self._num_waiting -= 1
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def schedule(self) -> Plan:
        """Plan the next step. Pages are taken and `num_computed` is advanced here; the step must be run."""
        plan = Plan()
        for sequence in self._plan_decodes(plan):
            if sequence.status is Status.RUNNING:
                self._plan_chunk(sequence, plan)
        self._admit(plan)
        plan.sampled = plan.decodes + [chunk.sequence for chunk in plan.chunks if chunk.samples]
        plan.all_greedy = all(map(attrgetter("is_greedy"), plan.sampled))
        for row, sequence in enumerate(plan.sampled):
            sequence.num_pending += 1
            sequence.pending_row = row
        return plan

    def update(self, plan: Plan, token_ids: Iterable[int]) -> list[tuple[int, Sequence]]:
        """Take the sampled ids, in the order of `plan.sampled`. Returns who got one, with the index in that order.

        Sequences that finished since the plan was made are left out. A sequence that reached a stop id or its
        length is finished.
        """
        advanced = []
        for row, (sequence, token) in enumerate(zip(plan.sampled, token_ids, strict=True)):
            sequence.num_pending -= 1
            if sequence.status is Status.FINISHED:
                continue
            tokens = sequence.tokens
            tokens.append(token)
            advanced.append((row, sequence))
            if sequence.num_computed >= sequence.next_full_page and sequence.status is Status.RUNNING:
                self._remember_pages(sequence)
            if token in sequence.stop_ids:
                sequence.stop_match = token
                self.finish(sequence, FinishReason.STOP)
            elif len(tokens) >= sequence.max_length:
                self.finish(sequence, FinishReason.LENGTH)
        for chunk in plan.chunks:
            if chunk.sequence.status is Status.RUNNING and not chunk.samples:
                self._remember_pages(chunk.sequence)
        return advanced

    def check(self) -> None:
        """Assert the invariants: every page has one state, the page table says what sequences hold."""
        self.pool.check(page for sequence in self.running for page in sequence.pages)
        rows = [sequence.row for sequence in self.running]
        assert sorted(rows + self._free_rows) == list(range(len(self.page_table))), "a row is lost or owned twice"
        assert self.running == sorted(self.running, key=lambda s: s.order)
        for sequence in self.running:
            assert sequence.num_computed <= len(sequence.pages) * self.page_size
            assert list(self.page_table[sequence.row, : len(sequence.pages)]) == sequence.pages

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Plan every running sequence with one token to compute; returns those with more."""
        size = self.page_size
        decodes, feed, chunked, longest = plan.decodes, plan.feed, [], 0
        for sequence in tuple(self.running):
            if sequence.status is not Status.RUNNING:
                continue  # preempted for an earlier one
            num_computed = sequence.num_computed
            num_known = len(sequence.tokens) + sequence.num_pending
            if num_known - num_computed != 1:
                chunked.append(sequence)
            elif num_known < sequence.max_length and (
                num_computed < len(sequence.pages) * size or self._grow(sequence, plan)
            ):
                sequence.num_computed = num_known
                if num_known > longest:
                    longest = num_known
                decodes.append(sequence)
                feed.append(sequence.pending_row if sequence.num_pending else -1)
        plan.num_tokens, plan.max_decode_kv_length = len(decodes), longest
        return chunked

    def _plan_chunk(self, sequence: Sequence, plan: Plan) -> None:
        """Plan as much of the sequence as budget and pages allow, possibly nothing."""
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + self.token_budget - plan.num_tokens)
        while len(sequence.pages) * self.page_size < end:
            if not self._grow(sequence, plan):
                end = len(sequence.pages) * self.page_size
        if end > start:
            sequence.num_computed = end
            plan.chunks.append(Chunk(sequence, start, end, samples=end == len(sequence.tokens)))
            plan.num_tokens += end - start

    def _admit(self, plan: Plan) -> None:
        while self._waiting and self._free_rows and plan.num_tokens < self.token_budget:
            sequence = self._waiting[0][1]
            if sequence.status is Status.FINISHED:
                heapq.heappop(self._waiting)
            elif sequence.num_pending or not self._enter(sequence):
                break
            else:
                heapq.heappop(self._waiting)
                self._plan_chunk(sequence, plan)

    def _enter(self, sequence: Sequence) -> bool:
        """Make a waiting sequence run if the pages for all of its known tokens can be had."""
        pages: list[int] = []
        if self.prefix_cache and not sequence.wants_prompt_logprobs:
            self.prefix_cache.extend(sequence.digests, sequence.tokens)
            # One token at least is left to compute, because its logits are wanted.
            pages = self.prefix_cache.match(sequence.digests[: (len(sequence.tokens) - 1) // self.page_size])
        num_needed = -(-len(sequence.tokens) // self.page_size) - len(pages)
        if num_needed > self.pool.num_available:
            self.pool.release(reversed(pages))
            return False
        if self.prefix_cache:
            self.prefix_cache.count(len(sequence.tokens), len(pages) * self.page_size)
        if sequence.num_output == 0:
            sequence.num_cached = len(pages) * self.page_size
        sequence.pages, sequence.num_remembered = pages, len(pages)
        sequence.num_computed = len(pages) * self.page_size
        sequence.next_full_page = sequence.num_computed + self.page_size
        sequence.row = self._free_rows.pop()
        self.page_table[sequence.row, : len(pages)] = pages
        sequence.status = Status.RUNNING
        self._num_waiting -= 1
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        return True

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Give the sequence one more page, if need be from those after it; False when it must wait."""
        page = self.pool.allocate()
        while page is None:
            victim = self.running[-1]
            if victim.order <= sequence.order or victim in plan.decodes:
                return False
            self._preempt(victim)
            page = self.pool.allocate()
        self.page_table[sequence.row, len(sequence.pages)] = page
        sequence.pages.append(page)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        self.add(sequence)
        self.num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        self.pool.release(reversed(sequence.pages))  # the tail is evicted before the prefix
        sequence.pages = []
        self._free_rows.append(sequence.row)
        sequence.row = -1
        self.running.remove(sequence)

    def _remember_pages(self, sequence: Sequence) -> None:
        """Tell the prefix cache of every page that is full of known tokens."""
        if self.prefix_cache is None:
            sequence.next_full_page = sequence.max_length + self.page_size  # never
            return
        self.prefix_cache.extend(sequence.digests, sequence.tokens)
        num_full = min(sequence.num_computed, len(sequence.tokens)) // self.page_size
        for index in range(sequence.num_remembered, num_full):
            self.prefix_cache.add(sequence.pages[index], sequence.digests[index])
        sequence.num_remembered = num_full
        sequence.next_full_page = (num_full + 1) * self.page_size
