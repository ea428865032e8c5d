"""The encoder of a tokenizer.json: `tokenizers`, with control tokens in trusted text only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from secrets import token_hex
from threading import Lock
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine

from pi2rt._errors import ModelFormatError
from pi2rt.tokenizer.byte_level import CHARACTERS
from pi2rt.tokenizer.huggingface_cuts import read_facts
from pi2rt.tokenizer.marked_text import Runs
from pi2rt.tokenizer.special_splitter import is_control_name, within

WINDOW = 2048  # characters encoded at once: two milliseconds


class HuggingFaceEncoder:
    """Encodes text by a tokenizer.json.

    ``tokenizers`` recognises special tokens everywhere or nowhere. Where the text between has one spelled out, the
    trusted ones stand there under other names, of added tokens that are not special, and the engine looks for those.

    Args:
        path: of the tokenizer.json, for messages.
        window: characters encoded at once, where the file's way to split text is known.
        engine: it belongs to this object from now on. Added tokens that are named like control tokens become some.
    """

    def __init__(self, path: Path, engine: Engine, window: int = WINDOW) -> None:
        self.window = window
        self._path, self._engine = path, engine
        self._lock = Lock()  # whether special tokens are recognised is a property of the engine
        added = engine.get_added_tokens_decoder()
        for id_, token in added.items():
            if not (token.special or is_control_name(token.content)):
                continue
            # A normaliser that puts a space first would let it be found at the beginning of a text alone.
            is_changed = token.normalized and _normalised(engine, token.content) != token.content
            if is_changed or not token.special:
                added[id_] = AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized and not is_changed,
                    special=True,
                )
                engine.add_special_tokens([added[id_]])
        self._facts = read_facts(engine)
        self._special: dict[int, AddedToken] = {id_: token for id_, token in added.items() if token.special}
        self._secret = token_hex(8)  # no text has it by chance or on purpose
        self._aliases: dict[int, str] = {}
        self._originals: dict[int, int] = {}

    @property
    def dropped(self) -> bytes:
        return self._facts.dropped

    @property
    def most_bytes(self) -> int:
        return self._facts.most_bytes

    def pieces(self, text: str, trusted: Runs) -> Iterator[list[int]]:
        """Ids of a text, some at a time. Where the file's way to split text is not known, all at once."""
        start, size, borders = 0, len(text), self._facts.borders
        while size - start > self.window and borders is not None:
            end = borders.last(text, start, start + self.window)
            if not end:
                end = borders.next(text, start + self.window, size) or size
            yield self._encode_part(text, trusted, start, end)
            start = end
        if start < size:
            yield self._encode_part(text, trusted, start, size)

    def _encode_part(self, text: str, trusted: Runs, start: int, end: int) -> list[int]:
        before = max(0, start - self._facts.overlap)
        ids = self._encode_all(text[before:end], _clipped(trusted, before, end))
        if before < start:  # nothing merges across the border
            del ids[: len(self._encode_all(text[before:start], _clipped(trusted, before, start)))]
        return ids

    def _encode_all(self, text: str, trusted: Runs) -> list[int]:
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
        return [id_ for character in text for id_ in self._spelled(character)]

    def _spelled(self, character: str) -> list[int]:
        """Ids of one character. A special token only where the character is nothing else ("!" as the pad token): no
        text may be lost, and one character is no turn."""
        data = character.encode()
        spellings = [character], [CHARACTERS[byte] for byte in data], [f"<0x{byte:02X}>" for byte in data]
        for avoided in self._special, ():
            for spelling in spellings:
                found = map(self._engine.token_to_id, spelling)
                known = [id_ for id_ in found if id_ is not None and id_ not in avoided]
                if len(known) == len(spelling):
                    return known
        return []

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
            if len(text) <= 2 * WINDOW:
                return self._engine.encode(text, add_special_tokens=add_special_tokens)
            # other threads run meanwhile
            return self._engine.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except Exception as error:  # the library's errors have no type of their own
            raise ModelFormatError(self._path, "file", f"cannot encode with it: {error}") from error


def _normalised(engine: Engine, text: str) -> str:
    return text if engine.normalizer is None else str(engine.normalizer.normalize_str(text))


def _clipped(runs: Runs, start: int, end: int) -> Runs:
    """The parts of the runs between ``start`` and ``end``, counted from ``start``."""
    first = bisect_right(runs, start, key=itemgetter(1))
    last = bisect_left(runs, end, key=itemgetter(0))
    return tuple((max(run[0], start) - start, min(run[1], end) - start) for run in runs[first:last])
