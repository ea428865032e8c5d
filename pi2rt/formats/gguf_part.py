"""One GGUF file, versions 2 and 3, little endian: a whole model, or one part of several (``gguf``).

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader is our own because it
stands on the load path in front of files from anywhere: it checks everything, and it opens a model in
milliseconds.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats.gguf_header import MAX_KEY_BYTES, GgufHeader
from pi2rt.formats.model_file import TensorInfo, printable, refuse_overlap
from pi2rt.formats.quants import BY_GGML_ID, GGML_NAMES
from pi2rt.formats.regular_file import RegularFile

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_TENSOR_NAME_BYTES = 255  # ggml itself stops at 63
MAX_VOCABULARY = 1 << 20  # the largest known has 262,144
MAX_DIMS = 4

_SMALLEST_KEY = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8


class GgufPart:
    """An open GGUF file.

    ``metadata`` values are int, float, bool, str, list[str], or read-only one-dimensional numpy arrays
    (arrays of numbers). ``tensors`` are in the order of the file. A tensor of a type that pi2rt does not have is
    listed with ggml's name of the type and no bytes: the model may not need it.

    Args:
        path: the file.

    Raises:
        ModelNotFoundError: it cannot be opened.
        ModelFormatError: it is malformed; the message names the field.
        UnsupportedModelError: it is big endian or of another version.
    """

    __slots__ = ("file", "metadata", "path", "tensors")

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.file = RegularFile(self.path)
        try:
            header = GgufHeader(self.file)
            tensor_count, key_count = self._preamble(header)
            self.metadata: dict[str, Any] = self._read_metadata(header, key_count)
            self.tensors: dict[str, TensorInfo] = self._read_tensors(header, tensor_count)
        except BaseException:
            self.file.close()
            raise

    def _preamble(self, header: GgufHeader) -> tuple[int, int]:
        """Magic, version and counts; returns (tensors, metadata keys)."""
        magic = header.u32("magic")
        if magic == int.from_bytes(b"FUGG", "little"):
            raise UnsupportedModelError(
                self.path, "magic", "is byte-swapped: big-endian GGUF is not supported"
            )
        if magic != int.from_bytes(b"GGUF", "little"):
            found = magic.to_bytes(4, "little")
            raise ModelFormatError(self.path, "magic", f"is {found!r}, not b'GGUF': this is not a GGUF file")
        version = header.u32("version")
        if version and version & 0xFFFF == 0:
            raise UnsupportedModelError(
                self.path,
                "version",
                "is written big endian; convert the file to little endian (gguf-convert-endian)",
            )
        if version not in (2, 3):
            raise UnsupportedModelError(
                self.path, "version", f"is {version}; pi2rt reads GGUF versions 2 and 3"
            )
        counts = header.u64("tensor count"), header.u64("metadata key count")
        smallest = _SMALLEST_TENSOR, _SMALLEST_KEY
        for count, size, limit, field in zip(
            counts, smallest, (MAX_TENSORS, MAX_KEYS), ("tensor count", "metadata key count"), strict=True
        ):
            if count > limit:
                raise ModelFormatError(self.path, field, f"is {count}; at most {limit} are allowed")
            if count * size > header.remaining:
                raise ModelFormatError(
                    self.path,
                    field,
                    f"is {count}, at least {count * size} bytes, but {header.remaining} bytes are left",
                )
        return counts

    def _read_metadata(self, header: GgufHeader, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(count):
            key = header.name(f"metadata key {i} of {count}", MAX_KEY_BYTES)
            if key in metadata:
                raise ModelFormatError(self.path, f"metadata {printable(key)}", "is there twice")
            metadata[key] = header.value(f"metadata {printable(key)}")
        vocabulary = metadata.get("tokenizer.ggml.tokens", ())
        if isinstance(vocabulary, list) and len(vocabulary) > MAX_VOCABULARY:
            raise ModelFormatError(
                self.path,
                "metadata tokenizer.ggml.tokens",
                f"has {len(vocabulary)} tokens; at most {MAX_VOCABULARY} are allowed",
            )
        return metadata

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1):
            shown = value if isinstance(value, (int, float)) else f"a {type(value).__name__}"
            raise ModelFormatError(self.path, "metadata general.alignment", f"is {shown}, not a power of two")
        return value

    def _read_tensors(self, header: GgufHeader, count: int) -> dict[str, TensorInfo]:
        alignment = self._alignment()
        size = header.position + header.remaining
        relative: dict[str, TensorInfo] = {}
        for i in range(count):
            name = header.name(f"name of tensor {i} of {count}", MAX_TENSOR_NAME_BYTES)
            if name in relative:
                raise ModelFormatError(self.path, f"tensor {printable(name)}", "is there twice")
            relative[name] = self._read_tensor(header, name, alignment, size)
        start = -(-header.position // alignment) * alignment
        if relative and start > size:
            raise ModelFormatError(
                self.path, "tensor data", f"begins at byte {start}, but the file ends at byte {size}"
            )
        tensors: dict[str, TensorInfo] = {}
        for name, t in relative.items():
            if start + t.offset + t.nbytes > size:
                raise ModelFormatError(
                    self.path,
                    f"tensor {printable(name)}: offset",
                    f"{t.offset} and {t.nbytes} bytes from there reach byte {start + t.offset + t.nbytes}, "
                    f"but the file ends at byte {size}; it is truncated or was written wrongly",
                )
            tensors[name] = TensorInfo(name, t.type, t.shape, self.path, start + t.offset, t.nbytes)
        refuse_overlap(tensors)
        return tensors

    def _read_tensor(self, header: GgufHeader, name: str, alignment: int, size: int) -> TensorInfo:
        """One entry of the table. Its ``offset`` counts from the beginning of the tensor data, which is not
        known before the table has ended."""
        field = f"tensor {printable(name)}"
        dims = header.u32(f"{field}: number of dimensions")
        if not 1 <= dims <= MAX_DIMS:
            raise ModelFormatError(
                self.path, f"{field}: number of dimensions", f"is {dims}; 1 to {MAX_DIMS} are allowed"
            )
        shape = header.u64s(dims, f"{field}: dimensions")[::-1]
        number = header.u32(f"{field}: type")
        offset = header.u64(f"{field}: offset")
        kind = BY_GGML_ID.get(number)
        if kind is None:
            if min(shape) < 1:
                raise ModelFormatError(self.path, f"{field}: dimensions", f"{list(shape)} have a zero")
            return TensorInfo(name, GGML_NAMES.get(number, f"number {number}"), shape, self.path, offset, 0)
        problem = None
        if min(shape) < 1:
            problem = "have a zero"
        elif math.prod(shape) // kind.block_elements > size:
            problem = f"are more than a file of {size} bytes can hold"
        elif shape[-1] % kind.block_elements:
            problem = f"have rows of {shape[-1]}, not whole blocks of {kind.block_elements} ({kind.name})"
        if problem:
            raise ModelFormatError(self.path, f"{field}: dimensions", f"{list(shape)} {problem}")
        if offset % alignment:
            raise ModelFormatError(
                self.path, f"{field}: offset", f"{offset} is not a multiple of the alignment {alignment}"
            )
        return TensorInfo(name, kind.name, shape, self.path, offset, kind.nbytes(math.prod(shape)))
