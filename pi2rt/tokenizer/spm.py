"""SentencePiece's BPE from a GGUF vocabulary: neighbours merge, best score first.

Kudo and Richardson, 2018, "SentencePiece: A simple and language independent subword tokenizer"; the reference
is bpe_model.cc of google/sentencepiece. Of equal scores the leftmost pair merges first, which ranked merge
lists cannot say: therefore an encoder of our own, and not the one of ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pi2rt.tokenizer.byte_level import HEXADECIMAL_NAMES, SPACE
from pi2rt.tokenizer.marked_text import Runs
from pi2rt.tokenizer.special_splitter import SpecialSplitter, is_control_name
from pi2rt.tokenizer.vocabulary import TokenKind, Vocabulary

_ADDED_SCORE = -1000.0

_CACHED_CHUNKS = 1 << 16
_CACHED_CHARACTERS = 32  # of a chunk; longer ones hardly come twice


# what a vocabulary holds beside pieces of text; a user who types "<s>" gets those three characters
_NEVER_TEXT = (TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.BYTE)


class Spm:
    """Encodes text as its vocabulary says; special tokens per call.

    A character that is no token becomes the tokens of its UTF-8 bytes, or the unknown token where the
    vocabulary has no byte tokens.

    Raises:
        ModelFormatError: some of the byte tokens are missing, or all of them and the unknown token too.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        scores = vocabulary.scores
        assert scores is not None
        own, added = _user_defined(vocabulary)
        control = dict(vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN))
        control |= {text: id_ for text, id_ in own.items() if is_control_name(text)}
        self._splitter = SpecialSplitter(added, control)
        self._own = SpecialSplitter({text: id_ for text, id_ in own.items() if text not in control}, {})
        never = set(np.flatnonzero(np.isin(vocabulary.kinds, _NEVER_TEXT)).tolist())
        never.update(self._splitter.control.values())
        self._ids = {text: id_ for text, id_ in vocabulary.ids.items() if id_ not in never}
        # scores as ranks: equal scores keep equal ranks, and a rank and two positions pack into one integer
        order = np.unique(-scores[list(self._ids.values())], return_inverse=True)[1]
        self._ranks = {
            text: rank for text, rank in zip(self._ids, order.tolist(), strict=True) if len(text) > 1
        }
        self._longest = max(map(len, self._ranks), default=0)
        self._pairs = _neighbours(self._ranks)
        self._bytes = _byte_tokens(vocabulary)
        self._unknown = vocabulary.unk_id
        if self._bytes is None and self._unknown is None:
            raise vocabulary.error(
                "tokens", "has neither byte tokens (<0x00> to <0xFF>) nor an unknown token"
            )
        self._add_space_prefix = vocabulary.add_space_prefix is not False
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str, trusted: Runs) -> list[int]:
        ids: list[int] = []
        for piece in self._splitter.split(text, trusted):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                self._encode_run(piece, ids)
        return ids

    def _encode_run(self, text: str, ids: list[int]) -> None:
        """Text between control tokens: one space before all of it, then its user-defined tokens, then the rest."""
        for piece in self._own.split(" " + text if self._add_space_prefix else text, ()):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                self._encode_text(piece.replace(" ", SPACE), ids)

    def _encode_text(self, text: str, ids: list[int]) -> None:
        cache = self._cache
        for start, end in pairwise(self._cuts(text)):
            chunk = text[start:end]
            known = cache.get(chunk)
            if known is None:
                known = self._merge(chunk)
                if len(chunk) <= _CACHED_CHARACTERS:
                    if len(cache) >= _CACHED_CHUNKS:
                        self._cache = cache = {}
                    cache[chunk] = known
            ids += known

    def _cuts(self, text: str) -> list[int]:
        """Ends of chunks that cannot merge with each other, 0 first: two characters that are neighbours in no
        token stay apart whatever merges around them. Makes words of most text, which then repeat."""
        pairs = _pairs(text)
        at = np.searchsorted(self._pairs, pairs)
        apart = self._pairs[np.minimum(at, self._pairs.size - 1)] != pairs
        return [0, *(np.flatnonzero(apart) + 1).tolist(), len(text)]

    def _merge(self, text: str) -> list[int]:
        """Token ids of a chunk, in O(n log n)."""
        n = len(text)
        ranks, longest, base = self._ranks, self._longest, n + 1
        # a symbol is text[i:end[i]]; end[i] is 0 where i is inside another symbol
        end = list(range(1, n + 1))
        previous = list(range(-1, n - 1))
        # a candidate is ((rank * base) + start) * base + end: the best score first, then the leftmost
        candidates = [
            (rank * base + i) * base + i + 2
            for i in range(n - 1)
            if (rank := ranks.get(text[i : i + 2])) is not None
        ]
        heapify(candidates)
        while candidates:
            candidate, stop = divmod(heappop(candidates), base)
            start = candidate % base
            middle = end[start]
            if middle == 0 or middle == n or end[middle] != stop:
                continue  # one of the two has merged with another since
            end[start], end[middle] = stop, 0
            before = previous[start]
            if before >= 0 and stop - before <= longest:
                rank = ranks.get(text[before:stop])
                if rank is not None:
                    heappush(candidates, (rank * base + before) * base + stop)
            if stop < n:
                previous[stop] = start
                after = end[stop]
                if after - start <= longest:
                    rank = ranks.get(text[start:after])
                    if rank is not None:
                        heappush(candidates, (rank * base + start) * base + after)
        ids: list[int] = []
        start = 0
        while start < n:
            symbol = text[start : end[start]]
            id_ = self._ids.get(symbol)
            if id_ is not None:
                ids.append(id_)
            elif self._bytes is not None:  # only a single character can be no token
                ids += [self._bytes[byte] for byte in symbol.encode()]
            elif self._unknown is not None:
                ids.append(self._unknown)
            start = end[start]
        return ids


