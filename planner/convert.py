"""From a model file to a pack: the same values, where and how they will be read.

Everything passes through in pieces of a few megabytes, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np

from pi2rt._errors import ConversionError, ModelFormatError, RequestError
from pi2rt.cython_kernels import native
from pi2rt.formats import ModelFile, TensorInfo, open_model_file
from pi2rt.formats.huggingface import COMPANIONS, HuggingFaceDirectory
from pi2rt.formats.pack import PackFile
from pi2rt.formats.pack_header import (
    CHECKSUM_BYTES,
    DIGEST_BYTES,
    Container,
    Source,
    SourceFile,
    encode_metadata,
)
from pi2rt.formats.pack_writer import PackWriter, Planned
from pi2rt.formats.quants import check_scales
from pi2rt.formats.regular_file import RegularFile, drop_cache
from pi2rt.models import ModelDescription, describe
from pi2rt.models.tensors import block_tensors, iterate_tensors

Progress: TypeAlias = Callable[[int, int], None]
"""``progress(done, total)``, in bytes. It may raise, which ends the work."""

PIECE_BYTES = 4 << 20
"""Bytes of the source read at once."""

_COMPANION_BYTES = 128 << 20
_DROP_BYTES = 64 << 20


def convert(
    source_path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the pack of a model. Blocks: from Trio, call it in a thread, and let ``progress`` raise the cancellation.

    Under its name the pack appears whole or not at all. No page of source or pack stays in the page cache.

    Args:
        source_path: a GGUF file or a Hugging Face directory.
        destination: the file to write.
        overwrite: whether a file that is there already may be replaced.
        progress: called between pieces, from the calling thread.

    Raises:
        ModelNotFoundError, ModelFormatError, UnsupportedModelError: as ``open_model_file`` and ``describe`` do, and
            where a scale or value is NaN or infinite.
        RequestError: the source is a pack already, or the destination is there or cannot be written to.
        ConversionError: the disk is full, the source changed meanwhile, or another process writes the same pack.
    """
    destination = Path(destination)
    with open_model_file(source_path) as file:
        if isinstance(file, PackFile):
            raise RequestError(f"{file.path} is a pack already")
        if destination.exists() and any(destination.samefile(path) for path in _source_paths(file)):
            raise RequestError(f"{destination} is the model itself; choose another name")
        _Conversion(file, describe(file), destination, overwrite, progress or _ignore).run()


def reading_order(model: ModelDescription) -> Iterator[str]:
    """Names of a model's tensors as a pack has them: embedding, final norm and head, then layer by layer its vectors
    and its matrices in the order of their use, so that the matrices of a layer lie in one piece."""
    blocks = [tuple(block_tensors(block, model.dim)) for layer in model.layers for block in layer.blocks]
    inside = {name for block in blocks for name, _ in block}
    yield from (name for name, _ in iterate_tensors(model) if name not in inside)
    for layer in model.layers:
        tensors = [each for block in layer.blocks for each in block_tensors(block, model.dim)]
        for dims in (1, 2):
            yield from (name for name, shape in tensors if len(shape) == dims)


