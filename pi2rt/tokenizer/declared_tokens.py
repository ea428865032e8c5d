"""The tokens that the files beside tokenizer.json declare."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from pi2rt._errors import ModelFormatError
from pi2rt.tokenizer.end_tokens import END_OF_TURN, end_of_turn_ids
from pi2rt.tokenizer.vocabulary import MAX_TOKENS

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"

# the order in which Transformers adds those that no file has an id for
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeclaredToken:
    token: AddedToken
    source: Path  # the file that says so

    def overrules(self, other: AddedToken) -> bool:
        """Whether its flags differ from those in tokenizer.json, and count: only tokenizer_config.json has flags."""
        self.token.special = self.token.special or other.special
        return self.source.name == CONFIG and repr(self.token) != repr(other)


@dataclass(frozen=True, slots=True)
class DeclaredTokens:
    """``names``: the text of a special token by the name that templates use ("pad_token"). ``others``: special tokens
    without a name. ``added``: tokens by id."""

    names: Mapping[str, str]
    others: tuple[str, ...]
    added: Mapping[int, DeclaredToken]

    def add_to(self, engine: Engine, rows: int) -> None:
        """Adds the tokens that tokenizer.json lacks. Special tokens that no file has an id for get the next ones, as in
        Transformers, as long as the model has ``rows`` for them.

        Raises:
            ModelFormatError: a token has an id that it cannot get.
        """
        known = engine.get_added_tokens_decoder()
        wanted = {}
        for id_, declared in sorted(self.added.items()):
            text = declared.token.content
            there = engine.token_to_id(text)
            if there is not None and there != id_:
                _log.warning(
                    "%s: %r has the id %d, but tokenizer.json says %d, which is used",
                    declared.source,
                    text,
                    id_,
                    there,
                )
            elif there is None or id_ not in known or declared.overrules(known[id_]):
                wanted[id_] = (declared, engine.id_to_token(id_))
        engine.add_tokens([declared.token for declared, _ in wanted.values()])
        for id_, (declared, other) in wanted.items():
            text = declared.token.content
            got = engine.token_to_id(text)
            if got != id_:
                reason = f"{other[:80]!r} has it" if other else f"the next id after its tokens is {got}"
                raise ModelFormatError(
                    declared.source, f"{text[:80]!r}", f"has the id {id_}, but in tokenizer.json {reason}"
                )
        order = [self.names[name] for name in _NAMES if name in self.names]
        texts = dict.fromkeys((*order, *self.names.values(), *self.others))
        missing = [text for text in texts if engine.token_to_id(text) is None]
        free = max(0, rows - _next_id(engine))
        engine.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in missing[:free]]
        )

    def mark_special(self, engine: Engine) -> None:
        """Makes control tokens of those that are declared or named so, and of those that end a turn, which files also
        have as others. One that plain text gives stays text unless it is declared: a pad token may be "!"."""
        known = engine.get_added_tokens_decoder()
        spelled = {text: id_ for text in END_OF_TURN if (id_ := engine.token_to_id(text)) is not None}
        ends = end_of_turn_ids(spelled)
        found = {text for text, id_ in spelled.items() if id_ in ends}
        declared = {each.token.content for each in self.added.values() if each.token.special}
        special = []
        for text in sorted(declared | found | {*self.names.values(), *self.others}):
            id_ = engine.token_to_id(text)
            if id_ is None or (id_ in known and known[id_].special):
                continue
            if id_ not in known and text not in declared and _is_plain(engine, id_, text):
                continue
            token = known.get(id_) or AddedToken(text, normalized=False)
            token.special = True
            special.append(token)
        engine.add_special_tokens(special)


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
        if _is_unicode(text)
    }
    tokens |= _added_decoder(directory / CONFIG, {} if decoder is None else decoder)
    return DeclaredTokens(names, tuple(dict.fromkeys(others)), tokens)


def _next_id(engine: Engine) -> int:
    """The id that the next added token gets."""
    own: int = engine.get_vocab_size(with_added_tokens=False)
    return max(own, max(engine.get_added_tokens_decoder(), default=-1) + 1)


def _is_plain(engine: Engine, id_: int, text: str) -> bool:
    """Whether the token is found in text without being an added one."""
    try:
        return id_ in engine.encode(text, add_special_tokens=False).ids
    except Exception:  # the library's errors have no type of their own; encoding text says what is wrong
        return False


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
    return value if isinstance(value, str) and _is_unicode(value) else None


def _is_unicode(text: str) -> bool:
    """JSON can have lone surrogates, which no text has."""
    return bool(text) and not any("\ud800" <= character <= "\udfff" for character in text)


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
