"""SamplingParams refuses what it cannot honour."""

from __future__ import annotations

import pytest

from torchinfer.errors import RequestError
from torchinfer.request import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -3, "at least 1"),
        ("max_tokens", 2.5, "must be an integer"),
        ("max_tokens", True, "must be an integer"),
        ("min_tokens", 500, "between 0 and max_tokens"),
        ("temperature", float("nan"), "between 0 (greedy) and 100"),
        ("temperature", -0.1, "between 0 (greedy) and 100"),
        ("temperature", float("inf"), "between 0 (greedy) and 100"),
        ("temperature", "hot", "must be a number"),
        ("top_k", -1, "0 (keep all) or more"),
        ("top_p", 0, "more than 0 and at most 1"),
        ("top_p", 1.01, "more than 0 and at most 1"),
        ("min_p", -0.5, "between 0 and 1"),
        ("repetition_penalty", 0, "between 0.01 and 100"),
        ("presence_penalty", 2.5, "between -2 and 2"),
        ("frequency_penalty", float("nan"), "between -2 and 2"),
        ("seed", 2**64, "a 64-bit integer"),
        ("n", 0, "between 1 and 64"),
        ("logprobs", 21, "between 0 and 20"),
        ("prompt_logprobs", -1, "between 0 and 20"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_rule(field: str, value: object, rule: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert f"{field}={value!r}" in str(error.value) and rule in str(error.value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop": ["x"] * 1000}, "stop has 1000 strings; at most 16"),
        ({"stop": [""]}, "1 to 256 characters"),
        ({"stop": ["x" * 257]}, "1 to 256 characters"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids has 65 ids; at most 64"),
        ({"stop_token_ids": [-1]}, "non-negative"),
        ({"logit_bias": {1: 101}}, "logit_bias\\[1\\]=101"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "1025 entries; at most 1024"),
    ],
)
def test_lists_are_bounded(params: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)  # type: ignore[arg-type]


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(max_tokens=0, temperature=-1, top_p=0)
    assert all(name in str(error.value) for name in ("max_tokens=0", "temperature=-1", "top_p=0"))


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
