"""From a model file to a pack: the same values, where and how they will be read.

Everything passes through in pieces of a few megabytes, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias

import numpy as np

from pi2rt._errors import ConversionError, ModelFormatError, RequestError, UnsupportedModelError
from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import ModelFile, TensorInfo, open_model_file
from pi2rt.formats.gguf import GgufFile
from pi2rt.formats.huggingface import COMPANIONS, MAX_CONFIG_BYTES, HuggingFaceDirectory
from pi2rt.formats.neuron_bundles import GROUP
from pi2rt.formats.neuron_bundles import TYPES as BUNDLED_TYPES
from pi2rt.formats.pack import PackFile, model_digest
from pi2rt.formats.pack_header import (
    CHECKSUM_BYTES,
    DIGEST_BYTES,
    NEVER_REST,
    Container,
    Source,
    SourceFile,
    encode_metadata,
)
from pi2rt.formats.pack_writer import PackWriter, Planned
from pi2rt.formats.quants import TYPES, check_scales
from pi2rt.formats.regular_file import RegularFile
from pi2rt.formats.row_blocks import ROWS
from pi2rt.models import ModelDescription, describe
from pi2rt.models.tensors import iterate_tensors
from pi2rt.planner.pack.bundling import (
    Bundled,
    BundleWriter,
    Bundling,
    bundled_blocks,
    planned_pages,
    planned_scales,
)
from pi2rt.planner.pack.findings import Dense, Findings

Progress: TypeAlias = Callable[[int, int], None]
"""``progress(done, total)``, in bytes. It may raise, which ends the work."""

PIECE_BYTES = 4 << 20
"""Bytes of the source read at once."""

_COMPANION_BYTES = 128 << 20


def convert(
    source_path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    bundles: Bundling = "relu",
    calibration: str | os.PathLike[str] | Findings | None = None,
    dense_above: float | None = None,
    progress: Progress | None = None,
) -> tuple[Dense, ...]:
    """Writes the pack of a model. Blocks: from Trio, call it in a thread, and let ``progress`` raise the cancellation.

    Under its name the pack appears whole or not at all. No page of source or pack stays in the page cache.

    Args:
        source_path: a GGUF file (or a part of a model in several) or a Hugging Face directory.
        destination: the file to write.
        overwrite: whether a file that is there already may be replaced.
        bundles: which feed-forward blocks are stored by neuron: "relu", those whose neurons can be inactive without
            thresholds; "gates", these with their gates; "all", as thresholds need it; or "off".
        calibration: what was found of the same model (``pi2rt calibrate``): bundles lie in its order, and of ReLU
            blocks whose neurons are rarely inactive the matrices stay whole. Changes no result.
        dense_above: the share of a block's active neurons above which its matrices stay whole; None: where that takes
            less time, measured on this machine (``crossover``).
        progress: called between pieces, from the calling thread.

    Raises:
        ModelNotFoundError, ModelFormatError, UnsupportedModelError: as ``open_model_file`` and ``describe`` do, and
            where a scale or value is NaN or infinite.
        RequestError: the source is a pack already, or the destination is there or cannot be written to, or the
            calibration is not of this model's bundles.
        ConversionError: the disk is full, the source changed meanwhile, or another process writes the same pack.

    Returns:
        The ReLU blocks whose matrices stay whole because of their calibration.
    """
    found = calibration
    if isinstance(found, str | os.PathLike):
        found = Findings.of(found, dense_above)
    with open_model_file(source_path) as file:
        return convert_file(
            file, destination, overwrite=overwrite, bundles=bundles, findings=found, progress=progress
        )


def convert_file(
    file: ModelFile,
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    bundles: Bundling = "relu",
    findings: Findings | None = None,
    progress: Progress | None = None,
) -> tuple[Dense, ...]:
    """As ``convert``, of a model that is open. One that is not read from files, but made up as it is read, has metadata
    as GGUF files do, and its pack lists no files as its source."""
    destination = Path(destination)
    if isinstance(file, PackFile):
        raise RequestError(f"{file.path} is a pack already")
    if any(_same_file(destination, path) for path in _source_paths(file)):
        raise RequestError(f"{destination} is the model itself; choose another name")
    work = _Conversion(file, destination, overwrite, bundles, findings or Findings(), progress or _ignore)
    work.run()
    return work.dense


def _same_file(destination: Path, path: Path) -> bool:
    """Whether they are. What is wrong with a destination is found when it is opened."""
    try:
        return destination.samefile(path)
    except (OSError, ValueError):
        return False


def source_stamps(file: ModelFile) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, size and identity) of each file that a model is read from: others once one was replaced or written to."""
    return tuple((os.fspath(path), _stamp(path)) for path in _source_paths(file))


