"""GGUF models: one file, or several parts that ``llama-gguf-split`` made of one.

Parts are called ``NAME-00001-of-00003.gguf`` and so on. Each is a GGUF file with tensors of its own; the first one has
the metadata of the model, and all of them say which part of how many they are (``split.no``, ``split.count``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi2rt._errors import ModelFormatError, ModelNotFoundError
from pi2rt.formats.gguf_part import GgufPart
from pi2rt.formats.model_file import ModelFile, TensorInfo, printable
from pi2rt.formats.part_names import MAX_PARTS, part_names
from pi2rt.formats.stacked_experts import split_experts


class GgufFile(ModelFile):
    """An open GGUF model.

    ``metadata`` is that of the first part. ``tensors`` are in the order of the parts, and of each file, and each
    expert's matrix is one by itself (``stacked_experts``).

    Args:
        path: the file; of a model in parts, any of them. ``self.path`` is the first one.

    Raises:
        ModelNotFoundError: it cannot be opened, or a part is missing.
        ModelFormatError: it is malformed, or the parts are not those of one model; the message names the field.
        UnsupportedModelError: it is big endian or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._parts: dict[Path, GgufPart] = {}
        try:
            opened = self._open(Path(path))
            count = _split_number(opened, "split.count", 1)
            if count > 1:
                self._open_parts(opened, count)
            first, *others = self._parts.values()
            self.path = first.path
            self.metadata: dict[str, Any] = first.metadata
            self.architecture: str = self._architecture()
            tensors = dict(first.tensors)
            for part in others:
                for name, info in part.tensors.items():
                    if name in tensors:
                        problem = f"is in {tensors[name].path.name}, too"
                        raise ModelFormatError(part.path, f"tensor {printable(name)}", problem)
                    tensors[name] = info
            expected = _split_number(first, "split.tensors.count", len(tensors))
            if expected != len(tensors):
                raise ModelFormatError(
                    self.path,
                    "metadata split.tensors.count",
                    f"is {expected}, but the parts have {len(tensors)}",
                )
            self.tensors: dict[str, TensorInfo] = split_experts(tensors)
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the model, in order."""
        return tuple(self._parts)

    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        part = self._parts.get(tensor.path)
        if part is None or start < 0 or start + buffer.nbytes > tensor.nbytes:
            raise ValueError(
                f"{buffer.nbytes} bytes from byte {start} on are not inside tensor {tensor.name!r} "
                f"({tensor.nbytes} bytes) of {self.path}"
            )
        part.file.read_into(tensor.offset + start, buffer)

    def close(self) -> None:
        """Closes the files; again is nothing. No read may be running."""
        for part in self._parts.values():
            part.file.close()

    def _open(self, path: Path) -> GgufPart:
        part = self._parts[path] = GgufPart(path)
        return part

    def _open_parts(self, opened: GgufPart, count: int) -> None:
        """Opens the other parts; then ``_parts`` has all of them in order."""
        if count > MAX_PARTS:
            raise ModelFormatError(
                opened.path, "metadata split.count", f"is {count}; at most {MAX_PARTS} parts are allowed"
            )
        names = part_names(opened.path.name)
        number = _split_number(opened, "split.no", 0)
        if not 0 <= number < count:
            problem = f"is {number}; the parts are numbered from 0 to {count - 1}"
            raise ModelFormatError(opened.path, "metadata split.no", problem)
        if len(names) != count or names[number] != opened.path.name:
            raise ModelFormatError(
                opened.path,
                "name",
                f"this is part {number + 1} of {count}; the others are found by their names, so it has to be called "
                f"NAME-{number + 1:05}-of-{count:05}.gguf",
            )
        self._parts.clear()
        for k, name in enumerate(names):
            path = opened.path.with_name(name)
            if k == number:
                self._parts[path] = opened
                continue
            if not path.exists():
                opened.file.close()
                raise ModelNotFoundError(
                    f"{path}: no such file; it is part {k + 1} of {count} of the model that {opened.path.name} belongs "
                    f"to, and all parts are needed, in one directory"
                )
            part = self._open(path)
            for key, right in ("split.count", count), ("split.no", k):
                if (found := _split_number(part, key, -1)) != right:
                    raise ModelFormatError(
                        path, f"metadata {key}", f"is {found}, but {opened.path.name} says {right}"
                    )

    def _architecture(self) -> str:
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str) or not value:
            problem = (
                "is missing" if value is None else f"is {type(value).__name__}, not a string with text in it"
            )
            raise ModelFormatError(self.path, "metadata general.architecture", problem)
        return value


def _split_number(part: GgufPart, key: str, default: int) -> int:
    """One of the numbers that parts carry. 0 parts, as some writers have it, are one file."""
    value = part.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelFormatError(part.path, f"metadata {key}", f"is a {type(value).__name__}, not an integer")
    return value