@dataclass(slots=True)
class _Conversion:
    file: ModelFile
    model: ModelDescription
    destination: Path
    overwrite: bool
    progress: Progress
    done: int = 0
    total: int = 0
    hashed: list[int] = field(default_factory=lambda: [0])

    def run(self) -> None:
        file = self.file
        container: Container = "huggingface" if isinstance(file, HuggingFaceDirectory) else "gguf"
        tensors, companions = self._tensors(), self._companions()
        plan = [
            Planned(info.name, info.type, info.shape, "blocks16" if is_matrix else "rows")
            for info, is_matrix in tensors
        ]
        plan += [Planned(name, size=len(data)) for name, data in companions.items()]
        before = {path: path.stat() for path in _source_paths(file)}
        files = {
            path: SourceFile(path.name, status.st_size, bytes(DIGEST_BYTES))
            for path, status in before.items()
        }
        source = Source(file.path.resolve().name, container, tuple(files.values()))
        self.total = sum(info.nbytes for info, _ in tensors) + sum(each.nbytes for each in files.values())
        metadata = encode_metadata(file.metadata, container)
        writer = PackWriter(
            self.destination, source, file.architecture, metadata, plan, overwrite=self.overwrite
        )
        stop = threading.Event()
        with writer, ThreadPoolExecutor(1, "pi2rt digest") as pool:
            digests = pool.submit(self._digests, list(before), stop)
            try:
                self._write(writer, tensors, companions)
                found = self._await(digests)
            finally:
                stop.set()
            after = {path: path.stat() for path in before}
            for path, status in after.items():
                old = before[path]
                if (status.st_size, status.st_mtime_ns) != (old.st_size, old.st_mtime_ns):
                    raise ConversionError(f"{path} changed while it was converted; convert it again")
            files = {path: SourceFile(each.name, each.nbytes, found[path]) for path, each in files.items()}
            writer.finish(Source(source.name, source.container, tuple(files.values())))
        self.progress(self.total, self.total)

    def _tensors(self) -> list[tuple[TensorInfo, bool]]:
        """(tensor, whether it becomes row blocks). Vectors that the description does not name may be part of how it
        is made (factors of the rotation): they come last."""
        found = self.file.tensors
        named = [found[name] for name in reading_order(self.model)]
        names = {info.name for info in named}
        rest = [info for info in found.values() if info.name not in names and len(info.shape) == 1]
        return [(info, len(info.shape) == 2) for info in named] + [
            (info, False) for info in rest if info.nbytes
        ]

    def _companions(self) -> Mapping[str, bytes]:
        found = {name: self.file.read_companion(name, _COMPANION_BYTES) for name in COMPANIONS}
        return {name: data for name, data in found.items() if data is not None}

    def _write(
        self, writer: PackWriter, tensors: list[tuple[TensorInfo, bool]], companions: Mapping[str, bytes]
    ) -> None:
        used = {name for name, _ in iterate_tensors(self.model)}
        with _Dropper() as dropper:
            for info, is_matrix in tensors:
                if is_matrix:
                    self._write_matrix(writer, info)
                else:
                    self._write_vector(writer, info, check=info.name in used)
                dropper.drop(info)
        for name, data in companions.items():
            writer.write(name, np.frombuffer(data, np.uint8))

    def _write_vector(self, writer: PackWriter, info: TensorInfo, *, check: bool) -> None:
        raw = self.file.read(info.name)
        if check and check_scales(info.type, raw) is not None:
            raise ModelFormatError(self.file.path, f"tensor {info.name}", "holds NaN or infinity")
        writer.write(info.name, raw)
        self._advance(info.nbytes)

    def _write_matrix(self, writer: PackWriter, info: TensorInfo) -> None:
        rows, columns = info.shape
        row_bytes = info.nbytes // rows
        step = max(16, PIECE_BYTES // row_bytes // 16 * 16)
        source = native.Memory(min(step, rows) * row_bytes)
        blocks = native.Memory(native.matrix_bytes(info.type, min(step, rows), columns))
        try:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                raw = source.view()[: count * row_bytes]
                self.file.read_into(info, first * row_bytes, raw.data)
                bad = native.repack(info.type, raw, count, columns, blocks.address)
                if bad is not None:
                    raise ModelFormatError(
                        self.file.path,
                        f"tensor {info.name}",
                        f"row {first + bad} holds NaN or infinity in a scale or value",
                    )
                writer.write(info.name, blocks.view()[: native.matrix_bytes(info.type, count, columns)])
                self._advance(raw.nbytes)
        finally:
            source.close()
            blocks.close()

    def _advance(self, count: int) -> None:
        self.done += count
        self.progress(self.done + self.hashed[0], self.total)

    def _digests(self, paths: list[Path], stop: threading.Event) -> dict[Path, bytes]:
        """On a thread of its own: the digest of each file. Stops early, with nonsense, when told to."""
        buffer = bytearray(PIECE_BYTES)
        found: dict[Path, bytes] = {}
        for path in paths:
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            file = RegularFile(path)
            try:
                for start in range(0, file.size, PIECE_BYTES):
                    if stop.is_set():
                        return found
                    with memoryview(buffer)[: file.size - start] as view:
                        file.read_into(start, view)
                        digest.update(view)
                    file.drop_cache(start, PIECE_BYTES)
                    self.hashed[0] += min(PIECE_BYTES, file.size - start)
            finally:
                file.close()
            found[path] = digest.digest()
        return found

    def _await(self, digests: Future[dict[Path, bytes]]) -> dict[Path, bytes]:
        while not digests.done():
            wait([digests], timeout=0.1)
            self._advance(0)
        return digests.result()


class _Dropper:
    """Drops what was read of a model's files from the page cache."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def drop(self, info: TensorInfo) -> None:
        if info.path not in self._fds:
            self._fds[info.path] = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
        drop_cache(self._fds[info.path], info.offset, info.nbytes)


def _source_paths(file: ModelFile) -> list[Path]:
    """Every file that is read of a model."""
    if not isinstance(file, HuggingFaceDirectory):
        return [file.path]
    names = ("config.json", "model.safetensors.index.json", *COMPANIONS)
    paths = [path for name in names if (path := file.companion(name)) is not None]
    return list(dict.fromkeys((*paths, *(info.path for info in file.tensors.values()))))


def _ignore(done: int, total: int) -> None: ...


# -- verifying


@dataclass(frozen=True, slots=True)
class Broken:
    """A tensor or companion of a pack that is not what was written, and why."""

    name: str
    problem: str


def verify(path: str | os.PathLike[str], *, progress: Progress | None = None) -> tuple[Broken, ...]:
    """Reads a whole pack and compares every checksum. Blocks, as ``convert`` does.

    Returns:
        What is broken, in the order of the file; () where nothing is.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelFormatError: it is no pack, or its header is broken.
    """
    report = progress or _ignore
    with PackFile(Path(path)) as file:
        sections = file.sections
        total, done = sum(section.nbytes for section in sections), 0
        broken: list[Broken] = []
        buffer = bytearray(PIECE_BYTES)
        for section in sections:
            digest = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
            try:
                for start in range(0, section.nbytes, PIECE_BYTES):
                    with memoryview(buffer)[: section.nbytes - start] as view:
                        file.read_section(section, start, view)
                        digest.update(view)
                        done += len(view)
                    report(done, total)
                problem = None if digest.digest() == section.checksum else "its checksum does not match"
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
            if problem is not None:
                broken.append(Broken(section.name, problem))
        return tuple(broken)
