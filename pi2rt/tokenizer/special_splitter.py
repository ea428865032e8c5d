"""Cuts special tokens out of text, before the rest is tokenized."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import TypeAlias

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from pi2rt.tokenizer.marked_text import Runs

_TEXT = 0  # the matcher's own id of what stands between tokens
_WINDOW = 4096  # characters matched at once
_SKIPPED = 1 << 17  # characters searched at once for one that a token begins with

_BARS = ("|", "\uff5c")
_TURNS = frozenset(
    (
        "<start_of_turn>",  # Gemma
        "[INST]",  # Mistral
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
    )
)

_start = itemgetter(0)

Span: TypeAlias = tuple[int, int, int | None]
"""(start, end, id): a token, or with None the text between two; never empty."""


class SpecialSplitter:
    """Finds tokens in text: leftmost first, the longest of those that start at the same place. ``control``: id by text,
    of those that only trusted text has.

    Args:
        user_defined: id by text, of tokens that any text may have; none may be empty. Those that are named like control
            tokens count as such.
        control: id by text, of tokens that only trusted text has; none may be empty.
    """

    def __init__(self, user_defined: Mapping[str, int], control: Mapping[str, int]) -> None:
        control = {**{text: id_ for text, id_ in user_defined.items() if is_control_name(text)}, **control}
        user_defined = {text: id_ for text, id_ in user_defined.items() if text not in control}
        self.control: Mapping[str, int] = control
        self._user_defined, self._all = _Matcher(user_defined), _Matcher({**user_defined, **control})
        self._control = frozenset(control.values())

    def split(self, text: str, trusted: Runs) -> Iterator[Span | None]:
        """The spans of a text in order, which together are all of it; None where more work is to be done before the
        next one.

        Args:
            text: any text.
            trusted: where control tokens are recognised. One that is not all in one of these ranges is text.
        """
        size = len(text)
        if not trusted:
            yield from _filled(self._user_defined.find(text, 0, size), 0, size)
            return
        if trusted == ((0, size),):
            yield from _filled(self._all.find(text, 0, size), 0, size)
            return
        found: list[tuple[int, int, int] | None] = []
        for each in self._all.find(text, 0, size):
            if each is None:
                yield None
            elif each[2] in self._control and not within(trusted, each[0], each[1]):
                break
            else:
                found.append(each)
        else:
            yield from _filled(found, 0, size)
            return
        # What is spelled elsewhere must neither be cut out nor hide a trusted token. So these come first.
        at = 0
        for first, last in trusted:
            for each in self._all.find(text, first, last):
                if each is None:
                    yield None
                elif each[2] in self._control:
                    yield from _filled(self._user_defined.find(text, at, each[0]), at, each[0])
                    yield each
                    at = each[1]
        yield from _filled(self._user_defined.find(text, at, size), at, size)


class _Matcher:
    def __init__(self, tokens: Mapping[str, int]) -> None:
        # the matching itself is the Aho-Corasick automaton of `tokenizers`; its model has one word for all
        # other text
        self._engine = Tokenizer(WordLevel({"": _TEXT}, unk_token=""))
        self._engine.add_tokens([AddedToken(text, normalized=False) for text in tokens])
        self._ids = (-1, *tokens.values())
        self._longest = max(map(len, tokens), default=0)
        firsts = "".join(map(re.escape, sorted({text[0] for text in tokens})))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def find(self, text: str, start: int, end: int) -> Iterator[tuple[int, int, int] | None]:
        """(start, end, id) of each token in ``text[start:end]``, in order; None after each part of the work.

        A token that starts ``longest`` characters before the end of a window is found as in the whole text: where it
        starts and which it is depends on nothing before it but where the last one ended, and on nothing after it.
        """
        if self._first is None:
            return
        window = max(_WINDOW, 2 * self._longest)
        while start < end:
            hit = self._first.search(text, start, min(end, start + _SKIPPED))
            if hit is None:
                start += _SKIPPED
                yield None
                continue
            start = hit.start()
            last = start + window >= end
            sure = end if last else start + window - self._longest
            following = sure
            encoding = self._engine.encode(text[start : min(end, start + window)], add_special_tokens=False)
            for id_, (first, after) in zip(encoding.ids, encoding.offsets, strict=True):
                if id_ != _TEXT and start + first < sure:
                    following = max(following, start + after)
                    yield start + first, start + after, self._ids[id_]
            start = following
            yield None


def is_control_name(text: str) -> bool:
    """Whether a token is spelled like a control token: ``<|user|>``, ``<|turn>``, ``<turn|>``, ``<start_of_turn>``.
    Files mark some of those that begin and end turns as ordinary added tokens (DeepSeek's, and Gemma's as SentencePiece
    has them); converters to GGUF go by the name too."""
    barred = text[:1] == "<" and text[-1:] == ">" and (text[1:2] in _BARS or text[-2:-1] in _BARS)
    return barred or text in _TURNS


def within(runs: Runs, start: int, end: int) -> bool:
    """Whether a range of at least one character is all in one of the runs."""
    index = bisect_right(runs, start, key=_start) - 1
    return index >= 0 and end <= runs[index][1]


def _filled(found: Iterable[tuple[int, int, int] | None], at: int, end: int) -> Iterator[Span | None]:
    """The tokens found, and the text between them."""
    for each in found:
        if each is not None:
            if at < each[0]:
                yield at, each[0], None
            at = each[1]
        yield each
    if at < end:
        yield at, end, None
