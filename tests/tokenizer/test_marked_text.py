"""Every operation on marked text spells what the one on plain text spells, and marks nothing but what was marked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi2rt import _errors as errors
from pi2rt.tokenizer import marked_text
from pi2rt.tokenizer.marked_text import MAX_RUNS, MarkedText, RenderedChat, join, runs_of, trusted

# what is trusted and what is not have no character in common, so that a result shows what its marks should be
TRUSTED, CONTENT = "AB \n", "ab\t\r"
PIECES = st.lists(
    st.one_of(st.text(TRUSTED, min_size=1, max_size=4), st.text(CONTENT, min_size=1, max_size=4)), max_size=6
)


def build(pieces: list[str]) -> str:
    return join("", [trusted(piece) if piece[0] in TRUSTED else piece for piece in pieces])


def marks(text: str) -> list[bool]:
    result = [False] * len(text)
    for start, end in runs_of(text):
        result[start:end] = [True] * (end - start)
    return result


def check(result: str) -> None:
    """The marks are those of the characters, and well formed."""
    runs = runs_of(result)
    assert all(start < end for start, end in runs)
    assert all(first[1] < second[0] for first, second in pairwise(runs))
    assert isinstance(result, MarkedText) == bool(runs)
    assert marks(result) == [character in TRUSTED for character in result]


METHODS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda s: s,
    "slice": lambda s: s[1:-1],
    "slice from the end": lambda s: s[-3:],
    "reversed": lambda s: s[::-1],
    "reversed slice": lambda s: s[4:1:-1],
    "characters": list,
    "first": lambda s: s[:1] and s[0],
    "last": lambda s: s[:1] and s[-1],
    "twice": lambda s: s * 2,
    "twice from the right": lambda s: 2 * s,
    "not at all": lambda s: s * -1,
    "split at space": lambda s: s.split(),
    "split at space once": lambda s: s.split(None, 1),
    "rsplit at space once": lambda s: s.rsplit(None, 1),
    "split": lambda s: s.split("A"),
    "split once": lambda s: s.split("a", 1),
    "rsplit": lambda s: s.rsplit("AB", 1),
    "splitlines": lambda s: s.splitlines(),
    "splitlines with ends": lambda s: s.splitlines(True),
    "partition": lambda s: s.partition("A"),
    "rpartition": lambda s: s.rpartition("bb"),
    "strip": lambda s: s.strip(),
    "strip of characters": lambda s: s.strip("Aa"),
    "lstrip": lambda s: s.lstrip(),
    "rstrip": lambda s: s.rstrip("\n"),
    "removeprefix": lambda s: s.removeprefix("A"),
    "removesuffix": lambda s: s.removesuffix("a"),
    "replaced": lambda s: s.replace("A", ""),
    "replaced once": lambda s: s.replace("b", "", 1),
    "replaced by content": lambda s: s.replace("AB", "xy"),
    "plus content": lambda s: s + "xy",
    "content plus": lambda s: "xy" + s,
}


@pytest.mark.parametrize("name", METHODS)
@given(PIECES)
def test_operations_keep_marks(name: str, pieces: list[str]) -> None:
    text = build(pieces)
    check(text)
    operation = METHODS[name]
    result, expected = operation(text), operation("".join(pieces))
    assert result == expected
    assert type(result) is type(expected) or isinstance(result, MarkedText)
    for part in result if isinstance(result, (list, tuple)) else [result]:
        check(part)


@given(PIECES, PIECES, PIECES)
def test_joining_and_replacing_with_marks(one: list[str], two: list[str], three: list[str]) -> None:
    a, b, c = map(build, (one, two, three))
    result = join(a, [b, c, "x", b])
    assert result == "".join(one).join(["".join(two), "".join(three), "x", "".join(two)])
    check(result)
    result = marked_text.replace(a, "".join(two)[:2], c)
    assert result == "".join(one).replace("".join(two)[:2], "".join(three))
    if two:
        check(result)
    else:  # between all characters: what that means for marks is of no use to anybody, so it has none
        assert not runs_of(result)


@pytest.mark.parametrize("name", ["upper", "lower", "title", "capitalize", "casefold", "swapcase"])
def test_another_case_of_the_same_length_keeps_marks(name: str) -> None:
    text = trusted("<|Im_End|>") + "content"
    result = getattr(text, name)()
    assert result == getattr(str.__str__(text), name)()
    assert runs_of(result) == ((0, 10),)
    longer = trusted("stra\u00dfe") + "content"
    result = getattr(longer, name)()
    assert result == getattr(str.__str__(longer), name)()
    assert runs_of(result) == (((0, 6),) if len(result) == len(longer) else ())


def test_what_is_not_handled_is_content() -> None:
    text = trusted("ab")
    for result in (
        text.center(9),
        text.zfill(9),
        f"{text:>9}",
        text.translate({97: 98}),
        text[::2],
        repr(text),
    ):
        assert not runs_of(result)
    assert not runs_of(",".join([text, text]))  # the method of a plain string
    assert runs_of(f"{text}") == runs_of(str(text)) == ((0, 2),)


def test_marked_text_is_a_string_like_any_other() -> None:
    text = trusted("ab")
    assert text == "ab"
    assert hash(text) == hash("ab")
    assert {"ab": 1}[text] == 1
    assert {text: 1}["ab"] == 1
    assert "a" in text
    assert text < "b"
    assert text.startswith("a")
    assert text.find("b") == 1
    assert type(trusted("")) is str
    with pytest.raises(IndexError):
        text[2]
    with pytest.raises(TypeError):
        text + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        1 + text  # type: ignore[operator]


def test_parts_that_touch_are_one() -> None:
    assert runs_of(trusted("<|im_") + trusted("end|>")) == ((0, 10),)
    assert runs_of(trusted("<|im_") + "end|>") == ((0, 5),)


def test_too_many_pieces() -> None:
    text = trusted("a") + "b"
    assert len(runs_of(text * MAX_RUNS)) == MAX_RUNS
    for make in (
        lambda: text * (MAX_RUNS + 1),
        lambda: join("", [text] * (MAX_RUNS + 1)),
        lambda: ("b" * (MAX_RUNS + 1) + text).replace("b", "c") and (text + "b" * MAX_RUNS).replace("b", "c"),
        lambda: (text * MAX_RUNS) + text,
    ):
        with pytest.raises(errors.TemplateError, match="by turns"):
            make()


def test_a_rendered_chat_is_plain_but_for_its_attribute() -> None:
    chat = RenderedChat.of("x" + trusted("<s>") + "y")
    assert chat == "x<s>y"
    assert chat.trusted == ((1, 4),)
    assert {type(str(chat)), type(chat + ""), type(chat[1:])} == {str}
    assert not runs_of(trusted("a").replace("a", chat))  # as content of another conversation it is content
    for twin in (copy.copy(chat), pickle.loads(pickle.dumps(chat))):
        assert twin == chat
        assert twin.trusted == chat.trusted
