"""The vocabulary of llama2.c's stories260K, from ``shared/data``: 512 tokens of SentencePiece's BPE."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from pi2rt.tokenizer.byte_level import SPACE
from pi2rt.tokenizer.vocabulary import TokenKind
from tests.tokenizer.files import file

PATH = Path(__file__).parents[2].parent / "shared" / "data" / "tok512.bin"


def read_tok512() -> list[tuple[str, float]]:
    """Tokens and scores. Skips the test where the file is not there."""
    if not PATH.is_file():
        pytest.skip("tok512.bin is not there (looked in ../shared/data)")
    data = PATH.read_bytes()
    entries, at = [], 4  # the first number is the longest token's length
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        entries.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    return entries


def tok512_file(**keys: object) -> SimpleNamespace:
    """As a GGUF converter would write it."""
    entries = read_tok512()
    specials = {
        0: ("<unk>", TokenKind.UNKNOWN),
        1: ("<s>", TokenKind.CONTROL),
        2: ("</s>", TokenKind.CONTROL),
    }
    tokens, kinds = [], []
    for id_, (text, _) in enumerate(entries):
        kind = TokenKind.BYTE if 3 <= id_ < 259 else TokenKind.NORMAL
        text, kind = specials.get(id_, (text.replace(" ", SPACE), kind))
        tokens.append(text)
        kinds.append(int(kind))
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [score for _, score in entries],
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return file(metadata | keys)
