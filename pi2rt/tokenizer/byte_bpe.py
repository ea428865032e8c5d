"""Byte-level BPE from a GGUF vocabulary, run by the ``tokenizers`` library."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import Any

import msgspec
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.normalizers import NFC

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.tokenizer import byte_level
from pi2rt.tokenizer.greedy_cuts import greedy_pieces
from pi2rt.tokenizer.marked_text import Runs
from pi2rt.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from pi2rt.tokenizer.special_splitter import SpecialSplitter
from pi2rt.tokenizer.text_cuts import SLACK, Split, SureBorders, starter
from pi2rt.tokenizer.vocabulary import PREFIX, TokenKind, Vocabulary

WINDOW = 2048  # characters encoded at once: two milliseconds
_CACHED_WORDS = 1 << 12  # about a megabyte

_SPELLING = dict(enumerate(byte_level.CHARACTERS))

_log = logging.getLogger(__name__)

MERGES_AT_ONCE = 1024
"""Merges that are strings and lists at a time: they would leave the heap in pieces that are not given back."""


class ByteBpe:
    """Encodes text as its vocabulary says; special tokens per call.

    ``window``: characters encoded at once, about. ``dropped``, ``most_bytes``: see ``Encoder``.

    Raises:
        ModelFormatError: a merge joins what are not tokens, or makes what is not one.
        UnsupportedModelError: the name of the split is unknown.
    """

    def __init__(self, vocabulary: Vocabulary, window: int = WINDOW) -> None:
        self.pre = pre_tokenizer_of(vocabulary)
        user_defined = dict(vocabulary.of_kind(TokenKind.USER_DEFINED))
        control = dict(vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN))
        control |= {vocabulary.tokens[id_]: id_ for id_ in vocabulary.end_of_turn}
        self._splitter = SpecialSplitter(user_defined, control)
        # those that merges make of any text are normal tokens, whatever they mean
        control = {
            text: id_
            for text, id_ in self._splitter.control.items()
            if vocabulary.kinds[id_] != TokenKind.NORMAL
        }
        self._engine = _engine(vocabulary, self.pre, control)
        # `tokenizers` bounds neither the time nor the stack of its regular expressions; these are ours, and
        # linear
        self._engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.pre.patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        if self.pre.nfc:
            self._engine.normalizer = NFC()
        model: Any = self._engine.model
        model._resize_cache(_CACHED_WORDS)
        self.window, self._least = window, max(window, 4 * SLACK)
        self._borders = SureBorders(self.pre.patterns)
        self._split = Split(self.pre.patterns, self._piece_ends)
        self._words = _Words(Tokenizer(model), max(map(len, vocabulary.tokens), default=1))
        self.dropped = bytes(b for b, text in _SPELLING.items() if model.token_to_id(text) is None)
        # at its worst, composing makes one byte of three
        added = (len(text.encode()) for text in (*user_defined, *self._splitter.control))
        longest = max((self._words.longest * (3 if self.pre.nfc else 1), *added))
        self.most_bytes = 0 if any(0x80 <= byte < 0xC0 for byte in self.dropped) else longest

    def pieces(self, text: str, trusted: Runs) -> Iterator[list[int]]:
        """Ids of a text, some at a time, each after a bounded part of the work."""
        for span in self._splitter.split(text, trusted):
            if span is None:
                yield []
            elif span[2] is not None:
                yield [span[2]]
            else:
                yield from self._text_pieces(text, span[0], span[1])

    def _text_pieces(self, text: str, start: int, end: int) -> Iterator[list[int]]:
        while end - start > self.window:
            cut = self._borders.last(text, start, start + self.window)
            if cut:
                yield self._encode(text[start:cut])
                start = cut
                continue
            cut = yield from self._next_border(text, start + self.window, end)
            yield from self._stretch(text[start:cut])
            start = cut
        if start < end:
            yield self._encode(text[start:end])

    def _next_border(self, text: str, start: int, end: int) -> Generator[list[int], None, int]:
        while start < end:
            cut = self._borders.next(text, start, min(end, start + self.window))
            if cut:
                return cut
            yield []
            start += self.window
        return end

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_before(self, text: str, border: int) -> list[int]:
        """Of ``text[:border]``, as it is where the rest follows: white space at its end asks for that."""
        encoding = self._engine.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids[: bisect_right(encoding.offsets, border, key=itemgetter(1))]

    def _stretch(self, text: str) -> Iterator[list[int]]:
        """Of text between sure borders."""
        if self.pre.nfc and not text.isascii():
            normal = yield from self._normalised(text)
            text = "".join(normal)
        start, window = 0, self._least
        while len(text) - start > window:
            part = text[start : start + window]
            borders = self._split.ends(part)
            end = self._split.last_final(borders, part)
            if end:
                yield self._encode_before(part, end)
            elif borders[0] >= window - SLACK and (
                end := (yield from self._split.word_end(text, start, window))
            ):
                data = text[start:end].encode().translate(None, self.dropped)
                yield from greedy_pieces(self._words, partial(_spelled, data), len(data), 2 * self.window)
                end -= start
            if end:
                start, window = start + end, self._least
            else:  # what follows decides
                window *= 2
                yield []
        if start < len(text):
            yield self._encode(text[start:])

    def _normalised(self, text: str) -> Generator[list[int], None, list[str]]:
        """Parts of the text in its normal form."""
        parts, start = [], 0
        while start < len(text):
            end = starter(text, min(len(text), start + self.window), len(text))
            parts.append(self._engine.normalizer.normalize_str(text[start:end]))
            yield []
            start = end
        return parts

    def _piece_ends(self, text: str) -> list[int]:
        return [end for _, (_, end) in self._engine.pre_tokenizer.pre_tokenize_str(text)]


class _Words:
    """Encodes what the split has left as one, in the spelling of the vocabulary."""

    def __init__(self, engine: Tokenizer, longest: int) -> None:
        self._engine, self.longest = engine, longest

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self._engine.encode(text, add_special_tokens=False).ids
        return ids

    def ends(self, text: str) -> list[int]:
        return [end for _, end in self._engine.encode(text, add_special_tokens=False).offsets]


def _spelled(data: bytes, start: int, end: int) -> str:
    return data[start:end].decode("latin-1").translate(_SPELLING)


def pre_tokenizer_of(vocabulary: Vocabulary) -> PreTokenizer:
    """The split of a vocabulary's family.

    Raises:
        UnsupportedModelError: its name is unknown.
    """
    if vocabulary.pre is None:
        _log.warning(
            "%s: no %spre; text is split as converters did before they wrote it, which may not be how this "
            "model was trained. Convert the model again for correct tokens.",
            vocabulary.path,
            PREFIX,
        )
        return PRE_TOKENIZERS["default"]
    pre = PRE_TOKENIZERS.get(vocabulary.pre)
    if pre is None:
        raise UnsupportedModelError(
            vocabulary.path,
            PREFIX + "pre",
            f"is {vocabulary.pre[:80]!r}, a way to split text that pi2rt does not know, and a wrong one "
            f"would change tokens silently",
        )
    return pre


def _engine(vocabulary: Vocabulary, pre: PreTokenizer, control: Mapping[str, int]) -> Tokenizer:
    """By way of JSON, because it needs few Python objects: made from lists, of SmolLM2's 48,900 merges, it leaves 3 MiB
    of the heap in use, and 7 MiB more once that has been done a few times.

    Args:
        control: tokens that no text becomes.
    """
    merges = vocabulary.merges
    for index, merge in enumerate(merges):
        if merge.count(" ") != 1:
            raise vocabulary.error("merges", f"entry {index} is {merge[:80]!r}, not two tokens and a space")
    ids: Mapping[str, int] = vocabulary.ids
    if pre.ignore_merges:
        # or a word of a user's text that is spelled like a control token would become it
        ids = {text: id_ for text, id_ in ids.items() if control.get(text) != id_}
    if control:
        merges = [merge for merge in merges if merge.replace(" ", "") not in control]
    parts = range(0, len(merges), MERGES_AT_ONCE)
    # lists of two tokens: of strings, those that begin with "#version" would be skipped
    lists = ([merge.split(" ") for merge in merges[first : first + MERGES_AT_ONCE]] for first in parts)
    pairs = msgspec.Raw(b"[" + b",".join(msgspec.json.encode(each)[1:-1] for each in lists) + b"]")
    model = {"type": "BPE", "ignore_merges": pre.ignore_merges, "vocab": ids, "merges": pairs}
    try:
        return Tokenizer.from_buffer(
            msgspec.json.encode({"version": "1.0", "added_tokens": [], "model": model})
        )
    except Exception as error:  # the library's errors have no type of their own
        raise _explain(vocabulary, ids, error) from error


def _explain(vocabulary: Vocabulary, ids: Mapping[str, int], error: Exception) -> ModelFormatError:
    for index, merge in enumerate(vocabulary.merges):
        left, right = merge.split(" ")
        for token in (left, right, left + right):
            if token not in ids:
                return vocabulary.error(
                    "merges", f"entry {index}, {left[:80]!r} + {right[:80]!r}: {token[:80]!r} is not a token"
                )
    return vocabulary.error("merges", f"are refused: {error}")
