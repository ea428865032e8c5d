"""The tokenizer of a Hugging Face directory: tokenizer.json, run by ``tokenizers``, and what stands beside
it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

from tokenizers import Tokenizer as Engine

from pi2rt._errors import ModelFormatError, TemplateError, UnsupportedModelError
from pi2rt.tokenizer import byte_level
from pi2rt.tokenizer.chat_template import MAX_SOURCE_CHARACTERS, ChatTemplate
from pi2rt.tokenizer.end_tokens import end_of_turn_ids
from pi2rt.tokenizer.tokenizer import Tokenizer
from pi2rt.tokenizer.vocabulary import MAX_TOKENS

MAX_TOKENIZER_BYTES = 128 << 20  # Gemma's 262,144 tokens take 33 MB
MAX_CONFIG_BYTES = 8 << 20

_TOKENIZER, _CONFIG, _GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_TEMPLATE = "chat_template.jinja"


ReadFile: TypeAlias = Callable[[str, int], bytes | None]
"""``read(name, limit)``: the content of a file, of at most ``limit`` bytes, or None where there is none."""


def load_huggingface_tokenizer(
    directory: Path, config: Mapping[str, Any], read: ReadFile | None = None
) -> Tokenizer:
    """The tokenizer in a directory, or in a pack that was made from one.

    Args:
        directory: it holds tokenizer.json, and may hold tokenizer_config.json, generation_config.json and
            chat_template.jinja. Of a pack: its path, for messages.
        config: what its config.json says.
        read: reads one of these files; None reads it in the directory.

    Raises:
        ModelFormatError: one of the files is malformed; the message names it.
        UnsupportedModelError: there is no tokenizer.json, or its tokens are spelled in a way pi2rt does not
            have.
    """
    return _Loader(directory, config, partial(_read_in, directory) if read is None else read).load()


class _Encoder:
    def __init__(self, path: Path, engine: Engine) -> None:
        self._path, self._engine = path, engine
        self._lock = Lock()  # whether special tokens are recognised is a property of the engine

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self._engine.encode_special_tokens = not parse_special
            ids: list[int] = self._encode(text, add_special_tokens=False).ids
            return ids

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


class _Loader:
    def __init__(self, directory: Path, config: Mapping[str, Any], read: ReadFile) -> None:
        self._directory, self._model_config, self._read_file = directory, config, read
        self._path = directory / _TOKENIZER
        data = self._read(_TOKENIZER, MAX_TOKENIZER_BYTES)
        if data is None:
            raise UnsupportedModelError(
                directory, _TOKENIZER, "is missing; convert the model's tokenizer to it with transformers"
            )
        self._engine = self._read_engine(data)
        self._config = self._read_json(_CONFIG)
        self._generation = self._read_json(_GENERATION)
        self._template = self._read(_TEMPLATE, 4 * MAX_SOURCE_CHARACTERS)
        self._ids: dict[str, int] = self._engine.get_vocab(with_added_tokens=True)
        self._added = self._engine.get_added_tokens_decoder()

    def load(self) -> Tokenizer:
        decoders = list(self._decoders())
        kinds = {decoder.get("type") for decoder in decoders}
        is_byte_level = "ByteLevel" in kinds
        if not is_byte_level and not kinds & {"Metaspace", "Replace", "ByteFallback"}:
            raise UnsupportedModelError(
                self._path,
                "decoder",
                f"is {sorted(map(str, kinds))}; pi2rt has byte-level BPE and SentencePiece's spelling",
            )
        encoder = _Encoder(self._path, self._engine)
        prefix, suffix = encoder.ends()
        bos_id = self._special("bos_token")
        eos_id = self._special("eos_token")
        control = {token.content: id_ for id_, token in self._added.items() if token.special}
        ends = end_of_turn_ids(control) | set(self._eos_ids()) | ({eos_id} if eos_id is not None else set())
        vocab_size = self._vocab_size()
        return Tokenizer(
            encoder,
            partial(_spell, self._engine, frozenset(self._added), is_byte_level),
            vocab_size=vocab_size,
            special_ids=frozenset(control.values()),
            bos_id=bos_id,
            eos_ids=frozenset(id_ for id_ in ends if id_ < vocab_size),
            prefix_ids=self._overruled("add_bos_token", bos_id, prefix),
            suffix_ids=self._overruled("add_eos_token", eos_id, suffix),
            strip_space=any(map(_strips_space, decoders)),
            chat_template=self._chat_template,
        )

    def _read_engine(self, data: str) -> Engine:
        try:
            return Engine.from_str(data)
        except BaseException as error:  # a panic of the library's is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ModelFormatError(self._path, "file", f"is not a tokenizer: {error}") from None

    def _read(self, name: str, limit: int) -> str | None:
        data = self._read_file(name, limit)
        try:
            return None if data is None else data.decode()
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

    def _decoders(self) -> Iterator[dict[str, Any]]:
        """The decoder's parts, in order."""
        decoder = self._engine.decoder
        if decoder is None:
            return
        state = json.loads(decoder.__getstate__())
        yield from state["decoders"] if state.get("type") == "Sequence" else [state]

    def _vocab_size(self) -> int:
        """Above every id, and no smaller than the model's own, which may have rows for tokens that do not
        exist."""
        size = max(self._ids.values(), default=-1) + 1
        nested = self._model_config.get("text_config")
        for config in (self._model_config, nested if isinstance(nested, Mapping) else {}):
            declared = config.get("vocab_size")
            if type(declared) is int:
                size = max(size, declared)
        if not 0 < size <= MAX_TOKENS:
            raise ModelFormatError(self._path, "vocab", f"has ids up to {size - 1}; {MAX_TOKENS} are allowed")
        return size

    def _text(self, key: str) -> str:
        """A special token's text, as tokenizer_config.json has it: plain, or an object."""
        value = self._config.get(key)
        if isinstance(value, Mapping):
            value = value.get("content")
        return value if isinstance(value, str) else ""

    def _special(self, key: str) -> int | None:
        id_ = self._ids.get(self._text(key))
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

    def _overruled(self, key: str, id_: int | None, default: list[int]) -> list[int]:
        """tokenizer_config.json overrules the template in tokenizer.json, as it does in transformers."""
        wanted = self._config.get(key)
        if type(wanted) is not bool:
            return default
        return [id_] if wanted and id_ is not None else []

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
            raise TemplateError(f"{self._directory / _CONFIG}: chat_template: is not a string")
        return ChatTemplate(source, bos_token=self._text("bos_token"), eos_token=self._text("eos_token"))


def _read_in(directory: Path, name: str, limit: int) -> bytes | None:
    path = directory / name
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelFormatError(path, "file", f"cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise ModelFormatError(path, "file", f"has more than the {limit} bytes allowed")
    return data


def _spell(engine: Engine, added: frozenset[int], is_byte_level: bool, id_: int) -> bytes:
    token = engine.id_to_token(id_)
    if token is None:
        return b""  # a row of the model's that no token has
    if id_ in added:
        return bytes(token.encode())
    if is_byte_level:
        return byte_level.token_bytes(token)
    return byte_level.hexadecimal_byte(token) or byte_level.unescape_spaces(token)


def _strips_space(decoder: dict[str, Any]) -> bool:
    if decoder.get("type") == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never")
    return bool(decoder.get("type") == "Strip" and decoder.get("content") == " " and decoder.get("start"))
