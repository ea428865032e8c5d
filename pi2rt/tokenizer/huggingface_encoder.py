"""The encoder of a tokenizer.json: `tokenizers`, with control tokens in trusted text only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from pi2rt._errors import ModelFormatError
from pi2rt.tokenizer.byte_level import CHARACTERS
from pi2rt.tokenizer.marked_text import Runs
from pi2rt.tokenizer.special_splitter import is_control_name, within


class HuggingFaceEncoder:
    """Encodes text by a tokenizer.json.

    ``tokenizers`` recognises special tokens everywhere or nowhere. Where the text between has one spelled out, the
    trusted ones stand there under other names, of added tokens that are not special, and the engine looks for those.

    Args:
        path: of the tokenizer.json, for messages.
        engine: it belongs to this object from now on. Added tokens that are named like control tokens become some.
    """

    def __init__(self, path: Path, engine: Engine) -> None:
        self._path, self._engine = path, engine
        self._lock = Lock()  # whether special tokens are recognised is a property of the engine
        added = engine.get_added_tokens_decoder()
        for token in added.values():
            if not token.special and is_control_name(token.content):
                token.special = True
                engine.add_special_tokens([token])
        self._special: dict[int, AddedToken] = {id_: token for id_, token in added.items() if token.special}
        self._secret = token_hex(8)  # no text has it by chance or on purpose
        self._aliases: dict[int, str] = {}
        self._originals: dict[int, int] = {}

    def encode(self, text: str, trusted: Runs) -> list[int]:
        with self._lock:
            self._engine.encode_special_tokens = not trusted
            encoding = self._encode(text, add_special_tokens=False)
            if not trusted:
                return self._without_specials(text, encoding)
            ids: list[int] = encoding.ids
            if trusted == ((0, len(text)),):
                return ids
            if all(within(trusted, start, end) for _, start, end in self._specials(text, encoding)):
                return ids
            return self._encode_trusted(text, trusted)

    def _encode_trusted(self, text: str, trusted: Runs) -> list[int]:
        parts, at = [], 0
        for first, last in trusted:
            run = text[first:last]
            encoding = self._encode(run, add_special_tokens=False)
            for index, start, end in self._specials(run, encoding):
                parts += [text[at : first + start], self._alias(encoding.ids[index])]
                at = first + end
        self._engine.encode_special_tokens = True
        text = "".join((*parts, text[at:]))
        ids = self._without_specials(text, self._encode(text, add_special_tokens=False))
        return [self._originals.get(id_, id_) for id_ in ids]

    def _without_specials(self, text: str, encoding: Any) -> list[int]:
        """The ids, those of special tokens spelled out: a model (Unigram) may have these among its pieces."""
        ids: list[int] = encoding.ids
        for index, _, _ in reversed(list(self._specials(text, encoding))):
            ids[index : index + 1] = self._spelled_out(self._special[ids[index]].content)
        return ids

    def _spelled_out(self, text: str) -> list[int]:
        """Ids of the characters, or of their bytes where the vocabulary has those."""
        ids: list[int] = []
        for character in text:
            data = character.encode()
            byte_level = [CHARACTERS[byte] for byte in data]
            for spelling in [character], byte_level, [f"<0x{byte:02X}>" for byte in data]:
                found = map(self._engine.token_to_id, spelling)
                known = [id_ for id_ in found if id_ is not None and id_ not in self._special]
                if len(known) == len(spelling):
                    ids += known
                    break
        return ids

    def _specials(self, text: str, encoding: Any) -> Iterator[tuple[int, int, int]]:
        """(index, start, end) of the special tokens that text spells out, without the white space that some take in."""
        offsets: list[tuple[int, int]] | None = None
        for index, id_ in enumerate(encoding.ids):
            token = self._special.get(id_)
            if token is None:
                continue
            if offsets is None:
                offsets = encoding.offsets  # makes a list of all of them
            start, end = offsets[index]
            spelled = text[start:end]
            if token.lstrip:
                start = end - len(spelled.lstrip())
            if token.rstrip:
                end = start + len(text[start:end].rstrip())
            if token.normalized or text[start:end] == token.content:  # else the model's unknown token
                yield index, start, end

    def _alias(self, id_: int) -> str:
        alias = self._aliases.get(id_)
        if alias is None:
            token = self._special[id_]
            # characters for private use are no part of words, and no normalisation changes them
            alias = self._aliases[id_] = f"\ue000{self._secret}-{id_}\ue001"
            self._engine.add_tokens(
                [AddedToken(alias, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized)]
            )
            added = self._engine.token_to_id(alias)
            assert added is not None
            self._originals[added] = id_
        return alias

    def ends(self) -> tuple[list[int], list[int]]:
        """What the file's own template puts before and after a text."""
        encoding = self._encode("a", add_special_tokens=True)
        added = encoding.special_tokens_mask
        text = [index for index, is_added in enumerate(added) if not is_added]
        if not text:
            return [], []
        return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]

    def _encode(self, text: str, add_special_tokens: bool) -> Any:
        try:
            return self._engine.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library's errors have no type of their own
            raise ModelFormatError(self._path, "file", f"cannot encode with it: {error}") from error
