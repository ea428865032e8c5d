"""Reads the head of a GGUF file front to back, believing nothing it says.

A window over the file is refilled with ``pread`` in growing chunks, so that a header of two megabytes never
maps (or keeps) more than itself. Before anything is allocated for a count or a length, the count or length
is held against the bytes left in the file and against the limits below, which are far above any real model.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pi2rt._errors import ModelFormatError
from pi2rt.formats.regular_file import RegularFile

MAX_HEADER_BYTES = 128 << 20
MAX_KEY_BYTES = (1 << 16) - 1  # the specification's own limit
MAX_STRINGS = 1 << 21  # in all arrays together; Gemma's tokens and merges are 0.8 million
MAX_ARRAYS = 1 << 16  # inside other arrays; no known model has one
MAX_NESTING = 4

_FIRST_CHUNK = 1 << 16
_LAST_CHUNK = 1 << 20
_FAST_BYTES = 1 << 16  # what one pass of _short_strings looks at
_SLOW_STRINGS = 256  # read one by one where a pass gave fewer than that, so that the passes stay linear;
_MOST_SLOW_STRINGS = 1 << 14  # twice as many each time in a row

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Mapping[int, struct.Struct] = MappingProxyType(
    {
        i: struct.Struct("<" + code)
        for i, code in zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True)
    }
)
_SMALLEST = MappingProxyType({_BOOL: 1, _STRING: 8, _ARRAY: 12} | {i: s.size for i, s in _SCALARS.items()})


class GgufHeader:
    """A cursor over the header. A method that finds the file lying or ending raises ModelFormatError.

    Args:
        file: the file, read from byte 0.
    """

    __slots__ = ("_arrays", "_base", "_chunk", "_data", "_file", "_pos", "_strings")

    def __init__(self, file: RegularFile) -> None:
        self._file = file
        self._data = b""  # the window
        self._base = 0  # where it begins in the file
        self._pos = 0  # where the cursor is in it
        self._chunk = _FIRST_CHUNK
        self._strings = 0  # in arrays, so far
        self._arrays = 0

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._base + self._pos

    @property
    def remaining(self) -> int:
        """Bytes from the cursor to the end of the file."""
        return self._file.size - self.position

    def u32(self, field: str) -> int:
        at = self._take(4, field)
        return int(_U32.unpack_from(self._data, at)[0])

    def u64(self, field: str) -> int:
        at = self._take(8, field)
        return int(_U64.unpack_from(self._data, at)[0])

    def u64s(self, count: int, field: str) -> tuple[int, ...]:
        at = self._take(8 * count, field)
        return struct.unpack_from(f"<{count}Q", self._data, at)

    def string(self, field: str, limit: int = MAX_HEADER_BYTES, errors: str = "replace") -> str:
        """A length and as many bytes of UTF-8; what is not UTF-8 becomes U+FFFD. Such bytes are found in descriptions
        and in tokens that no text has, and are no reason to refuse a model."""
        length = self.u64(field)
        if limit < length <= self.remaining:
            raise ModelFormatError(
                self._file.path, field, f"is {length} bytes long; at most {limit} are allowed"
            )
        at = self._take(length, field)
        return self._data[at : at + length].decode(errors=errors)

    def name(self, field: str, limit: int) -> str:
        """A string that is not empty and at most ``limit`` bytes long. Names that differ stay different: bytes that are
        not UTF-8 are spelled as escapes."""
        text = self.string(field, limit, "backslashreplace")
        if not text:
            raise ModelFormatError(self._file.path, field, "is empty")
        return text

    def value(self, field: str) -> Any:
        """A metadata value behind its type number: int, float, bool, str, a read-only one-dimensional numpy
        array (array of numbers or bools), a list of str, or a list of those (nested arrays)."""
        return self._value(self.u32(field), field, 0)

    def _value(self, kind: int, field: str, depth: int) -> Any:
        if kind == _STRING:
            return self.string(field)
        if kind == _BOOL:
            at = self._take(1, field)  # first: it may replace the window
            return self._data[at] != 0
        if kind == _ARRAY:
            return self._array(field, depth + 1)
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise ModelFormatError(self._file.path, field, f"has value type {kind}; types are 0 to 12")
        at = self._take(scalar.size, field)
        return scalar.unpack_from(self._data, at)[0]

    def _array(self, field: str, depth: int) -> Any:
        if depth > MAX_NESTING:
            raise ModelFormatError(
                self._file.path, field, f"nests arrays deeper than the {MAX_NESTING} levels allowed"
            )
        kind = self.u32(field)
        count = self.u64(field)
        size = _SMALLEST.get(kind)
        if size is None:
            raise ModelFormatError(self._file.path, field, f"has elements of type {kind}; types are 0 to 12")
        if count * size > self.remaining:
            raise ModelFormatError(
                self._file.path,
                field,
                f"claims {count} elements of {size} bytes or more, but {self.remaining} bytes are left",
            )
        if kind == _STRING:
            self._strings = self._count(count, self._strings, MAX_STRINGS, field, "strings in arrays")
            return self._string_array(count, field)
        if kind == _ARRAY:
            self._arrays = self._count(count, self._arrays, MAX_ARRAYS, field, "arrays in arrays")
            return [self._array(field, depth + 1) for _ in range(count)]
        at = self._take(count * size, field)
        numbers: npt.NDArray[Any]
        if kind == _BOOL:
            numbers = np.frombuffer(self._data, np.uint8, count, at) != 0
        else:
            numbers = np.frombuffer(
                self._data, _SCALARS[kind].format, count, at
            ).copy()  # lets go of the window
        numbers.flags.writeable = False
        return numbers

    def _count(self, count: int, before: int, limit: int, field: str, what: str) -> int:
        if before + count > limit:
            raise ModelFormatError(
                self._file.path,
                field,
                f"claims {count} elements, {before + count} {what} in all; at most {limit} are allowed",
            )
        return before + count

    def _string_array(self, count: int, field: str) -> list[str]:
        out: list[str] = []
        slow = _SLOW_STRINGS
        while len(out) < count:
            if len(self._data) - self._pos < _FAST_BYTES:
                self._refill(0, field)
            fast = self._short_strings(count - len(out))
            out += fast
            if len(fast) >= _SLOW_STRINGS:
                slow = _SLOW_STRINGS
                continue
            whole = self._whole_strings(min(slow, count - len(out)))
            out += whole
            if len(whole) < slow and len(out) < count:  # the next one leaves the window
                out.append(self.string(f"{field}[{len(out)}]"))
            slow = min(2 * slow, _MOST_SLOW_STRINGS)
        return out

    def _whole_strings(self, count: int) -> list[str]:
        """The next ``count`` strings, one by one; fewer where one is not all in the window."""
        out: list[str] = []
        data, at, end = self._data, self._pos, len(self._data)
        for _ in range(count):
            if end - at < 8 or end - at - 8 < (length := _U64.unpack_from(data, at)[0]):
                break
            out.append(data[at + 8 : at + 8 + length].decode(errors="replace"))
            at += 8 + length
        self._pos = at
        return out

    def _short_strings(self, count: int) -> list[str]:
        """As many of the next ``count`` strings as can be told apart without a look at each; maybe none.

        A vocabulary is a hundred thousand strings, and a Python loop over them takes longer than all the
        rest of opening a model. Where a string has 1 to 255 bytes and no NUL in it, its length is the only
        place with zeros: one byte and then exactly seven NULs. So the zeros of a stretch of the window come
        in groups of seven, group i ends where string i begins, and that is proved string by string: group i
        is seven in a row, and the byte before it is the distance to the byte before group i + 1. Then the
        lengths become separators, and decoding and splitting are one call each.
        """
        stretch = np.frombuffer(
            self._data, np.uint8, min(_FAST_BYTES, len(self._data) - self._pos), self._pos
        )
        zeros = np.flatnonzero(stretch == 0)[: 7 * (count + 1)]
        groups = zeros[: len(zeros) // 7 * 7].reshape(-1, 7)
        if len(groups) < 2 or groups[0, 0] != 1 or groups[0, 6] != 7:
            return []
        lengths_at = groups[:, 0] - 1
        proved = (groups[1:, 6] - groups[1:, 0] == 6) & (
            np.diff(lengths_at) == 8 + stretch[lengths_at[:-1]].astype(np.int64)
        )
        strings = len(proved) if proved.all() else int(proved.argmin())
        if strings == 0:
            return []
        end = int(lengths_at[strings])
        keep = stretch[:end] != 0
        text = stretch[:end].copy()
        text[lengths_at[:strings]] = 0
        try:
            decoded = text[keep].tobytes().decode()
        except UnicodeDecodeError:  # the loop takes these strings one by one
            return []
        self._pos += end
        strings_read: list[str] = decoded.split("\0")[1:]
        return strings_read

    def _take(self, count: int, field: str) -> int:
        """Where in the window the next ``count`` bytes begin; they are all in it, the cursor behind them."""
        if len(self._data) - self._pos < count:
            if count > self.remaining:
                raise ModelFormatError(
                    self._file.path,
                    field,
                    f"needs {count} bytes at byte {self.position}, but the file ends at {self._file.size}",
                )
            self._refill(count, field)
        at = self._pos
        self._pos += count
        return at

    def _refill(self, count: int, field: str) -> None:
        """Moves the window to the cursor; at least ``count`` bytes, which the file has, are then in it."""
        if self.position + count > MAX_HEADER_BYTES:
            raise ModelFormatError(
                self._file.path,
                field,
                f"reaches byte {self.position + count}; a header of at most {MAX_HEADER_BYTES} is allowed",
            )
        size = min(max(count, self._chunk), self.remaining)
        self._data, self._base, self._pos = bytes(self._file.read(self.position, size)), self.position, 0
        self._chunk = min(2 * self._chunk, _LAST_CHUNK)
