"""A Hugging Face model directory: config.json, safetensors in one file or several, tokenizer files."""

from __future__ import annotations

import json
import stat
from codecs import BOM_UTF8
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats.model_file import ModelFile, TensorInfo, printable
from pi2rt.formats.regular_file import RegularFile, file_mode
from pi2rt.formats.safetensors_file import SafetensorsFile

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_SHARDS = 512

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Files beside config.json and the weights that pi2rt reads where they are there."""

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class _Index(msgspec.Struct):
    weight_map: dict[str, Annotated[str, msgspec.Meta(min_length=1, max_length=255)]]


class HuggingFaceDirectory(ModelFile):
    """An open Hugging Face directory.

    ``metadata`` is config.json as it stands; ``architecture`` its ``model_type``. ``tensors`` carry the
    names of the checkpoint, in the order of model.safetensors, or of the index where there are shards.

    Args:
        path: the directory.

    Raises:
        ModelNotFoundError: a file that it needs or names is not there.
        ModelFormatError: a file in it is malformed, or the index names a file outside the directory.
        UnsupportedModelError: a tensor type that pi2rt does not have, or only pickled weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._shards: dict[Path, SafetensorsFile] = {}
        try:
            self.metadata: dict[str, Any] = self._read_config()
            self.architecture: str = self._model_type()
            self.tensors: dict[str, TensorInfo] = self._read_tensors()
        except BaseException:
            self.close()
            raise

    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        shard = self._shards.get(tensor.path)
        if shard is None or start < 0 or start + buffer.nbytes > tensor.nbytes:
            raise ValueError(
                f"{buffer.nbytes} bytes from byte {start} on are not inside tensor {tensor.name!r} "
                f"({tensor.nbytes} bytes of {tensor.path}) of {self.path}"
            )
        shard.file.read_into(tensor.offset + start, buffer)

    def close(self) -> None:
        """Closes the files; again is nothing. No read may be running."""
        for shard in self._shards.values():
            shard.file.close()

    def companion(self, name: str) -> Path | None:
        path = self._inside(name, "companion")
        return path if stat.S_ISREG(file_mode(path)) else None

    def _inside(self, name: str, field: str) -> Path:
        """The path of a file that lies in the directory itself. Links in it may lead elsewhere, as the ones
        of the hub's cache do; names may not."""
        if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
            raise ModelFormatError(
                self.path, field, f"{printable(name)!r} is not the plain name of a file in this directory"
            )
        return self.path / name

    def _read_json(self, name: str, limit: int) -> bytearray:
        file = RegularFile(self.path / name)
        try:
            if file.size > limit:
                problem = f"is {file.size} bytes; at most {limit} are allowed"
                raise ModelFormatError(file.path, "file", problem)
            return file.read(0, file.size)
        finally:
            file.close()

    def _read_config(self) -> dict[str, Any]:
        text = self._read_json(_CONFIG, MAX_CONFIG_BYTES)
        try:
            config = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # ValueError: also not UTF-8, or endless digits
            raise ModelFormatError(self.path / _CONFIG, "file", f"is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ModelFormatError(
                self.path / _CONFIG, "file", f"holds a {type(config).__name__}, not an object"
            )
        return config

    def _model_type(self) -> str:
        value = self.metadata.get("model_type")
        if not isinstance(value, str) or not value:
            problem = "is missing" if value is None else f"is {printable(repr(value))}, not a name"
            raise ModelFormatError(self.path / _CONFIG, "model_type", problem)
        return value

    def _read_tensors(self) -> dict[str, TensorInfo]:
        if file_mode(self.path / _SINGLE):
            return self._open(self.path / _SINGLE).tensors
        if not file_mode(self.path / _INDEX):
            if any(file_mode(self.path / f"pytorch_model.bin{end}") for end in ("", ".index.json")):
                problem = "is pickled, which can run code; convert it to safetensors first"
                raise UnsupportedModelError(self.path, "pytorch_model.bin", problem)
            raise ModelFormatError(self.path, "weights", f"neither {_SINGLE} nor {_INDEX} is there")
        index_path = self.path / _INDEX
        try:
            index = msgspec.json.decode(
                self._read_json(_INDEX, MAX_INDEX_BYTES).removeprefix(BOM_UTF8), type=_Index
            )
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ModelFormatError(index_path, "file", f"is not a safetensors index: {error}") from None
        names = dict.fromkeys(index.weight_map.values())
        if len(names) > MAX_SHARDS:
            raise ModelFormatError(
                index_path, "weight_map", f"names {len(names)} files; at most {MAX_SHARDS} are allowed"
            )
        paths = {name: self._inside(name, f"{_INDEX}: weight_map") for name in names}
        shards = {name: self._open(path) for name, path in paths.items()}
        tensors: dict[str, TensorInfo] = {}
        for name, shard in index.weight_map.items():
            tensor = shards[shard].tensors.get(name)
            if tensor is None:
                raise ModelFormatError(
                    index_path, f"weight_map {printable(name)}", f"{shard} has no tensor of that name"
                )
            tensors[name] = tensor
        return tensors

    def _open(self, path: Path) -> SafetensorsFile:
        shard = SafetensorsFile(path)
        self._shards[path] = shard
        return shard
