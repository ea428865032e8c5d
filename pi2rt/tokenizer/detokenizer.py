"""Token ids to text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Callable

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns a stream of token ids into text. What ``push`` and then ``flush`` return, joined, is what
    ``decode`` returns for all ids at once; bytes that are not UTF-8 become U+FFFD.

    Args:
        piece: the bytes of a token, empty for those to leave out.
        strip_space: whether one space at the very beginning is the vocabulary's own and no text.
    """

    __slots__ = ("_decode", "_decoder", "_piece", "_strip_space")

    def __init__(self, piece: Callable[[int], bytes], strip_space: bool) -> None:
        self._piece = piece
        self._strip_space = strip_space
        self._decoder = _Utf8Decoder("replace")
        self._decode = self._decoder.decode

    def push(self, id_: int) -> str:
        """The text that this token completes; it may be empty, and the rest of a character may be held back.

        Raises:
            RequestError: the vocabulary has no such id.
        """
        piece = self._piece(id_)
        if self._strip_space and piece:
            self._strip_space = False
            piece = piece.removeprefix(b" ")
        return self._decode(piece)

    def flush(self) -> str:
        """The end: bytes still held back, as U+FFFD. The next ``push`` begins where this text ends."""
        text = self._decode(b"", True)
        self._decoder.reset()
        return text
