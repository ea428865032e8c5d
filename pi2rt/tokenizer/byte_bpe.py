"""Byte-level BPE from a GGUF vocabulary, run by the ``tokenizers`` library."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.tokenizer.marked_text import Runs
from pi2rt.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from pi2rt.tokenizer.special_splitter import SpecialSplitter
from pi2rt.tokenizer.vocabulary import PREFIX, TokenKind, Vocabulary

_log = logging.getLogger(__name__)

MERGES_AT_ONCE = 1024
"""Merges that are strings and lists at a time: they would leave the heap in pieces that are not given back."""


class ByteBpe:
    """Encodes text as its vocabulary says; special tokens per call.

    Raises:
        ModelFormatError: a merge joins what are not tokens, or makes what is not one.
        UnsupportedModelError: the name of the split is unknown.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
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
        self._engine.pre_tokenizer = Sequence(
            [Split(Regex(pattern), "isolated") for pattern in self.pre.patterns]
            + [ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        if self.pre.nfc:
            self._engine.normalizer = NFC()

    def encode(self, text: str, trusted: Runs) -> list[int]:
        ids: list[int] = []
        for piece in self._splitter.split(text, trusted):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._engine.encode(piece, add_special_tokens=False).ids
        return ids


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
