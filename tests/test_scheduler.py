"""The scheduler alone and under FakeRunner: properties over random traces, and the rules one by one."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from torchinfer.engine import Engine
from torchinfer.engine_info import ModelInfo
from torchinfer.fake_runner import FakeRunner, expected_output
from torchinfer.kv_cache.pages import PagePool
from torchinfer.kv_cache.prefix import ROOT, PrefixCache, page_digest
from torchinfer.request import FinishReason, Request, SamplingParams
from torchinfer.scheduler import Scheduler

VOCAB = 50


def make_engine(
    *,
    num_pages: int = 9,
    page_size: int = 4,
    max_num_requests: int = 4,
    budget: int = 16,
    max_model_len: int = 32,
    prefix_cache: bool = True,
    overlaps: bool = False,
) -> tuple[Engine, Scheduler]:
    pool = PagePool(num_pages)
    scheduler = Scheduler(
        pool,
        page_size=page_size,
        max_num_requests=max_num_requests,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        prefix_cache=PrefixCache(pool, page_size) if prefix_cache else None,
    )
    runner = FakeRunner(num_pages, page_size, VOCAB, overlaps=overlaps)
    info = ModelInfo(
        "fake", "Fake", 0, VOCAB, max_model_len, "int", "cpu", num_pages, page_size, max_num_requests, (), False, "int"
    )
    return Engine(scheduler, runner, info, None), scheduler


def request(name: str, prompt: list[int], max_tokens: int = 4, priority: int = 0, **params: object) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0, **params), priority)  # type: ignore[arg-type]


def run(engine: Engine, scheduler: Scheduler) -> dict[str, list[int]]:
    """Step until all is done; the ids of each request."""
    ids: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            ids.setdefault(event.request_id, []).extend(event.token_ids)
        scheduler.check()
    return ids


def random_trace(seed: int) -> None:
    """Arrivals, aborts, priorities and shared prefixes over a tiny pool; the invariants hold after every step."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 8])
    max_model_len = rng.randint(4, 40)
    per_request = -(-max_model_len // page_size)
    max_num_requests = rng.randint(1, 6)
    engine, scheduler = make_engine(
        num_pages=1 + per_request + rng.randint(0, 2 * per_request),
        page_size=page_size,
        max_num_requests=max_num_requests,
        budget=max_num_requests + rng.randint(0, 12),
        max_model_len=max_model_len,
        prefix_cache=rng.random() < 0.7,
        overlaps=rng.random() < 0.5,
    )
    prefix = [rng.randrange(VOCAB) for _ in range(max_model_len)]
    pending = [_random_request(rng, f"r{i}", prefix, max_model_len) for i in range(rng.randint(1, 12))]
    asked = {r.request_id: r for r in pending}
    ids: dict[str, list[int]] = {name: [] for name in asked}
    finals: Counter[str] = Counter()
    reasons: dict[str, FinishReason | None] = {}
    steps = 0
    while pending or engine.has_work:
        while pending and rng.random() < 0.4:
            engine.add(pending.pop())
        if rng.random() < 0.05:
            engine.abort(rng.choice(list(asked)))
        for event in engine.step():
            assert finals[event.request_id] == 0, "an event after the final one"
            ids[event.request_id] += event.token_ids
            finals[event.request_id] += event.usage is not None
            reasons[event.request_id] = event.finish_reason
        scheduler.check()
        steps += 1
        assert steps < 5000, "no progress"
    assert all(finals[name] == 1 for name in asked), finals
    assert scheduler.pool.num_available == scheduler.pool.num_usable
    for name, r in asked.items():
        count = min(r.params.max_tokens, max_model_len - len(r.prompt_ids))
        expected = expected_output(r.prompt_ids, count, VOCAB)
        assert ids[name] == expected[: len(ids[name])], "a wrong page was read"
        if reasons[name] is not FinishReason.ABORT:
            assert len(ids[name]) == count


def _random_request(rng: random.Random, name: str, prefix: list[int], max_model_len: int) -> Request:
    length = rng.randint(1, max_model_len - 1)
    shared = rng.randint(0, length)
    prompt = prefix[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]
    return request(name, prompt, max_tokens=rng.randint(1, 20), priority=rng.choice([0, 0, 1]))


@pytest.mark.parametrize("block", range(20))
def test_random_traces_lose_no_page_and_end_every_request_once(block: int) -> None:
    for seed in range(block * 110, (block + 1) * 110):
        random_trace(seed)


def test_decode_rows_come_before_chunks_and_chunks_fill_the_budget() -> None:
    engine, scheduler = make_engine(num_pages=40, budget=8)
    engine.add(request("a", [1, 2, 3]))
    engine.step()
    engine.add(request("b", list(range(20))))
    plan = scheduler.schedule()
    assert [s.request_id for s in plan.decodes] == ["a"]
    assert [(c.sequence.request_id, c.start, c.end, c.samples) for c in plan.chunks] == [("b", 0, 7, False)]
    assert plan.num_tokens == 8


def test_a_smaller_priority_value_goes_first() -> None:
    engine, scheduler = make_engine(num_pages=40, max_num_requests=1)
    engine.add(request("late", [1], priority=5))
    engine.add(request("soon", [2], priority=1))
    assert list(run(engine, scheduler)) == ["soon", "late"]


def test_equal_priorities_run_in_order_of_arrival() -> None:
    engine, scheduler = make_engine(num_pages=40, max_num_requests=1)
    for name in "abc":
        engine.add(request(name, [1]))
    assert list(run(engine, scheduler)) == ["a", "b", "c"]


def test_preemption_recomputes_to_the_same_ids() -> None:
    prompts = {"a": list(range(8)), "b": list(range(8, 16)), "c": list(range(16, 24))}
    engine, scheduler = make_engine(num_pages=9, page_size=4, prefix_cache=False)
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, max_tokens=16))
    ids = run(engine, scheduler)
    assert scheduler.num_preemptions > 0
    assert ids == {name: expected_output(prompt, 16, VOCAB) for name, prompt in prompts.items()}


