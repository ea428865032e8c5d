"""What is known of a tokenizer.json: where texts may be cut, and how much text a token stands for at most."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE

from pi2rt.tokenizer import byte_level
from pi2rt.tokenizer.neighbours import PairBorders
from pi2rt.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from pi2rt.tokenizer.text_cuts import SureBorders

_COMPOSING = 3  # bytes of which the normal form C makes one, at its worst


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """``borders``: None where nothing is known. ``overlap``: characters before a border that the part behind it has to
    begin with, since the engine would put a space before it. ``dropped``, ``most_bytes``: see ``Encoder``."""

    borders: SureBorders | PairBorders | None = None
    dropped: bytes = b""
    most_bytes: int = 0
    overlap: int = 0


def read_facts(engine: Engine) -> EngineFacts:
    """Claims nothing that does not hold for all texts: anything unknown, in whatever part, and it knows nothing."""
    added = engine.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return EngineFacts()  # what stands beside such a token matters, or disappears in it
    model: Any = engine.model
    if not isinstance(model, BPE) or model.dropout:
        return EngineFacts()
    normalizers = list(_parts(_state(engine.normalizer), "normalizers"))
    splits = list(_parts(_state(engine.pre_tokenizer), "pretokenizers"))
    contents = [token.content for token in added]
    vocabulary = engine.get_vocab(with_added_tokens=False)
    longest = max(map(len, vocabulary), default=1)
    outside = max((len(content.encode()) for content in contents), default=1)
    patterns = _patterns(splits)
    if patterns is not None and all(part == {"type": "NFC"} for part in normalizers):
        borders = SureBorders(patterns)
        if any(borders.next(content, 0, len(content)) for content in contents):
            return EngineFacts()
        dropped = bytes(byte for byte, text in enumerate(byte_level.CHARACTERS) if text not in vocabulary)
        if model.unk_token is not None or any(0x80 <= byte < 0xC0 for byte in dropped):
            return EngineFacts(borders)
        return EngineFacts(borders, dropped, max(longest * (_COMPOSING if normalizers else 1), outside))
    space = _space(normalizers + splits)
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if (
        space
        and model.byte_fallback
        and all(name in vocabulary for name in names)
        and sum("<0x" in text for text in vocabulary) == len(names)  # bytes merge with nothing
    ):
        most = max(4, outside, *(len(text.encode()) for text in vocabulary))
        return EngineFacts(PairBorders(vocabulary, contents, space), b"", most, overlap=1)
    return EngineFacts()


def _state(part: Any) -> dict[str, Any]:
    state = {} if part is None else json.loads(part.__getstate__())
    return state if isinstance(state, dict) else {}


def _parts(state: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    if state.get("type") == "Sequence":
        for part in state.get(key, ()):
            yield from _parts(part, key)
    elif state:
        yield state


def _patterns(parts: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """The expressions of a byte-level pre-tokenizer that is one of a known family."""
    found: list[str] = []
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    for part in parts[:-1]:
        if part.get("type") == "Digits" and part.get("individual_digits"):
            found.append(r"\p{N}")
        elif part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            pattern = part.get("pattern", {}).get("Regex")
            if not isinstance(pattern, str):
                return None
            found.append(_canonical(pattern))
        else:
            return None
    if parts[-1].get("use_regex", True):
        found.append(PRE_TOKENIZERS["gpt-2"].patterns[0])
    return _known().get(tuple(found))


def _known() -> dict[tuple[str, ...], tuple[str, ...]]:
    families = {each.patterns for each in PRE_TOKENIZERS.values()}
    return {tuple(map(_canonical, patterns)): patterns for patterns in families}


def _canonical(pattern: str) -> str:
    return pattern.replace(r"[\p{L}]", r"\p{L}")


def _space(parts: list[dict[str, Any]]) -> str:
    """What stands for a space, where that is all that normalizers and pre-tokenizers do; "" where they do more."""
    found = ""
    for part in parts:
        kind, space = part.get("type"), found
        if kind == "Replace" and part.get("pattern") == {"String": " "}:
            space = part.get("content") or ""
        elif kind == "Metaspace":
            space = part.get("replacement") or ""
        elif kind not in ("Prepend", "Split") or (kind == "Split" and part.get("pattern") != {"String": " "}):
            return ""
        if len(space) > 1 or space != (found or space):
            return ""
        found = space
    return found