def reading_order(model: ModelDescription) -> Iterator[str]:
    """Names of a model's tensors as a pack has them: embedding, final norm and head, then layer by layer its vectors
    and its matrices in the order of their use, so that the matrices of a layer lie in one piece."""
    blocks = [tuple(block.tensors(model.dim)) for layer in model.layers for block in layer.blocks]
    inside = {name for block in blocks for name, _ in block}
    yield from (name for name, _ in iterate_tensors(model) if name not in inside)
    for layer in model.layers:
        tensors = [each for block in layer.blocks for each in block.tensors(model.dim)]
        for dims in (1, 2):
            yield from (name for name, shape in tensors if len(shape) == dims)


class _Conversion:
    """One run: what goes where, and how far it is."""

    def __init__(
        self,
        file: ModelFile,
        destination: Path,
        overwrite: bool,
        bundles: Bundling,
        findings: Findings,
        progress: Progress,
    ) -> None:
        self._file, self._destination, self._overwrite, self._progress = (
            file,
            destination,
            overwrite,
            progress,
        )
        self._findings = findings
        model = describe(file)
        self._named = {name for name, _ in iterate_tensors(model)}
        # Vectors that the description does not name may be part of how it is made (factors of the rotation).
        rest = [
            info
            for info in file.tensors.values()
            if info.name not in self._named and len(info.shape) == 1 and info.type in TYPES and info.nbytes
        ]
        self._tensors = [*(file.tensors[name] for name in reading_order(model)), *rest]
        try:
            blocks = tuple(bundled_blocks(file, model, bundles, findings.orders))
        except ValueError as error:
            raise findings.refuse(str(error)) from None
        if others := set(findings.orders) - {each.down.name for each in blocks}:
            raise findings.refuse(
                f"is of {min(others)}, which of {file.path} is not stored by neuron (--bundles {bundles})"
            )
        self.dense = (
            tuple(findings.dense(blocks)) if bundles != "all" else ()
        )  # thresholds may leave neurons inactive
        whole = {each.down for each in self.dense}
        self._bundled = tuple(each for each in blocks if each.down.name not in whole)
        if findings.source is not None and not findings.orders and not whole:
            raise findings.refuse(
                "has no order of neurons, and no block whose neurons are rarely inactive: it would change nothing"
            )
        useless = {
            "all": not blocks,
            "gates": all(each.gate is None for each in blocks),
        }
        if useless.get(bundles):
            what = "feed-forward blocks" if bundles == "all" else "gates of ReLU feed-forward blocks"
            raise UnsupportedModelError(
                file.path,
                what,
                f"cannot be stored by neuron, for there are none of type {', '.join(BUNDLED_TYPES)} with a multiple of "
                f"{GROUP} neurons; leave out --bundles {bundles}",
            )
        self._paths = _source_paths(file)
        self._stamps = [_stamp(path) for path in self._paths]
        self._total = sum(info.nbytes for info in self._tensors) + sum(size for size, *_ in self._stamps)
        self._converted = 0
        self._hashed = 0  # written by the thread that hashes

    def run(self) -> None:
        file = self._file
        container: Container = "huggingface" if isinstance(file, HuggingFaceDirectory) else "gguf"
        config = file.read_companion("config.json", MAX_CONFIG_BYTES) if container == "huggingface" else None
        metadata = encode_metadata(file.metadata if config is None else config.decode("utf-8-sig"))
        found = {name: file.read_companion(name, _COMPANION_BYTES) for name in COMPANIONS}
        companions = {name: data for name, data in found.items() if data is not None}
        plan = list(self._planned())
        plan += [Planned(name, size=len(data)) for name, data in companions.items()]
        source = self._source(container, [bytes(DIGEST_BYTES)] * len(self._paths))
        writer = PackWriter(
            self._destination,
            source,
            file.architecture,
            metadata,
            plan,
            overwrite=self._overwrite,
            flags=0 if all(each.rests for each in self._bundled) else NEVER_REST,
        )
        stop = threading.Event()
        with writer, ThreadPoolExecutor(1, "pi2rt digest") as pool:
            digests = pool.submit(self._digests, stop)
            try:
                self._write_tensors(writer)
                for name, data in companions.items():
                    writer.write(name, np.frombuffer(data, np.uint8))
                found_digests = self._await(digests)
                self._refuse_others(found_digests)
                source = self._source(container, found_digests)
            finally:
                stop.set()
            for path, stamp in zip(self._paths, self._stamps, strict=True):
                if _stamp(path) != stamp:
                    raise ConversionError(f"{path} changed while it was converted; convert it again")
            writer.finish(source)

    def _refuse_others(self, digests: Sequence[bytes]) -> None:
        """Names and shapes are those of any model of the kind; what was found of another one would be worth nothing."""
        if self._findings.source is not None and digests and self._findings.source != model_digest(digests):
            raise self._findings.refuse(
                f"is of another model than {self._file.path}; calibrate again (pi2rt calibrate)"
            )

    def _planned(self) -> Iterator[Planned]:
        by_neuron = {info.name: each for each in self._bundled for info in each.tensors}
        for info in self._tensors:
            if info.name in by_neuron:
                yield planned_scales(info, by_neuron[info.name])
            else:
                yield Planned(
                    info.name, info.type, info.shape, "blocks16" if self._is_matrix(info) else "rows"
                )
            yield from map(planned_pages, self._bundles_behind(info))

    def _bundles_behind(self, info: TensorInfo) -> list[Bundled]:
        return [each for each in self._bundled if each.last == info.name]

    def _is_matrix(self, info: TensorInfo) -> bool:
        return info.name in self._named and len(info.shape) == 2

    def _source(self, container: Container, digests: Sequence[bytes]) -> Source:
        files = zip(self._paths, self._stamps, digests, strict=True)
        return Source(
            _text(self._file.path.resolve().name),
            container,
            tuple(SourceFile(_text(path.name), stamp[0], digest) for path, stamp, digest in files),
        )

    def _write_tensors(self, writer: PackWriter) -> None:
        bundles = BundleWriter(self._file, writer, self._bundled, self._advance)
        with _Dropper(self._paths) as dropper:
            for info in self._tensors:
                if not bundles.write_scales(info):  # of what it writes, the quants will be read
                    if self._is_matrix(info):
                        self._write_matrix(writer, info)
                    else:
                        self._write_vector(writer, info)
                    dropper.drop(info)
                for block in self._bundles_behind(info):
                    bundles.write_pages(block)
                    for each in block.tensors:
                        dropper.drop(each)

    def _write_vector(self, writer: PackWriter, info: TensorInfo) -> None:
        block = TYPES[info.type].block_bytes
        for start in range(0, info.nbytes, PIECE_BYTES // block * block):
            raw = np.empty(min(PIECE_BYTES // block * block, info.nbytes - start), np.uint8)
            self._file.read_into(info, start, raw.data)
            if info.name in self._named and check_scales(info.type, raw) is not None:
                raise ModelFormatError(self._file.path, f"tensor {info.name}", "holds NaN or infinity")
            writer.write(info.name, raw)
            self._advance(raw.nbytes)

    def _write_matrix(self, writer: PackWriter, info: TensorInfo) -> None:
        rows, columns = info.shape
        row_bytes = info.nbytes // rows
        step = min(rows, max(ROWS, PIECE_BYTES // row_bytes // ROWS * ROWS))
        source = native.Memory(step * row_bytes)
        blocks = native.Memory(native.matrix_bytes(info.type, step, columns))
        try:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                raw = source.view()[: count * row_bytes]
                self._file.read_into(info, first * row_bytes, raw.data)
                bad = native.repack(info.type, raw, count, columns, blocks.address)
                if bad is not None:
                    raise ModelFormatError(
                        self._file.path,
                        f"tensor {info.name}",
                        f"row {first + bad} holds NaN or infinity in a scale or value",
                    )
                writer.write(info.name, blocks.view()[: native.matrix_bytes(info.type, count, columns)])
                self._advance(raw.nbytes)
        finally:
            source.close()
            blocks.close()

    def _advance(self, count: int) -> None:
        self._converted += count
        self._progress(self._converted + self._hashed, self._total)

    def _digests(self, stop: threading.Event) -> list[bytes]:
        """On a thread of its own: the digest of each file of the source. Incomplete when told to stop."""
        buffer = bytearray(PIECE_BYTES)
        found: list[bytes] = []
        for path in self._paths:
            digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
            file = RegularFile(path)
            try:
                for start in range(0, file.size, PIECE_BYTES):
                    if stop.is_set():
                        return found
                    with memoryview(buffer)[: file.size - start] as view:
                        file.read_into(start, view)
                        digest.update(view)
                        self._hashed += len(view)
                    file.drop_cache(start, PIECE_BYTES)
            finally:
                file.close()
            found.append(digest.digest())
        return found

    def _await(self, digests: Future[list[bytes]]) -> list[bytes]:
        while not digests.done():
            wait([digests], timeout=0.1)
            self._advance(0)
        return digests.result()


class _Dropper:
    """Drops what was read of a model's files from the page cache, with descriptors of its own."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __enter__(self) -> Self:
        self._files = {path: RegularFile(path) for path in self._paths}
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.drop_cache(0, file.size)
            file.close()

    def drop(self, info: TensorInfo) -> None:
        if info.path in self._files:
            self._files[info.path].drop_cache(info.offset, info.nbytes)


def _source_paths(file: ModelFile) -> list[Path]:
    """Every file that is read of a model."""
    if isinstance(file, GgufFile):
        return [*file.paths]
    if not isinstance(file, HuggingFaceDirectory):
        return []
    names = ("config.json", "model.safetensors.index.json", *COMPANIONS)
    paths = [path for name in names if (path := file.companion(name)) is not None]
    return list(dict.fromkeys((*paths, *(info.path for info in file.tensors.values()))))


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """Size and identity of a file, which change when it is replaced or written to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _text(name: str) -> str:
    """A file's name, which need not be UTF-8, as text."""
    return os.fsencode(name).decode(errors="replace") or "model"


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
                    file.drop_cache(section)
                    report(done, total)
                problem = None if digest.digest() == section.checksum else "its checksum does not match"
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
            if problem is not None:
                broken.append(Broken(section.name, problem))
        return tuple(broken)
