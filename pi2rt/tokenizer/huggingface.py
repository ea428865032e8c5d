"""The tokenizer of a Hugging Face directory: tokenizer.json, run by ``tokenizers``, and what stands beside
it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer as Engine

from pi2rt._errors import ModelFormatError, TemplateError, UnsupportedModelError
from pi2rt.formats.regular_file import file_mode
from pi2rt.host.limits import explained
from pi2rt.tokenizer.chat_template import MAX_SOURCE_CHARACTERS, ChatTemplate
from pi2rt.tokenizer.declared_tokens import ADDED, CONFIG, SPECIAL_MAP, read_declared_tokens
from pi2rt.tokenizer.end_tokens import end_of_turn_ids
from pi2rt.tokenizer.huggingface_encoder import HuggingFaceEncoder
from pi2rt.tokenizer.huggingface_spelling import HuggingFaceSpelling
from pi2rt.tokenizer.tokenizer import Tokenizer
from pi2rt.tokenizer.vocabulary import MAX_TOKENS

MAX_TOKENIZER_BYTES = 128 << 20  # Gemma's 262,144 tokens take 33 MB
MAX_CONFIG_BYTES = 8 << 20

_TOKENIZER, _GENERATION, _TEMPLATE = "tokenizer.json", "generation_config.json", "chat_template.jinja"

ReadFile: TypeAlias = Callable[[str, int], bytes | None]
"""``read(name, limit)``: the content of a file, of at most ``limit`` bytes, or None where there is none."""


def load_huggingface_tokenizer(
    directory: Path, config: Mapping[str, Any], read: ReadFile | None = None, *, rows: int = 0
) -> Tokenizer:
    """The tokenizer in a directory, or in a pack that was made from one.

    Args:
        directory: it holds tokenizer.json, and may hold tokenizer_config.json, special_tokens_map.json,
            added_tokens.json, generation_config.json and chat_template.jinja. Of a pack: its path, for messages.
        config: what its config.json says.
        read: reads one of these files; None reads it in the directory.
        rows: of the model's embedding, where they are known.

    Raises:
        ModelFormatError: one of the files is malformed; the message names it.
        UnsupportedModelError: there is no tokenizer.json, or its tokens are spelled in a way pi2rt does not
            have.
    """
    return _Loader(directory, config, partial(_read_in, directory) if read is None else read, rows).load()


class _Loader:
    def __init__(self, directory: Path, config: Mapping[str, Any], read: ReadFile, rows: int) -> None:
        self._directory, self._model_config, self._read_file = directory, config, read
        self._path = directory / _TOKENIZER
        data = self._read(_TOKENIZER, MAX_TOKENIZER_BYTES)
        if data is None:
            raise UnsupportedModelError(
                directory, _TOKENIZER, "is missing; convert the model's tokenizer to it with transformers"
            )
        self._engine = self._read_engine(data)
        self._config = self._read_json(CONFIG)
        self._generation = self._read_json(_GENERATION)
        self._rows = rows or self._declared_rows()
        self._tokens = read_declared_tokens(
            directory, self._config, self._read_json(SPECIAL_MAP), self._read_json(ADDED)
        )
        self._tokens.add_to(self._engine, self._rows)
        self._tokens.mark_special(self._engine)
        self._template = self._read(_TEMPLATE, 4 * MAX_SOURCE_CHARACTERS)
        self._ids: dict[str, int] = self._engine.get_vocab(with_added_tokens=True)
        self._added = self._engine.get_added_tokens_decoder()

    def load(self) -> Tokenizer:
        spelling = HuggingFaceSpelling(self._path, self._engine)
        encoder = HuggingFaceEncoder(self._path, self._engine)
        prefix, suffix = encoder.ends()
        bos_id = self._special("bos_token")
        eos_id = self._special("eos_token")
        ends = end_of_turn_ids(self._ids) | set(self._eos_ids()) | ({eos_id} if eos_id is not None else set())
        vocab_size = self._vocab_size()
        return Tokenizer(
            encoder,
            spelling.token_bytes,
            vocab_size=vocab_size,
            special_ids=frozenset(id_ for id_, token in self._added.items() if token.special),
            bos_id=bos_id,
            eos_ids=frozenset(id_ for id_ in ends if id_ < vocab_size),
            # add_bos_token and add_eos_token of tokenizer_config.json are for tokenizers without a tokenizer.json:
            # Transformers 5.24 drops them where there is one, whatever the tokenizer's class
            prefix_ids=prefix,
            suffix_ids=suffix,
            strip_space=spelling.strips_space,
            chat_template=self._chat_template,
        )

    def _read_engine(self, data: str) -> Engine:
        try:
            engine = Engine.from_str(data)
        except BaseException as error:  # a panic of the library's is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelFormatError(self._path, "file", f"is not a tokenizer: {error}") from None
        # what training and batching left behind: it would cut, fill or vary every text
        engine.no_truncation()
        engine.no_padding()
        if getattr(engine.model, "dropout", None) is not None:
            engine.model.dropout = None
        return engine

    def _read(self, name: str, limit: int) -> str | None:
        data = self._read_file(name, limit)
        try:
            return None if data is None else data.decode("utf-8-sig")  # a byte order mark is no text
        except UnicodeDecodeError as error:
            raise ModelFormatError(
                self._directory / name, "file", f"is not UTF-8 at byte {error.start}"
            ) from None

    def _read_json(self, name: str) -> Mapping[str, Any]:
        text = self._read(name, MAX_CONFIG_BYTES)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(self._directory / name, "file", f"is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ModelFormatError(self._directory / name, "file", "is not a JSON object")
        return value

    def _declared_rows(self) -> int:
        nested = self._model_config.get("text_config")
        configs = (self._model_config, nested if isinstance(nested, Mapping) else {})
        declared = [config.get("vocab_size") for config in configs]
        return max((size for size in declared if type(size) is int), default=0)

    def _vocab_size(self) -> int:
        """Above every id, and no smaller than the model's own, which may have rows for tokens that do not
        exist."""
        size = max(self._rows, max(self._ids.values(), default=-1) + 1)
        if not 0 < size <= MAX_TOKENS:
            raise ModelFormatError(self._path, "vocab", f"has ids up to {size - 1}; {MAX_TOKENS} are allowed")
        return size

    def _special(self, key: str) -> int | None:
        id_ = self._ids.get(self._tokens.names.get(key, ""))
        if id_ is None:
            declared = self._model_config.get(f"{key}_id")
            if type(declared) is int and declared in self._ids.values():
                return declared
        return id_

    def _eos_ids(self) -> Iterator[int]:
        for config in (self._model_config, self._generation):
            value = config.get("eos_token_id")
            for id_ in value if isinstance(value, list) else [value]:
                if type(id_) is int and id_ >= 0:
                    yield id_

    def _chat_template(self) -> ChatTemplate | None:
        source: Any = self._config.get("chat_template") if self._template is None else self._template
        if isinstance(source, list):
            named = {
                entry.get("name"): entry.get("template") for entry in source if isinstance(entry, Mapping)
            }
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise TemplateError(f"{self._directory / CONFIG}: chat_template: is not a string")
        return ChatTemplate(source, special_tokens=self._tokens.names)


def _read_in(directory: Path, name: str, limit: int) -> bytes | None:
    path = directory / name
    if not stat.S_ISREG(file_mode(path)):
        return None
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        problem = ModelFormatError(path, "file", f"cannot be read: {error.strerror}")
        raise explained(error) or problem from error
    if len(data) > limit:
        raise ModelFormatError(path, "file", f"has more than the {limit} bytes allowed")
    return data
