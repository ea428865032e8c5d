"""Cuts special tokens out of text, before the rest is tokenized."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

_TEXT = 0  # the splitter's own id of what lies between special tokens


class SpecialSplitter:
    """Finds tokens in text: leftmost first, the longest of those that start at the same place.

    Args:
        tokens: id by text; none may be empty.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        # the matching itself is the Aho-Corasick automaton of `tokenizers`; its model has one word for all
        # other text
        self._matcher = Tokenizer(WordLevel({"": _TEXT}, unk_token=""))
        self._matcher.add_tokens([AddedToken(text, normalized=False) for text in tokens])
        self._ids = (-1, *tokens.values())

    def split(self, text: str) -> list[str | int]:
        """Text and token ids in order; joined, with ids as their texts, they are ``text`` again."""
        if len(self._ids) == 1:
            return [text] if text else []
        encoding = self._matcher.encode(text, add_special_tokens=False)
        return [
            text[start:end] if id_ == _TEXT else self._ids[id_]
            for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        ]
