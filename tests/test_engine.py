"""The engine over FakeRunner: what each request gets, and that nobody else is touched."""

from __future__ import annotations

import pytest

from torchinfer.engine import Engine
from torchinfer.engine_info import ModelInfo
from torchinfer.errors import RequestError, StepMemoryError
from torchinfer.fake_runner import FakeRunner, expected_output
from torchinfer.kv_cache.pages import PagePool
from torchinfer.kv_cache.prefix import PrefixCache
from torchinfer.request import FinishReason, Request, SamplingParams, TokenEvent
from torchinfer.runner import Launched
from torchinfer.scheduler import Plan, Scheduler
from torchinfer.step_input import Ints

VOCAB = 50
PROMPT = (1, 2, 3)


def make_engine(*, eos: tuple[int, ...] = (), overlaps: bool = False, has_prefix_cache: bool = False) -> Engine:
    pool = PagePool(65)
    prefix_cache = PrefixCache(pool, 4) if has_prefix_cache else None
    scheduler = Scheduler(
        pool, page_size=4, max_num_requests=4, max_num_batched_tokens=16, max_model_len=32, prefix_cache=prefix_cache
    )
    info = ModelInfo("fake", "Fake", 0, VOCAB, 32, "int", "cpu", 65, 4, 4, eos, False, "int")
    return Engine(scheduler, FakeRunner(65, 4, VOCAB, overlaps=overlaps), info, None)


