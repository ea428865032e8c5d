from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pi2rt.engine.stop_finder import StopFinder

CONTROL = {90: "<end>", 91: "<a>", 92: "ab"}
"""Spellings of control tokens; other tokens have text."""


def spelling(token: int) -> str:
    return CONTROL.get(token, "")


def run(stops: list[str], pieces: list[tuple[int, str]]) -> tuple[str, str | None]:
    """The text that is shown of tokens with their texts, and the stop string that ended it."""
    finder, shown = StopFinder(stops, spelling), ""
    for token, text in pieces:
        more, stop = finder.push(token, text)
        shown += more
        if stop is not None:
            return shown, stop
    more, stop = finder.end("")
    return shown + more, stop


def test_the_spelling_of_a_control_token_is_a_stop_string() -> None:
    assert run(["<end>"], [(1, "a"), (90, ""), (2, "b")]) == ("a", "<end>")


def test_a_stop_string_may_reach_over_a_control_token() -> None:
    assert run(["x<end>y"], [(1, "ax"), (90, ""), (2, "yb")]) == ("a", "x<end>y")


def test_a_spelling_that_only_begins_a_stop_string_is_not_shown() -> None:
    assert run(["<end>!"], [(1, "a"), (90, ""), (2, "b")]) == ("ab", None)
    assert run(["<end>!"], [(1, "a"), (90, "")]) == ("a", None)


def reference(stops: list[str], pieces: list[tuple[int, str]]) -> tuple[str, str | None]:
    """By definition: the first stop string that is complete in all that is spelled, the longest of those that end
    there; before it, what is text."""
    spelled, is_text = "", ""  # one character of is_text for each one spelled
    for token, text in pieces:
        for part, flag in ((text, "t"), (spelling(token), "c")):
            for character in part:
                spelled, is_text = spelled + character, is_text + flag
                found = [stop for stop in stops if spelled.endswith(stop)]
                if found:
                    longest = max(found, key=len)
                    kept = len(spelled) - len(longest)
                    return "".join(
                        c for c, f in zip(spelled[:kept], is_text, strict=False) if f == "t"
                    ), longest
    return "".join(c for c, f in zip(spelled, is_text, strict=True) if f == "t"), None


texts = st.text("ab<>", max_size=3)
tokens = st.one_of(
    st.tuples(st.integers(0, 9), texts), st.tuples(st.sampled_from(sorted(CONTROL)), st.just(""))
)


@given(
    st.lists(
        st.text("abend<>", min_size=1, max_size=7) | st.sampled_from(["<end>", "<a>", "a<a>b"]), min_size=1
    ),
    st.lists(tokens, max_size=12),
)
def test_it_does_what_the_definition_says(stops: list[str], pieces: list[tuple[int, str]]) -> None:
    assert run(stops, pieces) == reference(stops, pieces)
