"""Text to token ids and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

from pi2rt._errors import RequestError
from pi2rt.tokenizer.chat_template import ChatTemplate
from pi2rt.tokenizer.detokenizer import Detokenizer
from pi2rt.tokenizer.marked_text import RenderedChat, Runs

_log = logging.getLogger(__name__)

_CHECKED = 1 << 18  # characters at once


class Encoder(Protocol):
    """What turns text into ids, without the tokens a file asks for at both ends. Called from several
    threads.

    ``dropped``: bytes that the vocabulary lacks, and that become no token. ``most_bytes``: of text in UTF-8 without
    these, what one token stands for at most; 0 where nothing is known.
    """

    @property
    def dropped(self) -> bytes: ...

    @property
    def most_bytes(self) -> int: ...

    def pieces(self, text: str, trusted: Runs) -> Iterator[list[int]]:
        """The ids of a text, which joined are the same however the work is divided: each step does a few milliseconds
        of it and takes little memory. Control tokens are recognised inside the ``trusted`` ranges, and nowhere else."""
        ...


class Tokenizer:
    """The vocabulary of one model. Made by ``load_tokenizer``; safe to use from several threads.

    Args:
        encoder: turns text into ids.
        spell: the bytes of a token; called once for each. Nothing for an id that no token has.
        vocab_size: ids are below it; the rows of the model's embedding where they are more than the tokens.
        special_ids: control and unknown tokens.
        bos_id: the token a text begins with, if the vocabulary has one.
        eos_ids: tokens that end a generation.
        prefix_ids, suffix_ids: what ``add_special`` puts at both ends.
        strip_space: whether encoding puts a space before text, for decoding to take away.
        chat_template: makes the chat template at its first use, if there is one; a bad one harms nobody
            before.
    """

    def __init__(
        self,
        encoder: Encoder,
        spell: Callable[[int], bytes],
        *,
        vocab_size: int,
        special_ids: frozenset[int],
        bos_id: int | None,
        eos_ids: frozenset[int],
        prefix_ids: Sequence[int],
        suffix_ids: Sequence[int],
        strip_space: bool,
        chat_template: Callable[[], ChatTemplate | None],
    ) -> None:
        self.vocab_size, self.bos_id, self.eos_ids = vocab_size, bos_id, eos_ids
        self._encoder, self._spell = encoder, spell
        self._special_ids = special_ids
        self._prefix_ids, self._suffix_ids = tuple(prefix_ids), tuple(suffix_ids)
        self._strip_space = strip_space
        self._make_chat_template = chat_template
        self._warned = False  # of a doubled token at the beginning
        self._pieces: list[bytes | None] = [None] * vocab_size
        self._shown: list[bytes | None] = [None] * vocab_size

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template.

        Raises:
            TemplateError: there is one, and it is invalid or too large.
        """
        return self._make_chat_template()

    @property
    def has_compiled_template(self) -> bool:
        """Whether ``chat_template`` is there at once."""
        return "chat_template" in self.__dict__

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; a rendered chat wants ``parse_special=True, add_special=False``, since its
                template wrote the control tokens, the one at the beginning too.
            parse_special: whether text that is spelled like a control token becomes that token. Of what
                ``ChatTemplate.render`` returns, only what the template wrote: the same characters in a message stay
                text. Of a plain string, all of it; so never for text from users, who could end their turn and
                begin another's.
            add_special: whether to add the tokens at the beginning and end that the model's file asks for.

        Raises:
            RequestError: the text has surrogates, so it cannot be written as UTF-8.
        """
        ids: list[int] = []
        for piece in self.encode_pieces(text, parse_special=parse_special, add_special=add_special):
            ids += piece
        return ids

    def encode_pieces(
        self, text: str, *, parse_special: bool = False, add_special: bool = True
    ) -> Iterator[list[int]]:
        """``encode`` in steps of a few milliseconds: the ids that each step adds, which may be none. Arguments and
        errors as for ``encode``."""
        yield from _check_text(text)
        if add_special:
            yield [*self._prefix_ids]
        trusted: Runs = ()
        if parse_special and text:
            trusted = text.trusted if isinstance(text, RenderedChat) else ((0, len(text)),)
        begun = not add_special or self.bos_id not in self._prefix_ids
        for ids in self._encoder.pieces(str(text), trusted):
            if ids and not begun:
                begun = True
                if ids[0] == self.bos_id:
                    self._warn_of_two()
            yield ids
        if add_special:
            yield [*self._suffix_ids]

    @property
    def most_bytes(self) -> int:
        """Of text in UTF-8, what one token stands for at most; 0 where nothing is known. Bytes that become no token,
        since the vocabulary lacks them, do not count."""
        return self._encoder.most_bytes

    def least_tokens(self, text: str | bytes, enough: int | None = None) -> int:
        """A lower bound of the tokens of a text, or of its UTF-8, or of a part: found without encoding it.

        Args:
            text: any.
            enough: not to count on from here.
        """
        most, dropped = self._encoder.most_bytes, self._encoder.dropped
        if not most:
            return 0
        size = 0
        for start in range(0, len(text), _CHECKED):
            part = text[start : start + _CHECKED]
            if isinstance(part, bytes):
                size += len(part) - sum(map(part.count, dropped))
            else:  # of every other character at least one byte is left
                size += len(part) - sum(part.count(chr(byte)) for byte in dropped if byte < 0x80)
            if enough is not None and size >= enough * most:
                break
        return -(-size // most)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: whether to leave out control tokens.
            continuation: whether other text stands before this one, so that a space at its beginning is one.

        Raises:
            RequestError: the vocabulary has no such id.
        """
        data = b"".join(map(self._shown_bytes if skip_special else self.token_bytes, ids))
        if self._strip_space and not continuation:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def detokenizer(self, *, skip_special: bool = True, continuation: bool = False) -> Detokenizer:
        """``decode`` for ids that come one by one."""
        piece = self._shown_bytes if skip_special else self.token_bytes
        return Detokenizer(piece, self._strip_space and not continuation)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes a token stands for; a control token's are its name.

        Raises:
            RequestError: the vocabulary has no such id.
        """
        self._check(id_)
        piece = self._pieces[id_]
        if piece is None:
            piece = self._pieces[id_] = self._spell(id_)
        return piece

    def is_special(self, id_: int) -> bool:
        """Whether a token is no text: a control token, the unknown one, or an id that spells nothing.

        Raises:
            RequestError: the vocabulary has no such id.
        """
        return not self.token_bytes(id_) or id_ in self._special_ids

    def _warn_of_two(self) -> None:
        """Once: both may be meant, so nothing is taken away."""
        if not self._warned and self.bos_id is not None:
            self._warned = True
            name = self.token_bytes(self.bos_id).decode(errors="replace")
            _log.warning(
                "the text begins with %s, and the model's file asks for one before every text, so there are two now. "
                "Leave it out of the text, or encode with add_special=False.",
                name,
            )

    def _shown_bytes(self, id_: int) -> bytes:
        if 0 <= id_ < self.vocab_size:
            piece = self._shown[id_]
            if piece is not None:
                return piece
        piece = b"" if self.is_special(id_) else self.token_bytes(id_)
        self._shown[id_] = piece
        return piece

    def _check(self, id_: int) -> None:
        if not 0 <= id_ < self.vocab_size:
            raise RequestError(f"token id {id_} is outside the vocabulary of {self.vocab_size} tokens")


def _check_text(text: str) -> Iterator[list[int]]:
    """Raises:
    RequestError: it cannot be written as UTF-8.
    """
    if text.isascii():
        return
    for start in range(0, len(text), _CHECKED):
        try:
            text[start : start + _CHECKED].encode()
        except UnicodeEncodeError as error:
            at = start + error.start
            raise RequestError(
                f"text has the lone surrogate U+{ord(text[at]):04X} at character {at} and is not valid Unicode; decode "
                f"its bytes with errors='replace'"
            ) from None
        yield []