def run(engine: Engine, *requests: Request) -> dict[str, list[TokenEvent]]:
    for request in requests:
        engine.add(request)
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def ids_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@pytest.fixture(params=[False, True], ids=["waits", "overlaps"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_max_tokens_ends_with_length_and_usage(overlaps: bool) -> None:
    events = run(make_engine(overlaps=overlaps), Request("a", PROMPT, SamplingParams(max_tokens=5)))["a"]
    assert ids_of(events) == expected_output(PROMPT, 5, VOCAB)
    assert events[-1].finish_reason is FinishReason.LENGTH and events[-1].usage is not None
    assert (events[-1].usage.num_prompt_tokens, events[-1].usage.num_output_tokens) == (3, 5)
    assert [event.usage for event in events[:-1]] == [None] * 4


def test_the_context_ends_a_longer_max_tokens(overlaps: bool) -> None:
    events = run(make_engine(overlaps=overlaps), Request("a", PROMPT, SamplingParams(max_tokens=1000)))["a"]
    assert len(ids_of(events)) == 32 - 3 and events[-1].finish_reason is FinishReason.LENGTH


def test_a_stop_id_is_the_last_id(overlaps: bool) -> None:
    expected = expected_output(PROMPT, 8, VOCAB)
    params = SamplingParams(max_tokens=8, stop_token_ids=(expected[3],))
    events = run(make_engine(overlaps=overlaps), Request("a", PROMPT, params))["a"]
    assert ids_of(events) == expected[: expected.index(expected[3]) + 1]
    assert events[-1].finish_reason is FinishReason.STOP and events[-1].stop_match == expected[3]


def test_every_eos_id_stops_and_ignore_eos_does_not(overlaps: bool) -> None:
    expected = expected_output(PROMPT, 8, VOCAB)
    engine = make_engine(eos=(49, expected[2]), overlaps=overlaps)
    stops = Request("stops", PROMPT, SamplingParams(max_tokens=8))
    goes_on = Request("goes on", PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    events = run(engine, stops, goes_on)
    assert ids_of(events["stops"]) == expected[: expected.index(expected[2]) + 1]
    assert ids_of(events["goes on"]) == expected


def test_an_aborted_request_gets_one_final_event_and_others_go_on(overlaps: bool) -> None:
    engine = make_engine(overlaps=overlaps)
    engine.add(Request("a", PROMPT, SamplingParams(max_tokens=20)))
    engine.add(Request("b", PROMPT, SamplingParams(max_tokens=20)))
    engine.step()
    engine.abort("a")
    events = [event for _ in range(40) if engine.has_work for event in engine.step()]
    finals = [event for event in events if event.request_id == "a" and event.usage]
    assert [event.finish_reason for event in finals] == [FinishReason.ABORT]
    assert finals[0] == [event for event in events if event.request_id == "a"][-1]
    assert len([event for event in events if event.request_id == "b"]) >= 18


def test_aborting_an_unknown_request_does_nothing() -> None:
    engine = make_engine()
    engine.abort("nobody")
    assert not engine.has_work


def test_fail_ends_every_open_sample_with_the_error() -> None:
    engine = make_engine()
    engine.add(Request("a", PROMPT, SamplingParams(max_tokens=20, n=2)))
    engine.add(Request("b", PROMPT, SamplingParams(max_tokens=20)))
    engine.step()
    events = engine.fail("the device is gone")
    assert sorted((event.request_id, event.index) for event in events) == [("a", 0), ("a", 1), ("b", 0)]
    assert {event.error for event in events} == {"the device is gone"}
    assert [event.request_id for event in events if event.usage] == ["a", "b"]


class TooLarge(FakeRunner):
    """Finds no memory for one step, the one with this number."""

    num_before = -1

    def launch(self, plan: Plan, page_table: Ints) -> Launched:
        self.num_before -= 1
        if self.num_before == -1:
            raise StepMemoryError("it does not fit")
        return super().launch(plan, page_table)


@pytest.mark.parametrize("num_before", range(8))
def test_of_a_step_without_memory_nothing_is_remembered(overlaps: bool, num_before: int) -> None:
    engine = make_engine(overlaps=overlaps, has_prefix_cache=True)
    engine.runner = runner = TooLarge(65, 4, VOCAB, overlaps=overlaps)
    runner.num_before = num_before
    events = run(engine, Request("a", PROMPT, SamplingParams(max_tokens=20, n=2, temperature=0.5)))["a"]
    finals = [event for event in events if event.finish_reason]
    assert [(event.finish_reason, event.error) for event in finals] == [(FinishReason.ERROR, "it does not fit")] * 2
    assert [event.usage is not None for event in finals] == [False, True]
    # Its pages are full of tokens that were never computed, if they are found.
    longer = (*PROMPT, *expected_output(PROMPT, 15, VOCAB))
    events = run(engine, Request("b", longer, SamplingParams(max_tokens=5)))["b"]
    assert ids_of(events) == expected_output(longer, 5, VOCAB)
    assert engine.stats().num_used_pages == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((), {}, "no tokens"),
        ((1, 50), {}, r"\[50\] are outside of the vocabulary of 50"),
        ((-1,), {}, r"\[-1\] are outside"),
        (tuple(range(32)), {}, "32 tokens; with max_model_len=32 at most 31"),
        (PROMPT, {"min_tokens": 30, "max_tokens": 40}, "min_tokens=30 after 3 prompt tokens exceeds max_model_len=32"),
        (PROMPT, {"stop_token_ids": (77,)}, r"stop_token_ids \[77\] are outside"),
        (PROMPT, {"logit_bias": {99: 1.0}}, r"logit_bias \[99\] are outside"),
        (PROMPT, {"stop": ("x",)}, "stop strings need a tokenizer"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_refused_with_its_value(prompt, params, message) -> None:
    with pytest.raises(RequestError, match=message):
        make_engine().add(Request("a", prompt, SamplingParams(**params)))


def test_all_problems_of_a_request_are_said_at_once() -> None:
    with pytest.raises(RequestError) as error:
        make_engine().add(Request("a", (99,), SamplingParams(stop=("x",), stop_token_ids=(77,))))
    assert all(text in str(error.value) for text in ("[99]", "[77]", "tokenizer"))


def test_an_open_id_cannot_be_used_twice() -> None:
    engine = make_engine()
    engine.add(Request("a", PROMPT, SamplingParams()))
    with pytest.raises(RequestError, match="request_id='a' is open already"):
        engine.add(Request("a", PROMPT, SamplingParams()))
