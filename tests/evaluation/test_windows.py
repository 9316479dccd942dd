"""Windows over a text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchinfer.evaluation.windows import Window, buckets, find_prefix, make_windows
from torchinfer.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "recipes" / "tiny-llama"


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    num_prefix = draw(st.integers(0, 2))
    context = draw(st.integers(num_prefix + 2, 40))
    return draw(st.integers(2, 200)), context, draw(st.integers(1, context - num_prefix - 1)), num_prefix


@given(cuts())
def test_windows_score_each_token_once_but_the_first_one_without_a_prefix(cut):
    scored = [token for window in make_windows(*cut) for token in range(window.first, window.end)]
    num_tokens, *_, num_prefix = cut
    assert scored == list(range(0 if num_prefix else 1, num_tokens))


@given(cuts())
def test_a_window_has_at_most_the_context_and_something_before_what_it_scores(cut):
    for window in make_windows(*cut):
        assert window.num_tokens <= cut[1]
        assert window.context_of(window.first) >= 1


def test_windows_of_half_a_context_score_their_second_half():
    assert make_windows(20, 8, 4) == [Window(0, 1, 8), Window(4, 8, 12), Window(8, 12, 16), Window(12, 16, 20)]


def test_context_counts_the_prefix():
    assert Window(10, 14, 20, num_prefix=1).context_of(14) == 5


@pytest.mark.parametrize(
    ("longest", "ranges"),
    [(5, [(1, 16)]), (15, [(1, 16)]), (16, [(1, 16), (16, 32)]), (70, [(1, 16), (16, 32), (32, 64), (64, 128)])],
)
def test_buckets_are_powers_of_two_up_to_the_longest_context(longest, ranges):
    assert buckets(longest) == ranges


def test_the_prefix_is_what_the_tokenizer_puts_in_front():
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert find_prefix(Tokenizer(tokenizer)) == []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert find_prefix(Tokenizer(tokenizer)) == [0]
