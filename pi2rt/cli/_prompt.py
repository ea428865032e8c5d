"""The prompt of ``pi2rt run``: from the command line, a file or standard input, and no more of it than can be used."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pi2rt.tokenizer import Tokenizer

LARGEST = 64 << 20
"""Bytes of a prompt, whatever the context."""

_HEAD = 64 << 10
"""Bytes that are read before the model is opened: most prompts, whose mistakes are then told at once."""


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes | None: ...
    def close(self) -> None: ...


class PromptFile:
    """A prompt that may be long: the rest of it is read when it is known how much a context holds.

    Raises:
        RequestError: it cannot be read, or all of it is there already and it is no prompt.
    """

    def __init__(self, reader: _Reader, name: str, what: str) -> None:
        self._reader, self._name, self._what = reader, name, what
        self._data = bytearray()
        self._text = self._decoded() if self._read(_HEAD) else None

    def close(self) -> None:
        """Safe to call twice. Standard input stays open."""
        if self._reader is not _standard_input():
            self._reader.close()

    def text(self, tokenizer: Tokenizer, context: int, max_tokens: int | None) -> str:
        """All of it, without a byte order mark and a last newline. Blocks while a pipe has no data.

        Raises:
            ContextOverflowError: whatever it goes on with, it is too long for the context.
            RequestError: it is empty, not UTF-8, larger than 64 MiB, or cannot be read.
        """
        from pi2rt._errors import ContextOverflowError, RequestError

        if self._text is not None:
            return self._text
        wanted = 1 if max_tokens is None else max_tokens
        room = max(0, context - wanted)
        needed = (room + 1) * tokenizer.most_bytes or LARGEST + 1
        while not self._read(min(needed, LARGEST + 1)):
            least = tokenizer.least_tokens(bytes(self._data))
            if least > room:
                raise ContextOverflowError(least, wanted, context, at_least=True)
            if len(self._data) > LARGEST:
                raise RequestError(f"{self._what} is larger than {LARGEST} bytes")
            needed *= 2
        return self._decoded()

    def _read(self, size: int) -> bool:
        """Reads until there are so many bytes; whether it has ended before."""
        from pi2rt._errors import RequestError

        try:
            while len(self._data) < size:
                part = self._reader.read(min(size - len(self._data), 1 << 20))
                if not part:
                    return True
                self._data += part
        except OSError as error:
            raise RequestError(f"cannot read {self._name}: {error.strerror}") from error
        return False

    def _decoded(self) -> str:
        text = decode(self._data, self._what).removeprefix("\ufeff").removesuffix("\n")
        self._data = bytearray()
        return checked(text)


def read_prompt(options: argparse.Namespace) -> str | PromptFile | None:
    """The prompt; None for a chat.

    Raises:
        RequestError: it is empty or not UTF-8, or cannot be read.
    """
    from pi2rt._errors import RequestError

    if options.prompt is not None:
        # Python passes bytes that are not UTF-8 through as lone surrogates.
        return checked(decode(options.prompt.encode("utf-8", "surrogateescape"), "the prompt"))
    if options.file is None:
        if sys.stdin.isatty():
            return None
        return PromptFile(_standard_input(), "standard input", "the prompt on standard input")
    try:
        file = open(options.file, "rb", buffering=0)  # noqa: SIM115 - read after the model is opened
    except OSError as error:
        raise RequestError(f"cannot read {options.file}: {error.strerror}") from error
    try:
        return PromptFile(file, options.file, f"the prompt in {options.file}")
    except BaseException:
        file.close()
        raise


def _standard_input() -> _Reader:
    """Without the buffer, whose lock a thread that waits for a pipe would hold at the interpreter's exit."""
    reader: _Reader = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    return reader


def checked(text: str) -> str:
    """Raises:
    RequestError: it is empty.
    """
    from pi2rt._errors import RequestError

    if not text:
        raise RequestError("the prompt is empty")
    return text


def decode(data: bytes | bytearray, what: str) -> str:
    from pi2rt._errors import RequestError

    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
