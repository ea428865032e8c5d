"""What every model file offers, whatever its container."""

from __future__ import annotations

import itertools
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pi2rt._errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from pi2rt.formats.neuron_bundles import NeuronBundles
from pi2rt.formats.quants import TYPES
from pi2rt.formats.regular_file import RegularFile, file_mode

_NO_BUNDLES: Mapping[str, NeuronBundles] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is. ``shape`` is numpy's, rows first; ``type`` is a name in
    ``pi2rt.formats.quants.TYPES`` ("F32", "Q4_K"), or, of a tensor that pi2rt cannot read, the container's name of its
    type, with ``nbytes`` 0: files may have such tensors as long as the model does not use them.

    ``layout``: "rows", as model files have them, contiguous, ``nbytes / shape[0]`` each; or, in a pack only,
    "blocks16", the row blocks that kernels read (``pi2rt.formats.row_blocks``), or "neurons": its quants are in the
    bundles that name it (``ModelFile.bundles``), and ``offset`` and ``nbytes`` are those of its scales alone.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    layout: str = "rows"


class ModelFile(ABC):
    """An open model: metadata and tensors. Every length, offset and count was checked against the file when
    it was opened, so reads stay inside it (and a file that shrank since is a ModelFormatError)."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]  # GGUF's keys, or config.json of a Hugging Face directory
    tensors: Mapping[str, TensorInfo]
    bundles: Mapping[str, NeuronBundles] = _NO_BUNDLES  # by the name of the down tensor; only packs have some

    @abstractmethod
    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fills ``buffer`` with the tensor's bytes from byte ``start`` on. Thread-safe, releases the GIL."""

    @property
    def held_path(self) -> str:
        """A path that opens, while this is open, the file whose header was checked; see ``RegularFile``."""
        return os.fspath(self.path)

    def read_bundles_into(self, bundles: NeuronBundles, start: int, buffer: memoryview) -> None:
        """As ``read_into``, for the pages of one of ``bundles``."""
        raise ValueError(f"{self.path} has no bundles {bundles.name!r}")

    def forget(self, tensor: TensorInfo | NeuronBundles, start: int, count: int) -> None:  # noqa: B027
        """Asks the system to keep none of these bytes of the tensor (or bundles) in its page cache: they count against
        a memory limit. Does nothing for files that are only read where memory is free."""

    @abstractmethod
    def close(self) -> None: ...

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The raw bytes of a tensor, as uint8 (nbytes,).

        Raises:
            UnsupportedModelError: it has a type that pi2rt does not have.
        """
        tensor = self.tensors[name]
        check_type(tensor)
        out = np.empty(tensor.nbytes, np.uint8)
        self.read_into(tensor, 0, out.data)
        return out

    def companion(self, name: str) -> Path | None:
        """A file that came with the model ("tokenizer.json"), or None: a single file has no companions."""
        return None

    def read_companion(self, name: str, limit: int) -> bytes | None:
        """The content of such a file, of at most ``limit`` bytes, or None where there is none.

        Raises:
            ModelFormatError: it is larger.
        """
        path = self.companion(name)
        if path is None:
            return None
        file = RegularFile(path)
        try:
            if file.size > limit:
                raise ModelFormatError(path, "file", f"has more than the {limit} bytes allowed")
            return bytes(file.read(0, file.size))
        finally:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def printable(name: str) -> str:
    """A name from a file as it may go into an error message: no control characters, and not endless."""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return shown if len(shown) <= 80 else shown[:77] + "..."


def check_type(tensor: TensorInfo) -> None:
    """Raises UnsupportedModelError where a tensor that the model uses has a type that pi2rt does not have."""
    if tensor.type not in TYPES:
        raise UnsupportedModelError(
            tensor.path,
            f"tensor {printable(tensor.name)}: type",
            f"is {printable(tensor.type)}; pi2rt reads {', '.join(TYPES)}",
        )


def refuse_overlap(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises ModelFormatError where two tensors of one file share bytes."""
    order = sorted((t for t in tensors.values() if t.nbytes), key=lambda t: t.offset)
    for before, after in itertools.pairwise(order):
        if before.offset + before.nbytes > after.offset:
            raise ModelFormatError(
                after.path,
                f"tensor {printable(after.name)}: offset",
                f"byte {after.offset} of the file lies inside tensor {printable(before.name)}",
            )


def open_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Opens a GGUF file (or all parts of a model in several), a pack, or a Hugging Face directory (config.json,
    *.safetensors, tokenizer.json).

    Raises:
        ModelNotFoundError: nothing is there.
        ModelFormatError: it is malformed; the message names the file and the field.
    """
    from pi2rt.formats.gguf import GgufFile
    from pi2rt.formats.huggingface import HuggingFaceDirectory
    from pi2rt.formats.pack import PackFile, is_pack

    path = Path(path)
    mode = file_mode(path)
    if not mode:
        raise ModelNotFoundError(f"{path}: no such file or directory")
    if stat.S_ISDIR(mode):
        return HuggingFaceDirectory(path)
    if stat.S_ISREG(mode):
        return PackFile(path) if is_pack(path) else GgufFile(path)
    raise ModelFormatError(path, "file", "neither a regular file nor a directory")
