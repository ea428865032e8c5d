"""How vocabularies spell bytes as characters: GPT-2's way, and SentencePiece's.

GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners") writes each of the 256
bytes as one printable character. SentencePiece writes text, with U+2581 for a space, and has ``<0x41>`` for a
byte.
"""

from __future__ import annotations

import re

SPACE = "\u2581"  # stands for a space inside SentencePiece's tokens
HEXADECIMAL_NAMES = tuple(
    f"<0x{byte:02X}>" for byte in range(256)
)  # of SentencePiece's byte tokens, in order

_HEXADECIMAL = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _spelling() -> tuple[str, ...]:
    """The character of every byte: itself where that is printable and not a space, otherwise the next from
    U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, unused = [], 0x100
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(unused))
            unused += 1
    return tuple(characters)


CHARACTERS = _spelling()
_BYTES = str.maketrans({character: chr(byte) for byte, character in enumerate(CHARACTERS)})
_ALPHABET = frozenset(CHARACTERS)


def token_bytes(token: str) -> bytes:
    """The bytes a token spells. One with a character outside the alphabet stands for its own text."""
    if _ALPHABET.issuperset(token):
        return token.translate(_BYTES).encode("latin-1")
    return token.encode(errors="surrogatepass")


def hexadecimal_byte(token: str) -> bytes | None:
    """The byte that ``<0x41>`` names, or None for any other token."""
    match = _HEXADECIMAL.fullmatch(token)
    return bytes.fromhex(match[1]) if match else None


def unescape_spaces(token: str) -> bytes:
    """The bytes of a token of SentencePiece's, with its spaces."""
    return token.replace(SPACE, " ").encode(errors="surrogatepass")
