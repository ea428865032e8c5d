"""One safetensors file.

Format: https://github.com/huggingface/safetensors#format: eight bytes of length, a JSON object, the tensor
data. The parser is our own for the same reason as GGUF's: it stands in front of files from anywhere, and a
flash reader needs to know where each tensor lies. The JSON is decoded straight into typed records, so that
a hostile header cannot unfold into something much larger than itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import msgspec

from pi2rt._errors import ModelFormatError
from pi2rt.formats.model_file import TensorInfo, printable, refuse_overlap
from pi2rt.formats.quants import TYPES
from pi2rt.formats.regular_file import RegularFile

MAX_HEADER_BYTES = 32 << 20  # the largest real shards have a few hundred KB
MAX_DIMS = 8

_DTYPES: Mapping[str, str] = MappingProxyType({"F32": "F32", "F16": "F16", "BF16": "BF16"})

_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Entry(msgspec.Struct):
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: Annotated[list[_Size], msgspec.Meta(max_length=MAX_DIMS)]
    data_offsets: tuple[_Size, _Size]


class SafetensorsFile:
    """An open safetensors file; every entry was held against the file. A tensor that is neither F32 nor F16 nor BF16
    is listed with the name of its dtype and no bytes: the model may not need it.

    Args:
        path: the file.

    Raises:
        ModelNotFoundError: it cannot be opened.
        ModelFormatError: it is malformed; the message names the field.
    """

    __slots__ = ("file", "tensors")

    def __init__(self, path: Path) -> None:
        self.file = RegularFile(path)
        try:
            self.tensors: dict[str, TensorInfo] = self._read_header()
        except BaseException:
            self.file.close()
            raise

    def _read_header(self) -> dict[str, TensorInfo]:
        path, size = self.file.path, self.file.size
        if size < 8:
            raise ModelFormatError(path, "header length", f"needs 8 bytes, but the file has {size}")
        length = int.from_bytes(self.file.read(0, 8), "little")
        if length > size - 8:
            raise ModelFormatError(
                path, "header length", f"is {length} bytes, but the file has {size - 8} after it"
            )
        if length > MAX_HEADER_BYTES:
            raise ModelFormatError(
                path, "header length", f"is {length} bytes; at most {MAX_HEADER_BYTES} are allowed"
            )
        try:
            entries = msgspec.json.decode(self.file.read(8, length), type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ModelFormatError(path, "header", f"is not a JSON object: {error}") from None
        entries.pop("__metadata__", None)
        data = 8 + length
        decoder = msgspec.json.Decoder(_Entry)
        tensors = {name: self._tensor(name, raw, decoder, data, size - data) for name, raw in entries.items()}
        refuse_overlap(tensors)
        return tensors

    def _tensor(
        self, name: str, raw: msgspec.Raw, decoder: msgspec.json.Decoder[_Entry], data: int, size: int
    ) -> TensorInfo:
        path, field = self.file.path, f"tensor {printable(name)}"
        try:
            entry = decoder.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ModelFormatError(path, field, f"has a malformed entry: {error}") from None
        begin, end = entry.data_offsets
        if not begin <= end <= size:
            raise ModelFormatError(
                path,
                f"{field}: data_offsets",
                f"{begin} to {end} are not inside the {size} bytes of tensor data",
            )
        shape = tuple(entry.shape)
        if entry.dtype not in _DTYPES:
            return TensorInfo(name, f"{entry.dtype} of safetensors", shape, path, data + begin, 0)
        kind = TYPES[_DTYPES[entry.dtype]]
        if math.prod(shape) * kind.block_bytes != end - begin:
            raise ModelFormatError(
                path,
                f"{field}: data_offsets",
                f"span {end - begin} bytes, but shape {list(shape)} of {kind.name} takes "
                f"{math.prod(shape) * kind.block_bytes}",
            )
        return TensorInfo(name, kind.name, shape, path, data + begin, end - begin)
