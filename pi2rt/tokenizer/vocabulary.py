"""The vocabulary a GGUF file carries, checked.

Keys and their meaning: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.tokenizer.byte_level import HEXADECIMAL_NAMES
from pi2rt.tokenizer.end_tokens import end_of_turn_ids

MAX_TOKENS = 1 << 20  # the largest vocabulary in use has 262,144 tokens
MAX_TOKEN_CHARACTERS = 1 << 12  # the longest tokens in use are runs of 1,024 spaces
MAX_TOTAL_CHARACTERS = 1 << 25
MAX_MERGES = 1 << 21

PREFIX = "tokenizer.ggml."

_NAMED = {  # what templates call a token, and the key of its id; nothing else uses these
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


class MetadataSource(Protocol):
    """What the tokenizer needs of a ``ModelFile``: where it is, for messages, and its metadata."""

    @property
    def path(self) -> object: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``, with its values."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4  # matched in any text before the model's own splitting
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id. ``kinds`` and ``scores`` are as long as ``tokens``; every special id is below that
    length.

    ``ids`` maps text to id and leaves out empty tokens (they match nothing); of tokens with the same text it
    has the last, as llama.cpp did while it still accepted such files.

    ``kinds`` are the file's, but for what names say: ``end_of_turn`` tokens are control tokens, unless merges make them
    of text; and the bytes of a SentencePiece vocabulary are byte tokens where all 256 are there. ``names`` has the
    texts of special tokens by the names that templates use.
    """

    path: object
    model: str  # "gpt2" or "llama"
    pre: str | None
    tokens: Sequence[str]
    kinds: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64] | None
    merges: Sequence[str]
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eot_id: int | None
    eom_id: int | None
    add_bos: bool | None  # None: the file does not say
    add_eos: bool
    add_space_prefix: bool | None
    end_of_turn: frozenset[int]
    names: Mapping[str, str]

    def of_kind(self, *kinds: TokenKind) -> Iterator[tuple[str, int]]:
        """(text, id) of the tokens of these kinds, in order of ids, without empty ones."""
        for id_ in np.flatnonzero(np.isin(self.kinds, kinds)).tolist():
            if self.tokens[id_]:
                yield self.tokens[id_], id_

    def error(self, field: str, problem: str) -> ModelFormatError:
        return ModelFormatError(self.path, PREFIX + field, problem)


def read_vocabulary(file: MetadataSource) -> Vocabulary:
    """Reads and checks the ``tokenizer.ggml.*`` keys.

    Raises:
        ModelFormatError: a key is missing, of the wrong type, or disagrees with another; the message names
            it.
        UnsupportedModelError: the kind of tokenizer is one pi2rt does not have.
    """
    return _Reader(file).read()


