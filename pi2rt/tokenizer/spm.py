"""SentencePiece's BPE from a GGUF vocabulary: neighbours merge, best score first.

Kudo and Richardson, 2018, "SentencePiece: A simple and language independent subword tokenizer"; the reference
is bpe_model.cc of google/sentencepiece. Of equal scores the leftmost pair merges first, which ranked merge
lists cannot say: therefore an encoder of our own, and not the one of ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise

import numpy as np

from pi2rt.tokenizer.byte_level import HEXADECIMAL_NAMES, SPACE
from pi2rt.tokenizer.greedy_cuts import greedy_pieces
from pi2rt.tokenizer.marked_text import Runs
from pi2rt.tokenizer.neighbours import Neighbours
from pi2rt.tokenizer.special_splitter import SpecialSplitter, is_control_name
from pi2rt.tokenizer.vocabulary import TokenKind, Vocabulary

WINDOW = 1024  # a few milliseconds of merging

_ADDED_SCORE = -1000.0

_CACHED_CHUNKS = 1 << 12  # about a megabyte
_CACHED_CHARACTERS = 32  # of a chunk; longer ones hardly come twice


# what a vocabulary holds beside pieces of text; a user who types "<s>" gets those three characters
_NEVER_TEXT = (TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.BYTE)


class Spm:
    """Encodes text as its vocabulary says; special tokens per call.

    ``window``: characters encoded at once, about. ``longest``: characters of the longest token that merging makes.
    ``dropped``, ``most_bytes``: see ``Encoder``.

    A character that is no token becomes the tokens of its UTF-8 bytes, or the unknown token where the
    vocabulary has no byte tokens.

    Raises:
        ModelFormatError: some of the byte tokens are missing, or all of them and the unknown token too.
    """

    dropped = b""

    def __init__(self, vocabulary: Vocabulary, window: int = WINDOW) -> None:
        self.window = window
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
        self.longest = max(map(len, self._ranks), default=1)
        self.most_bytes = max(4, *(len(text.encode(errors="surrogatepass")) for text in vocabulary.tokens))
        self._cuts = Neighbours(self._ranks).cuts  # makes words of most text, which then repeat
        self._bytes = _byte_tokens(vocabulary)
        self._unknown = vocabulary.unk_id
        if self._bytes is None and self._unknown is None:
            raise vocabulary.error(
                "tokens", "has neither byte tokens (<0x00> to <0xFF>) nor an unknown token"
            )
        self._add_space_prefix = vocabulary.add_space_prefix is not False
        self._cache: dict[str, list[int]] = {}

    def pieces(self, text: str, trusted: Runs) -> Iterator[list[int]]:
        """Ids of a text, some at a time, each after a bounded part of the work."""
        for span in self._splitter.split(text, trusted):
            if span is None:
                yield []
            elif span[2] is not None:
                yield [span[2]]
            else:
                yield from self._run_pieces(text[span[0] : span[1]])

    def _run_pieces(self, text: str) -> Iterator[list[int]]:
        """Text between control tokens: one space before all of it, then its user-defined tokens, then the rest."""
        if self._add_space_prefix:
            text = " " + text
        for span in self._own.split(text, ()):
            if span is None:
                yield []
            elif span[2] is not None:
                yield [span[2]]
            else:
                yield from self._text_pieces(text, span[0], span[1])

    def _text_pieces(self, text: str, start: int, end: int) -> Iterator[list[int]]:
        rest = ""  # of a chunk that has begun
        while True:
            stop = min(start + self.window, end)
            part = rest + text[start:stop].replace(" ", SPACE)
            start = stop
            cuts = self._cuts(part)
            if start < end:
                cuts.pop()  # the last chunk may go on
            ids: list[int] = []
            for chunk in pairwise(cuts):
                ids += self._chunk(part[slice(*chunk)])
            yield ids
            if start == end:
                return
            rest = part[cuts[-1] :]
            if len(rest) >= self.window:
                stop = yield from self._chunk_end(text, start, end)
                yield from self._long_chunk(rest, text, start, stop)
                if stop == end:
                    return
                rest, start = "", stop

    def _chunk(self, chunk: str) -> list[int]:
        known = self._cache.get(chunk)
        if known is None:
            known = self.ids(chunk)
            if len(chunk) <= _CACHED_CHARACTERS:
                if len(self._cache) >= _CACHED_CHUNKS:
                    self._cache = {}
                self._cache[chunk] = known
        return known

    def _chunk_end(self, text: str, start: int, end: int) -> Generator[list[int], None, int]:
        """Where the chunk ends that ``text[start - 1]`` belongs to."""
        while start < end:
            stop = min(start + self.window, end)
            cuts = self._cuts(text[start - 1 : stop].replace(" ", SPACE))
            if len(cuts) > 2:
                return start - 1 + cuts[1]
            yield []
            start = stop
        return end

    def _long_chunk(self, rest: str, text: str, start: int, end: int) -> Iterator[list[int]]:
        """Of ``rest + text[start:end]``, a chunk that is merged piece by piece."""
        before = len(rest)

        def part(first: int, last: int) -> str:
            own = text[start + max(0, first - before) : start + max(0, last - before)]
            return rest[first:last] + own.replace(" ", SPACE)

        return greedy_pieces(self, part, before + end - start, self.window)

    def ids(self, text: str) -> list[int]:
        """Token ids of a chunk, in O(n log n)."""
        ids: list[int] = []
        for start, end in pairwise((0, *self.ends(text))):
            symbol = text[start:end]
            id_ = self._ids.get(symbol)
            if id_ is not None:
                ids.append(id_)
            elif self._bytes is not None:  # only a single character can be no token
                ids += [self._bytes[byte] for byte in symbol.encode()]
            elif self._unknown is not None:
                ids.append(self._unknown)
        return ids

    def ends(self, text: str) -> list[int]:
        """Where each symbol ends that is left when no two neighbours merge."""
        n = len(text)
        ranks, longest, base = self._ranks, self.longest, n + 1
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
        ends, start = [], 0
        while start < n:
            start = end[start]
            ends.append(start)
        return ends


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


def _byte_tokens(vocabulary: Vocabulary) -> list[int] | None:
    """The token of each byte, or None where there are no byte tokens."""
    found = dict(vocabulary.of_kind(TokenKind.BYTE))
    tokens = [found[name] for name in HEXADECIMAL_NAMES if name in found]
    if tokens and len(tokens) < 256:
        missing = next(name for name in HEXADECIMAL_NAMES if name not in found)
        raise vocabulary.error("tokens", f"has {len(tokens)} of the 256 byte tokens; {missing} is missing")
    return tokens or None
