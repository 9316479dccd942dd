"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from torchinfer.tokenizer import StopChecker


def search(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The first stop string to be complete, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        for candidate in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(candidate):
                return text[: end - len(candidate)], candidate
    return text, None


LETTERS = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(pieces=st.lists(st.text("ab", max_size=6), max_size=10), stop=st.lists(LETTERS, max_size=4))
def test_stop_strings_are_found_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    checker = StopChecker(tuple(stop))
    shown, match = "", None
    for piece in pieces:
        text, match = checker.push(piece)
        shown += text
        if match is not None:
            break
    assert (shown + ("" if match else checker.flush()), match) == search("".join(pieces), stop)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=st.text("ab", max_size=12), stop=st.lists(LETTERS, min_size=1, max_size=4))
def test_no_more_is_held_back_than_a_stop_string_may_need(text: str, stop: list[str]) -> None:
    checker = StopChecker(tuple(stop))
    shown, match = checker.push(text)
    if match is None:
        held = text[len(shown) :]
        assert held == "" or any(candidate.startswith(held) for candidate in stop)
        assert not any(c.startswith(text[i:]) for c in stop for i in range(max(0, len(shown) - 4), len(shown)))


def test_without_stop_strings_text_passes() -> None:
    checker = StopChecker(())
    assert checker.push("text") == ("text", None)
    assert checker.flush() == ""


def test_the_match_is_not_part_of_the_text() -> None:
    checker = StopChecker(("\n\nUser:",))
    assert checker.push("Yes.\n") == ("Yes.", None)
    assert checker.push("\nUser: more") == ("", "\n\nUser:")


def test_held_back_text_comes_when_it_was_no_stop_string() -> None:
    checker = StopChecker(("END",))
    assert checker.push("the EN") == ("the ", None)
    assert checker.push("D") == ("", "END")
    checker = StopChecker(("END",))
    checker.push("the EN")
    assert checker.push("GINE") == ("ENGIN", None)
    assert checker.flush() == "E"


def test_after_the_match_nothing_is_shown() -> None:
    checker = StopChecker(("x",))
    checker.push("axb")
    assert checker.push("cde") == ("", "x")
    assert checker.flush() == ""