class _Reader:
    def __init__(self, file: MetadataSource) -> None:
        self._path, self._metadata = file.path, file.metadata

    def read(self) -> Vocabulary:
        model = self._string("model")
        if model is None:
            raise self._error("model", "is missing: the file has no tokenizer")
        if model not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                self._path,
                PREFIX + "model",
                f"is {model[:80]!r}; pi2rt has 'gpt2' (byte-level BPE) and 'llama' (SentencePiece)",
            )
        tokens = self._tokens()
        merges = self._merges() if model == "gpt2" else ()
        scores = self._scores(len(tokens)) if model == "llama" else None
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        ids.pop("", None)
        # SentencePiece files from before these keys existed rely on these ids, which are SentencePiece's own
        # defaults
        default_bos, default_eos = (1, 2) if model == "llama" and len(tokens) > 2 else (None, None)
        kinds = self._kinds(len(tokens), required=model == "llama")
        end_of_turn = end_of_turn_ids(ids)
        _mark_control(end_of_turn, tokens, merges, kinds)
        if model == "llama":
            _find_bytes(ids, kinds)
        bos_id = self._id("bos_token_id", len(tokens), default_bos)
        eos_id = self._id("eos_token_id", len(tokens), default_eos)
        unk_id = self._id("unknown_token_id", len(tokens), 0 if model == "llama" else None)
        named = {"bos_token": bos_id, "eos_token": eos_id, "unk_token": unk_id, **self._named(len(tokens))}
        return Vocabulary(
            path=self._path,
            model=model,
            pre=self._string("pre"),
            tokens=tokens,
            kinds=kinds,
            scores=scores,
            merges=merges,
            ids=ids,
            bos_id=bos_id,
            eos_id=eos_id,
            unk_id=unk_id,
            eot_id=self._id("eot_token_id", len(tokens), None),
            eom_id=self._id("eom_token_id", len(tokens), None),
            add_bos=self._flag("add_bos_token"),
            add_eos=self._flag("add_eos_token") or False,
            add_space_prefix=self._flag("add_space_prefix"),
            end_of_turn=end_of_turn,
            names={name: tokens[id_] for name, id_ in named.items() if id_ is not None},
        )

    def _named(self, n: int) -> dict[str, int]:
        """Only templates use these, so a value that is no id is left out."""
        found = {name: self._metadata.get(PREFIX + key) for name, key in _NAMED.items()}
        return {name: id_ for name, id_ in found.items() if type(id_) is int and 0 <= id_ < n}

    def _tokens(self) -> list[str]:
        tokens = self._strings("tokens", MAX_TOKENS)
        if not tokens:
            raise self._error("tokens", "is empty: a vocabulary needs at least one token")
        lengths = list(map(len, tokens))
        if max(lengths) > MAX_TOKEN_CHARACTERS:
            id_ = next(i for i, length in enumerate(lengths) if length > MAX_TOKEN_CHARACTERS)
            raise self._error(
                "tokens",
                f"token {id_} has {lengths[id_]} characters; at most {MAX_TOKEN_CHARACTERS} are allowed",
            )
        if sum(lengths) > MAX_TOTAL_CHARACTERS:
            raise self._error(
                "tokens", f"has {sum(lengths)} characters; at most {MAX_TOTAL_CHARACTERS} are allowed"
            )
        return tokens

    def _merges(self) -> list[str]:
        return self._strings("merges", MAX_MERGES)

    def _strings(self, key: str, limit: int) -> list[str]:
        value = self._array(key)
        if value is None:
            raise self._error(key, "is missing")
        if len(value) > limit:
            raise self._error(key, f"has {len(value)} entries; at most {limit} are allowed")
        strings = list(value)
        if not set(map(type, strings)) <= {str}:
            raise self._error(key, "is not an array of strings")
        return strings

    def _kinds(self, n: int, required: bool) -> npt.NDArray[np.int64]:
        value = self._array("token_type")
        if value is None:
            if required:
                raise self._error("token_type", "is missing: without it bytes cannot be told from text")
            return np.full(n, TokenKind.NORMAL, np.int64)
        if len(value) != n:
            raise self._error("token_type", f"has {len(value)} entries for {n} tokens")
        kinds = np.asarray(value)
        if kinds.dtype.kind not in "iu" or kinds.ndim != 1:
            raise self._error("token_type", "is not an array of integers")
        # unknown kinds act as normal tokens, as everywhere else: newer writers may know more than we do
        return kinds.astype(np.int64)

    def _scores(self, n: int) -> npt.NDArray[np.float64]:
        value = self._array("scores")
        if value is None:
            raise self._error("scores", "is missing: a SentencePiece vocabulary merges by score")
        if len(value) != n:
            raise self._error("scores", f"has {len(value)} entries for {n} tokens")
        scores = np.asarray(value)
        if scores.dtype.kind not in "fiu" or scores.ndim != 1:
            raise self._error("scores", "is not an array of numbers")
        if np.isnan(scores).any():
            raise self._error("scores", f"entry {int(np.isnan(scores).argmax())} is not a number")
        return scores.astype(np.float64)

    def _id(self, key: str, n: int, default: int | None) -> int | None:
        value = self._metadata.get(PREFIX + key)
        if value is None:
            return default
        if type(value) is not int:
            raise self._error(key, f"is a {type(value).__name__}, not an integer")
        if value in (-1, 0xFFFFFFFF):  # "none", written by some converters
            return None
        if not 0 <= value < n:
            raise self._error(key, f"is {value}, outside the vocabulary of {n} tokens")
        return value

    def _flag(self, key: str) -> bool | None:
        value = self._metadata.get(PREFIX + key)
        if value is not None and type(value) is not bool:
            raise self._error(key, f"is a {type(value).__name__}, not a boolean")
        return value

    def _string(self, key: str) -> str | None:
        value = self._metadata.get(PREFIX + key)
        if value is not None and not isinstance(value, str):
            raise self._error(key, f"is a {type(value).__name__}, not a string")
        return value

    def _array(self, key: str) -> Any:
        """A list, tuple or numpy array, or None where the key is missing."""
        value = self._metadata.get(PREFIX + key)
        if value is None:
            return None
        one_dimensional = getattr(value, "ndim", 1) == 1
        if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or not one_dimensional:
            raise self._error(key, f"is a {type(value).__name__}, not an array")
        return value

    def _error(self, key: str, problem: str) -> ModelFormatError:
        return ModelFormatError(self._path, PREFIX + key, problem)


def _mark_control(
    end_of_turn: Iterable[int], tokens: Sequence[str], merges: Sequence[str], kinds: npt.NDArray[np.int64]
) -> None:
    """Makes control tokens of those that end a turn, as llama.cpp does. One that merges make may come of any text, so
    it is text still, and does not vanish when that is decoded."""
    others = [id_ for id_ in end_of_turn if kinds[id_] != TokenKind.CONTROL]
    known = set(merges) if others else set()
    for id_ in others:
        text = tokens[id_]
        if not any(f"{text[:at]} {text[at:]}" in known for at in range(1, len(text))):
            kinds[id_] = TokenKind.CONTROL


def _find_bytes(ids: Mapping[str, int], kinds: npt.NDArray[np.int64]) -> None:
    """Makes byte tokens of normal ones that are named so, as llama.cpp finds them by name. Only a full set: one such
    name alone may be text."""
    named = [ids[name] for name in HEXADECIMAL_NAMES if name in ids]
    if len(named) == 256 and np.isin(kinds[named], (TokenKind.NORMAL, TokenKind.BYTE)).all():
        kinds[named] = TokenKind.BYTE