def test_a_prefix_hit_computes_only_the_rest() -> None:
    engine, scheduler = make_engine(num_pages=40, budget=32)
    prompt = list(range(13))
    engine.add(request("first", prompt, max_tokens=1))
    run(engine, scheduler)
    engine.add(request("second", prompt, max_tokens=1))
    plan = scheduler.schedule()
    assert [(c.start, c.end) for c in plan.chunks] == [(12, 13)]


def test_an_evicted_page_is_not_found_again() -> None:
    pool = PagePool(3)
    cache = PrefixCache(pool, 2)
    page = pool.allocate()
    assert page is not None
    digest = page_digest(ROOT, [1, 2])
    cache.add(page, digest)
    pool.release([page])
    assert cache.match([digest]) == [page]
    pool.release([page])
    assert {pool.allocate(), pool.allocate()} == {1, 2}
    assert cache.match([digest]) == []


def test_an_abort_frees_pages_at_once() -> None:
    engine, scheduler = make_engine(num_pages=40)
    engine.add(request("a", list(range(10)), max_tokens=10))
    engine.step()
    assert scheduler.pool.num_available < scheduler.pool.num_usable
    engine.abort("a")
    assert scheduler.pool.num_available == scheduler.pool.num_usable
    events = engine.step()
    assert [(e.finish_reason, e.usage is not None) for e in events] == [(FinishReason.ABORT, True)]


@pytest.mark.parametrize("overlaps", [False, True])
def test_samples_of_one_request_share_the_prompt_and_end_with_one_usage(overlaps: bool) -> None:
    engine, scheduler = make_engine(num_pages=40, overlaps=overlaps)
    prompt = list(range(9))
    engine.add(request("a", prompt, max_tokens=5, n=3))
    events = []
    while engine.has_work:
        events += engine.step()
        scheduler.check()
    usages = [e.usage for e in events if e.usage]
    assert len(usages) == 1 and usages[0].num_output_tokens == 15
    for index in range(3):
        ids = [i for e in events if e.index == index for i in e.token_ids]
        assert ids == expected_output(prompt, 5, VOCAB)
    cache = scheduler.prefix_cache
    assert cache is not None and cache.num_hit_tokens == 2 * 8


def test_with_overlap_every_running_sequence_decodes_in_every_step() -> None:
    engine, _ = make_engine(num_pages=40, overlaps=True)
    for name in "abc":
        engine.add(request(name, [1, 2], max_tokens=12))
    engine.step()
    for _ in range(11):
        assert sorted(e.request_id for e in engine.step()) == ["a", "b", "c"]
