"""Cuts special tokens out of text, before the rest is tokenized."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from operator import itemgetter

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from pi2rt.tokenizer.marked_text import Runs

_TEXT = 0  # the matcher's own id of what stands between tokens

_BARS = ("|", "\uff5c")

_start = itemgetter(0)


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

    def split(self, text: str, trusted: Runs) -> list[str | int]:
        """Text and token ids in order; joined, with ids as their texts, they are ``text`` again.

        Args:
            text: any text.
            trusted: where control tokens are recognised. One that is not all in one of these ranges is text.
        """
        if not trusted:
            return self._of_any_text(text)
        found = self._all.find(text)
        if all(id_ not in self._control or within(trusted, start, end) for start, end, id_ in found):
            return _pieces(text, found)
        # What is spelled elsewhere must neither be cut out nor hide a trusted token. So these come first.
        pieces: list[str | int] = []
        at = 0
        for first, last in trusted:
            for start, end, id_ in self._all.find(text[first:last]):
                if id_ in self._control:
                    pieces += [*self._of_any_text(text[at : first + start]), id_]
                    at = first + end
        return pieces + self._of_any_text(text[at:])

    def _of_any_text(self, text: str) -> list[str | int]:
        return _pieces(text, self._user_defined.find(text))


class _Matcher:
    def __init__(self, tokens: Mapping[str, int]) -> None:
        # the matching itself is the Aho-Corasick automaton of `tokenizers`; its model has one word for all
        # other text
        self._engine = Tokenizer(WordLevel({"": _TEXT}, unk_token=""))
        self._engine.add_tokens([AddedToken(text, normalized=False) for text in tokens])
        self._ids = (-1, *tokens.values())

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each token, in order."""
        if len(self._ids) == 1:
            return []
        encoding = self._engine.encode(text, add_special_tokens=False)
        return [
            (start, end, self._ids[id_])
            for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if id_ != _TEXT
        ]


def is_control_name(text: str) -> bool:
    """Whether a token is spelled like a control token: ``<|user|>``, ``<|turn>``, ``<turn|>``. Files mark some of those
    that begin and end turns as ordinary added tokens (DeepSeek's); converters to GGUF go by the name too."""
    return text[:1] == "<" and text[-1:] == ">" and (text[1:2] in _BARS or text[-2:-1] in _BARS)


def within(runs: Runs, start: int, end: int) -> bool:
    """Whether a range of at least one character is all in one of the runs."""
    index = bisect_right(runs, start, key=_start) - 1
    return index >= 0 and end <= runs[index][1]


def _pieces(text: str, found: list[tuple[int, int, int]]) -> list[str | int]:
    pieces: list[str | int] = []
    at = 0
    for start, end, id_ in found:
        if at < start:
            pieces.append(text[at:start])
        pieces.append(id_)
        at = end
    if at < len(text):
        pieces.append(text[at:])
    return pieces