def _user_defined(vocabulary: Vocabulary) -> tuple[dict[str, int], dict[str, int]]:
    """User-defined tokens, id by text: those of SentencePiece itself, and those that were added to it.

    SentencePiece finds its own in the text with the space before it, and begins nothing anew after one (checked with
    sentencepiece 0.2.3). It never saw the added ones, which converters of GGUF mark with a score of their own: as after
    control tokens, text begins anew after them, as in llama.cpp and in Transformers' ``legacy`` tokenizers.
    """
    assert vocabulary.scores is not None
    own: dict[str, int] = {}
    added: dict[str, int] = {}
    for text, id_ in vocabulary.of_kind(TokenKind.USER_DEFINED):
        group = added if vocabulary.scores[id_] == _ADDED_SCORE else own
        group[text.replace(SPACE, " ")] = id_
    return own, added


def _pairs(text: str) -> npt.NDArray[np.int64]:
    """Every two neighbouring characters as one number; int64 (len(text) - 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
    return codes[:-1] << 21 | codes[1:]


def _neighbours(pieces: Iterable[str]) -> npt.NDArray[np.int64]:
    """Every two characters that are neighbours in some piece, sorted; never empty."""
    joined = "\0\0".join(pieces)  # zeros make pairs of their own, which cost a needless chunk border at most
    return np.unique(np.append(_pairs(joined), 0)) if joined else np.zeros(1, np.int64)


def _byte_tokens(vocabulary: Vocabulary) -> list[int] | None:
    """The token of each byte, or None where there are no byte tokens."""
    found = dict(vocabulary.of_kind(TokenKind.BYTE))
    tokens = [found[name] for name in HEXADECIMAL_NAMES if name in found]
    if tokens and len(tokens) < 256:
        missing = next(name for name in HEXADECIMAL_NAMES if name not in found)
        raise vocabulary.error("tokens", f"has {len(tokens)} of the 256 byte tokens; {missing} is missing")
    return tokens or None
