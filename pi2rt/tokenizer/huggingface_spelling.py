"""How the decoder of a tokenizer.json turns tokens into bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders
from tokenizers import Tokenizer as Engine

from pi2rt._errors import UnsupportedModelError
from pi2rt.tokenizer import byte_level


class HuggingFaceSpelling:
    """The bytes of each token, by the steps of the file's decoder.

    Added tokens go through the same steps as others, as in ``tokenizers``: ``U+2581`` in one is a space where the
    decoder replaces it. Control tokens spell their names.

    Args:
        path: the tokenizer.json, for messages.
        engine: its tokenizer.

    Raises:
        UnsupportedModelError: the decoder has neither byte-level spelling nor SentencePiece's.
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self._engine = engine
        self._added = engine.get_added_tokens_decoder()
        self._size = max(engine.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        steps = _steps(engine)
        kinds = {step.get("type") for step in steps}
        if not kinds & {"ByteLevel", "Metaspace", "Replace", "ByteFallback"}:
            raise UnsupportedModelError(
                path,
                "decoder",
                f"is {sorted(map(str, kinds))}; pi2rt has byte-level BPE and SentencePiece's spelling",
            )
        self._is_byte_level = "ByteLevel" in kinds
        self._has_bytes = "ByteFallback" in kinds
        self._replacements = [replace for step in steps if (replace := _replacement(step)) is not None]
        self.strips_space = any(map(_strips_space, steps))  # of the whole text, one at its beginning

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of a token; none for an id that no token has."""
        token = self._engine.id_to_token(id_) if id_ < self._size else None
        if token is None:
            return b""
        added = self._added.get(id_)
        if added is not None and added.special:
            return bytes(token.encode())
        byte = byte_level.hexadecimal_byte(token) if self._has_bytes else None
        if byte is not None:
            return byte
        for replace in self._replacements:
            token = replace(token)
        if not self._is_byte_level:
            return bytes(token.encode())
        data = byte_level.token_bytes(token)
        # "caf\u00e9" is in the alphabet of bytes: an added token is found in text as it stands, and is that text unless
        # it spells one
        return data if added is None or _is_text(data) else bytes(token.encode())


def _steps(engine: Engine) -> list[dict[str, Any]]:
    """The decoder's parts, in order."""
    decoder = engine.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state.get("type") == "Sequence" else [state]


def _replacement(step: Mapping[str, Any]) -> Callable[[str], str] | None:
    """What a step replaces in each token."""
    if step.get("type") == "Metaspace":
        symbol = step.get("replacement", byte_level.SPACE)
        return lambda token: token.replace(symbol, " ")
    if step.get("type") != "Replace":
        return None
    pattern, content = step["pattern"], step["content"]
    if "String" in pattern:
        text = pattern["String"]
        return lambda token: token.replace(text, content)
    decoder = decoders.Replace(Regex(pattern["Regex"]), content)
    return lambda token: str(decoder.decode([token]))


def _strips_space(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "Metaspace":
        return bool(step.get("prepend_scheme", "always") != "never")
    return bool(step.get("type") == "Strip" and step.get("content") == " " and step.get("start"))


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
