"""Vocabularies as model files carry them, without a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from pi2rt.tokenizer.byte_level import CHARACTERS
from pi2rt.tokenizer.vocabulary import TokenKind


def file(metadata: dict[str, Any]) -> SimpleNamespace:
    """A model file with this metadata; keys without a dot are ``tokenizer.ggml.`` ones."""
    return changed(SimpleNamespace(path="test.gguf", metadata={}), metadata)


def changed(file: SimpleNamespace, metadata: Mapping[str, Any]) -> SimpleNamespace:
    """The file with other metadata; None takes a key out."""
    keys = {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    kept = {key: value for key, value in (file.metadata | keys).items() if value is not None}
    return SimpleNamespace(path=file.path, metadata=kept)


def chain(text: str) -> list[str]:
    """Merges that make one token of the whole text, byte by byte from the left."""
    characters = [CHARACTERS[byte] for byte in text.encode()]
    return [f"{''.join(characters[:n])} {characters[n]}" for n in range(1, len(characters))]


def byte_level_file(
    merges: Sequence[str] = (), *, control: Sequence[str] = (), user_defined: Sequence[str] = (), **keys: Any
) -> SimpleNamespace:
    """Byte-level BPE: the 256 bytes, what the merges make, control tokens, user-defined ones."""
    normal = list(dict.fromkeys([*CHARACTERS, *(merge.replace(" ", "") for merge in merges)]))
    kinds = (
        [TokenKind.NORMAL] * len(normal)
        + [TokenKind.CONTROL] * len(control)
        + [TokenKind.USER_DEFINED] * len(user_defined)
    )
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*normal, *control, *user_defined],
        "token_type": [int(kind) for kind in kinds],
        "merges": list(merges),
    }
    return file(metadata | keys)


def spm_file(
    pieces: Sequence[tuple[str, float]],
    *,
    control: Sequence[str] = (),
    user_defined: Sequence[str] = (),
    bytes_: bool = True,
    **keys: Any,
) -> SimpleNamespace:
    """SentencePiece: <unk>, <s>, </s>, the bytes, pieces with scores, control tokens, user-defined ones."""
    entries = [
        ("<unk>", 0.0, TokenKind.UNKNOWN),
        ("<s>", 0.0, TokenKind.CONTROL),
        ("</s>", 0.0, TokenKind.CONTROL),
    ]
    if bytes_:
        entries += [(f"<0x{byte:02X}>", 0.0, TokenKind.BYTE) for byte in range(256)]
    entries += [(piece, score, TokenKind.NORMAL) for piece, score in pieces]
    entries += [(piece, 0.0, TokenKind.CONTROL) for piece in control]
    entries += [(piece, 0.0, TokenKind.USER_DEFINED) for piece in user_defined]
    tokens, scores, kinds = (list(column) for column in zip(*entries, strict=True))
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [int(kind) for kind in kinds],
    }
    return file(metadata | keys)
