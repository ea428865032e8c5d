from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt import _errors as errors
from pi2rt.tokenizer import StopMatcher


def run(stops: list[str], parts: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown, found = "", None
    for part in parts:
        text, found = matcher.push(part)
        shown += text
    return shown + matcher.flush(), found


def expected(stops: list[str], text: str) -> tuple[str, str | None]:
    """The stop string that ends first, the longest of those."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=60)
@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.lists(st.text("abc", max_size=6), max_size=8),
)
def test_the_first_stop_string_ends_the_text_however_it_is_cut(stops: list[str], parts: list[str]) -> None:
    assert run(stops, parts) == expected(stops, "".join(parts))


@settings(max_examples=60)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(stops: list[str], parts: list[str]) -> None:
    matcher, seen, shown = StopMatcher(stops), "", ""
    for part in parts:
        seen += part
        text, found = matcher.push(part)
        shown += text
        if found:
            return
        held = seen[len(shown) :]
        assert seen == shown + held
        beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
        assert held == max((b for b in beginnings if seen.endswith(b)), key=len)


def test_without_stop_strings_all_passes() -> None:
    assert StopMatcher([]).push("abc") == ("abc", None)


def test_after_a_stop_string_nothing_is_shown() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("a\n") == ("a", None)
    assert matcher.push("\nb") == ("", "\n\n")
    assert matcher.push("c") == ("", "\n\n")
    assert matcher.flush() == ""


def test_what_was_held_back_is_shown_at_the_end() -> None:
    matcher = StopMatcher(["User:"])
    assert matcher.push("a Use") == ("a ", None)
    assert matcher.flush() == "Use"
    assert matcher.push("r:b") == ("r:b", None)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc", [b"a"]])
def test_stop_strings_are_strings_with_something_in_them(stops: list[str]) -> None:
    with pytest.raises(errors.RequestError, match="stop is"):
        StopMatcher(stops)


def test_long_stop_strings_take_linear_time() -> None:
    matcher = StopMatcher(["a" * 20_000 + "b"])
    assert matcher.push("a" * 100_000) == ("a" * 80_000, None)
    assert matcher.push("b") == ("", "a" * 20_000 + "b")
