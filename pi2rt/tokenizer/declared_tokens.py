"""The tokens that the files beside tokenizer.json declare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pi2rt._errors import ModelFormatError
from pi2rt.tokenizer.vocabulary import MAX_TOKENS

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"

_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class DeclaredToken:
    token: AddedToken
    source: Path  # the file that says so


@dataclass(frozen=True, slots=True)
class DeclaredTokens:
    """``names``: the text of a special token by the name that templates use ("pad_token"). ``others``: special tokens
    without a name. ``added``: tokens by id."""

    names: Mapping[str, str]
    others: tuple[str, ...]
    added: Mapping[int, DeclaredToken]


def read_declared_tokens(
    directory: Path, config: Mapping[str, Any], special_map: Mapping[str, Any], added: Mapping[str, Any]
) -> DeclaredTokens:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say, with the precedence of
    Transformers 5.24: where tokenizer_config.json has ``added_tokens_decoder`` it says all, and the other two only add
    to it; where it has none, special_tokens_map.json overrules it.

    Args:
        directory: where the files are, for messages.
        config, special_map, added: their content.

    Raises:
        ModelFormatError: a token or its id is malformed.
    """
    decoder = config.get("added_tokens_decoder")
    sources = (config, special_map) if decoder is None else (special_map, config)
    names: dict[str, str] = {}
    others: list[str] = []
    for source in sources:
        names |= _names(source)
        for key in _LISTS:
            value = source.get(key)
            if isinstance(value, list):
                others += filter(None, map(_text, value))
            elif isinstance(value, dict):
                names |= _names(value)
    special = {*names.values(), *others}
    tokens = {
        _id(directory / ADDED, f"{text!r}", id_): DeclaredToken(
            AddedToken(text, special=text in special, normalized=text not in special), directory / ADDED
        )
        for text, id_ in added.items()
        if text
    }
    tokens |= _added_decoder(directory / CONFIG, {} if decoder is None else decoder)
    return DeclaredTokens(names, tuple(dict.fromkeys(others)), tokens)


def _names(source: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: text
        for key, value in source.items()
        if key.endswith("_token") and (text := _text(value)) is not None
    }


def _text(value: object) -> str | None:
    """A token as these files have it: plain, or an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _added_decoder(path: Path, decoder: object) -> Iterator[tuple[int, DeclaredToken]]:
    if not isinstance(decoder, dict):
        raise ModelFormatError(path, "added_tokens_decoder", "is not an object")
    for key, value in decoder.items():
        field = f"added_tokens_decoder[{key[:20]!r}]"
        text = _text(value)
        if text is None or not isinstance(value, Mapping):
            raise ModelFormatError(path, field, "is not an object with a 'content' that is a string")
        flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
        id_ = _id(path, field, int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key)
        yield id_, DeclaredToken(AddedToken(text, **flags), path)


def _id(path: Path, field: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < MAX_TOKENS:
        raise ModelFormatError(
            path, field, f"has the id {str(value)[:20]!r}, not one from 0 to {MAX_TOKENS - 1}"
        )
    return value
