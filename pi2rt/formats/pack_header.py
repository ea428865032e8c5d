"""The header of a pack: records in msgpack, and the metadata of a GGUF file in it.

``docs/pack-format.md`` has the byte layout. Decoding is typed and bounded, so that a hostile header cannot unfold into
something much larger than itself; what the records say is held against the file in ``pack.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from pi2rt.formats.row_blocks import SECTOR

MAGIC = b"PI2\x00PACK"
VERSION = 1
NEVER_REST = 1
"""Flag: there are bundles of blocks whose activation is not of the ReLU family. A reader that does not know it would
take neurons to be zero that are not."""
ORDERED = 2
"""Flag: there are bundles with an order of their own (``neuron_order.py``). A reader that does not know it would take
one neuron for another."""
FLAGS = NEVER_REST | ORDERED
PREAMBLE_BYTES = 64
ALIGNMENT = SECTOR
"""Of the data, of each tensor and companion in it, and of the file's length."""
MAX_HEADER_BYTES = 64 << 20  # that of a model with 262,144 tokens takes 11 MB
MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 255
MAX_DIMS = 4
CHECKSUM_BYTES = 16
DIGEST_BYTES = 32

_MAX_NESTING = 4
_MAX_KEYS = 1 << 16
_MAX_FILES = 1 << 10

Container = Literal["gguf", "huggingface"]

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_BYTES)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62))]
_Dimension = Annotated[int, msgspec.Meta(ge=1, le=(1 << 62))]
_Checksum = Annotated[bytes, msgspec.Meta(min_length=CHECKSUM_BYTES, max_length=CHECKSUM_BYTES)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class SourceFile(msgspec.Struct, frozen=True):
    """A file that was converted. ``digest``: BLAKE2b of 256 bits of its content."""

    name: _Name
    nbytes: _Size
    digest: _Digest


class Source(msgspec.Struct, frozen=True):
    """What a pack was made from: one file, or those of a directory that were read."""

    name: _Name
    container: Container
    files: Annotated[tuple[SourceFile, ...], msgspec.Meta(max_length=_MAX_FILES)]


class Region(msgspec.Struct, frozen=True):
    """A companion. ``offset``: from the beginning of the data; ``checksum``: BLAKE2b of 128 bits."""

    name: _Name
    offset: _Size
    nbytes: _Size
    checksum: _Checksum


class TensorEntry(Region, frozen=True):
    """A tensor. ``shape``: rows first, of the values."""

    type: Annotated[str, msgspec.Meta(max_length=32)]
    shape: Annotated[tuple[_Dimension, ...], msgspec.Meta(min_length=1, max_length=MAX_DIMS)]
    layout: Annotated[str, msgspec.Meta(max_length=32)]


class BundlesEntry(Region, frozen=True):
    """The neuron bundles of a feed-forward block. ``gate``, ``up``, ``down``: names of tensors of layout "neurons";
    what else there is follows from those and is checked against them."""

    up: _Name | None
    down: _Name
    neurons: _Size
    page_bytes: _Size
    neurons_per_page: _Size
    neuron_bytes: _Size
    gate: _Name | None = None
    order: bytes | None = None


class Header(msgspec.Struct, frozen=True):
    """``metadata``: of a GGUF file its keys, of a Hugging Face directory the text of its config.json."""

    source: Source
    architecture: _Name
    metadata: msgspec.Raw
    tensors: Annotated[list[TensorEntry], msgspec.Meta(max_length=MAX_TENSORS)]
    companions: Annotated[list[Region], msgspec.Meta(max_length=_MAX_FILES)] = []
    bundles: Annotated[list[BundlesEntry], msgspec.Meta(max_length=MAX_TENSORS)] = []


# Arrays of numbers are an extension whose code is GGUF's number of the type.
_ARRAY_DTYPES: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        code: np.dtype(name)
        for code, name in {
            0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8",
        }.items()
    }
)  # fmt: skip
_ARRAY_CODES: Mapping[np.dtype[Any], int] = MappingProxyType(
    {dtype: code for code, dtype in _ARRAY_DTYPES.items()}
)


class MetadataError(ValueError):
    """Metadata is malformed; the message says which key, and how."""


def encode_metadata(metadata: Mapping[str, Any] | str) -> msgspec.Raw:
    """``metadata`` of an open GGUF file, or the text of config.json, for ``decode_metadata``."""
    if isinstance(metadata, str):
        return msgspec.Raw(msgspec.msgpack.encode(metadata))
    return msgspec.Raw(msgspec.msgpack.encode({key: _encodable(value) for key, value in metadata.items()}))


def _encodable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return msgspec.msgpack.Ext(_ARRAY_CODES[value.dtype], np.ascontiguousarray(value).tobytes())
    if isinstance(value, list):
        return [_encodable(each) for each in value]
    return value


def decode_metadata(raw: msgspec.Raw, container: Container) -> dict[str, Any]:
    """The metadata as the source's own reader gives it: of GGUF int, float, bool, str, list[str], and read-only arrays
    of numbers.

    Raises:
        MetadataError: it is malformed.
    """
    try:
        if container == "huggingface":
            text = msgspec.msgpack.decode(raw, type=str)
            config = json.loads(text)
            if not isinstance(config, dict):
                raise MetadataError(f"is a {type(config).__name__}, not an object")
            return config
        values = msgspec.msgpack.decode(raw, type=dict[str, msgspec.Raw])
        if len(values) > _MAX_KEYS:
            raise MetadataError(f"has {len(values)} keys; at most {_MAX_KEYS} are allowed")
        return {key: _decode(value, key, 0) for key, value in values.items()}
    except MetadataError:
        raise
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise MetadataError(f"is malformed: {error}") from None


_ARRAY_COUNTS = {0xDC: 2, 0xDD: 4}  # msgpack's array 16 and array 32: bytes of the count


def _decode(raw: msgspec.Raw, key: str, depth: int) -> Any:
    view = memoryview(raw)
    first = view[0]
    if not (0x90 <= first <= 0x9F or first in _ARRAY_COUNTS):
        value: Any = msgspec.msgpack.decode(raw, type=bool | int | float | str | msgspec.msgpack.Ext)
        return _numbers(value, key) if isinstance(value, msgspec.msgpack.Ext) else value
    # A count is held against the bytes behind it before a list of that length is made.
    size = _ARRAY_COUNTS.get(first, 0)
    count = int.from_bytes(view[1 : 1 + size], "big") if size else first & 15
    if count > view.nbytes - 1 - size:
        raise MetadataError(f"{key!r} claims {count} elements in {view.nbytes} bytes")
    if depth == _MAX_NESTING:
        raise MetadataError(f"{key!r} nests arrays deeper than the {_MAX_NESTING} levels allowed")
    try:
        return msgspec.msgpack.decode(raw, type=list[str])
    except msgspec.ValidationError:
        inner = msgspec.msgpack.decode(raw, type=list[msgspec.Raw])
        return [_decode(each, key, depth + 1) for each in inner]


def _numbers(value: msgspec.msgpack.Ext, key: str) -> np.ndarray[Any, np.dtype[Any]]:
    dtype, data = _ARRAY_DTYPES.get(value.code), bytes(value.data)
    if dtype is None:
        raise MetadataError(f"{key!r} is an array of unknown type {value.code}")
    if len(data) % dtype.itemsize or (dtype.kind == "b" and data.strip(b"\0\1")):
        raise MetadataError(f"{key!r} is no array of {dtype}")
    return np.frombuffer(data, dtype)
