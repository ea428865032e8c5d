"""Our own container, the pack: everything where a reader with O_DIRECT wants it, matrices as the kernels want them.

Written by ``pi2rt convert`` (``planner/pack/convert.py``). ``docs/pack-format.md`` has the byte layout.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats import neuron_bundles, neuron_order, row_blocks
from pi2rt.formats.model_file import ModelFile, TensorInfo, printable
from pi2rt.formats.neuron_bundles import Matrix, NeuronBundles
from pi2rt.formats.pack_header import (
    ALIGNMENT,
    DIGEST_BYTES,
    FLAGS,
    MAGIC,
    MAX_HEADER_BYTES,
    ORDERED,
    PREAMBLE_BYTES,
    VERSION,
    BundlesEntry,
    Header,
    MetadataError,
    Region,
    Source,
    TensorEntry,
    decode_metadata,
)
from pi2rt.formats.quants import TYPES
from pi2rt.formats.regular_file import RegularFile

PREAMBLE = struct.Struct("<8sIIQQ32s")
"""Magic, version, flags, bytes of the header, bytes of the file, digest of all before it and of the header."""
assert PREAMBLE.size == PREAMBLE_BYTES


@dataclass(frozen=True, slots=True)
class Section:
    """A range of bytes in the file that has a checksum: a tensor (or its scales), bundles, or a companion."""

    name: str
    offset: int
    nbytes: int
    checksum: bytes  # BLAKE2b, 128 bits


class PackFile(ModelFile):
    """An open pack.

    ``metadata`` and ``architecture`` are the source's, as its own reader gives them; ``source`` says what that was.
    ``tensors`` are in the order of the file; matrices have the layout "blocks16", or "neurons" where they are in one of
    ``bundles``. Content is not verified here; see ``sections`` and ``pi2rt.planner.pack.convert.verify``.

    Args:
        path: the file.

    Raises:
        ModelNotFoundError: it cannot be opened.
        ModelFormatError: it is malformed; the message names the field.
        UnsupportedModelError: it is of another version, or has a tensor type or layout that pi2rt does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = RegularFile(self.path)
        try:
            header, self._data_offset = self._read_header()
            self.source: Source = header.source
            self.architecture: str = header.architecture
            self.metadata: dict[str, Any] = self._metadata(header)
            self._companions = {each.name: self._section(each, "companion") for each in header.companions}
            self._checksums = {each.name: self._section(each, "tensor") for each in header.tensors}
            self._bundles = {each.name: self._section(each, "bundles") for each in header.bundles}
            self._refuse_doubles(header)
            bundles, scales = self._arrange(header)
            self.bundles = MappingProxyType(bundles)
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
                {each.name: self._tensor(each, scales.get(each.name)) for each in header.tensors}
            )
        except BaseException:
            self._file.close()
            raise

    def read_into(self, tensor: TensorInfo, start: int, buffer: memoryview) -> None:
        if tensor.path != self.path or start < 0 or start + buffer.nbytes > tensor.nbytes:
            raise ValueError(
                f"{buffer.nbytes} bytes from byte {start} on are not inside tensor {tensor.name!r} "
                f"({tensor.nbytes} bytes) of {self.path}"
            )
        self._file.read_into(tensor.offset + start, buffer)

    def read_bundles_into(self, bundles: NeuronBundles, start: int, buffer: memoryview) -> None:
        if self.bundles.get(bundles.down) != bundles or start < 0 or start + buffer.nbytes > bundles.nbytes:
            raise ValueError(
                f"{buffer.nbytes} bytes from byte {start} on are not inside bundles {bundles.name!r} "
                f"({bundles.nbytes} bytes) of {self.path}"
            )
        self._file.read_into(bundles.offset + start, buffer)

    @property
    def held_path(self) -> str:
        return self._file.held_path

    def forget(self, tensor: TensorInfo | NeuronBundles, start: int, count: int) -> None:
        self._file.drop_cache(tensor.offset + start, count)

    def read_section(self, section: Section, start: int, buffer: memoryview) -> None:
        """As ``read_into``, for any of ``sections``."""
        if start < 0 or start + buffer.nbytes > section.nbytes:
            raise ValueError(f"{buffer.nbytes} bytes from byte {start} on are not inside {section.name!r}")
        self._file.read_into(section.offset + start, buffer)

    def drop_cache(self, section: Section) -> None:
        """Asks the system to keep none of it in the page cache."""
        self._file.drop_cache(section.offset, section.nbytes)

    @property
    def source_digest(self) -> bytes:
        """32 bytes that tell the model apart from any other, however it was converted: BLAKE2b of the digests of the
        files it was made from, or, of one that was made of none, of the checksums of its tensors."""
        return model_digest(
            [each.digest for each in self.source.files] or [each.checksum for each in self.sections]
        )

    @property
    def sections(self) -> Sequence[Section]:
        """Everything that has a checksum, in the order of the file."""
        found = (*self._checksums.values(), *self._bundles.values(), *self._companions.values())
        return sorted(found, key=lambda each: each.offset)

    def read_companion(self, name: str, limit: int) -> bytes | None:
        section = self._companions.get(name)
        if section is None:
            return None
        if section.nbytes > limit:
            raise ModelFormatError(
                self.path, f"companion {printable(name)}", f"has more than the {limit} bytes allowed"
            )
        data = bytes(self._file.read(section.offset, section.nbytes))
        if hashlib.blake2b(data, digest_size=len(section.checksum)).digest() != section.checksum:
            raise ModelFormatError(
                self.path,
                f"companion {printable(name)}",
                "its checksum does not match: the file is damaged; convert the model again",
            )
        return data

    def close(self) -> None:
        """Closes the file; again is nothing. No read may be running."""
        self._file.close()

    # -- the header

    def _read_header(self) -> tuple[Header, int]:
        """The decoded header, and where the data begins."""
        size = self._file.size
        if size < PREAMBLE_BYTES:
            raise self._error("preamble", f"needs {PREAMBLE_BYTES} bytes, but the file ends at {size}")
        preamble = self._file.read(0, PREAMBLE_BYTES)
        magic, version, flags, length, declared, digest = PREAMBLE.unpack(preamble)
        if magic != MAGIC:
            raise self._error("magic", f"is {magic!r}, not {MAGIC!r}: this is not a pack")
        if version != VERSION:
            raise UnsupportedModelError(
                self.path,
                "version",
                f"is {version}; this pi2rt reads packs of version {VERSION}: convert the model again",
            )
        if flags & ~FLAGS:
            raise UnsupportedModelError(
                self.path, "flags", f"are {flags:#x}; this pi2rt knows {FLAGS:#x} alone"
            )
        self._ordered = bool(flags & ORDERED)
        if declared != size:
            problem = "truncated" if size < declared else "longer than it was written"
            raise self._error("file length", f"is {size} bytes, not {declared}: it is {problem}")
        if size % ALIGNMENT:
            raise self._error("file length", f"is {size} bytes, not a multiple of {ALIGNMENT}")
        if length > MAX_HEADER_BYTES:
            raise self._error("header length", f"is {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if PREAMBLE_BYTES + length > size:
            raise self._error("header length", f"is {length} bytes, but the file ends at byte {size}")
        raw = self._file.read(PREAMBLE_BYTES, length)
        if header_digest(preamble, raw) != digest:
            raise self._error("header", "its digest does not match: the file is damaged; convert again")
        try:
            header = msgspec.msgpack.decode(raw, type=Header)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._error("header", f"is malformed: {printable(str(error))}") from None
        return header, -(-(PREAMBLE_BYTES + length) // ALIGNMENT) * ALIGNMENT

    def _metadata(self, header: Header) -> dict[str, Any]:
        try:
            return decode_metadata(header.metadata, header.source.container)
        except MetadataError as error:
            raise self._error("metadata", printable(str(error))) from None

    def _section(self, region: Region, kind: str) -> Section:
        """The region in the file, if it lies in it."""
        field, begin = f"{kind} {printable(region.name)}: offset", self._data_offset + region.offset
        if region.offset % ALIGNMENT:
            raise self._error(field, f"{region.offset} is not a multiple of {ALIGNMENT}")
        if begin + region.nbytes > self._file.size:
            raise self._error(
                field,
                f"{region.offset} and {region.nbytes} bytes from there reach byte {begin + region.nbytes}, "
                f"but the file ends at byte {self._file.size}",
            )
        return Section(region.name, begin, region.nbytes, region.checksum)

    def _refuse_doubles(self, header: Header) -> None:
        for kind, regions, found in (
            ("tensor", header.tensors, self._checksums),
            ("bundles", header.bundles, self._bundles),
            ("companion", header.companions, self._companions),
        ):
            seen: set[str] = set()
            for region in regions if len(found) < len(regions) else ():
                if region.name in seen:
                    raise self._error(f"{kind} {printable(region.name)}", "is there twice")
                seen.add(region.name)
        for before, after in itertools.pairwise(each for each in self.sections if each.nbytes):
            if before.offset + before.nbytes > after.offset:
                raise self._error(
                    f"{printable(after.name)}: offset",
                    f"byte {after.offset} of the file lies inside {printable(before.name)}",
                )

    def _arrange(self, header: Header) -> tuple[dict[str, NeuronBundles], dict[str, int]]:
        """The bundles by their down tensor, as they follow from their tensors, if that is what the header says; and the
        bytes that each of these tensors should have, which are those of its scales."""
        entries = {each.name: each for each in header.tensors}
        bundles: dict[str, NeuronBundles] = {}
        scales: dict[str, int] = {}
        for entry in header.bundles:
            field = f"bundles {printable(entry.name)}"
            found: dict[str, Matrix | None] = {}
            for role, name in (("gate", entry.gate), ("up", entry.up), ("down", entry.down)):
                found[role] = None if name is None else self._matrix(f"{field}: {role}", name, entries)
                if name in scales:
                    raise self._error(f"{field}: {role}", f"{printable(name)} is in bundles already")
                if name is not None:
                    scales[name] = 0
            gate, up, down = found["gate"], found["up"], found["down"]
            assert down is not None
            try:
                offset = self._bundles[entry.name].offset
                arranged = neuron_bundles.arrange(entry.name, up, down, offset, gate=gate)
            except ValueError as error:
                raise self._error(field, printable(str(error))) from None
            for key in ("neurons", "neuron_bytes", "neurons_per_page", "page_bytes", "nbytes"):
                said, derived = getattr(entry, key), getattr(arranged, key)
                if said != derived:
                    raise self._error(f"{field}: {key}", f"is {said}, but its tensors make it {derived}")
            bundles[down.name] = replace(arranged, order=self._order(f"{field}: order", entry))
            scales[down.name] = neuron_bundles.down_scales_bytes(down)
            for matrix in (gate, up):
                if matrix is not None:
                    scales[matrix.name] = neuron_bundles.up_scales_bytes(matrix)
        return bundles, scales

    def _order(self, field: str, entry: BundlesEntry) -> bytes | None:
        if entry.order is None:
            return None
        if not self._ordered:
            raise self._error(field, f"is there, but flag {ORDERED:#x} is not")
        try:
            neuron_order.decode_order(entry.order, entry.neurons)
        except ValueError as error:
            raise self._error(field, str(error)) from None
        return entry.order

    def _matrix(self, field: str, name: str, entries: Mapping[str, TensorEntry]) -> Matrix:
        entry = entries.get(name)
        if entry is None or entry.layout != "neurons" or len(entry.shape) != 2:
            raise self._error(field, f"{printable(name)} is no matrix of layout neurons")
        if entry.type not in neuron_bundles.TYPES:
            raise UnsupportedModelError(
                self.path,
                field,
                f"{printable(name)} is {printable(entry.type)}; bundles have {', '.join(neuron_bundles.TYPES)}",
            )
        return Matrix(name, entry.type, (entry.shape[0], entry.shape[1]))

    def _tensor(self, entry: TensorEntry, scales_bytes: int | None) -> TensorInfo:
        field = f"tensor {printable(entry.name)}"
        if entry.type not in TYPES:
            raise UnsupportedModelError(
                self.path, f"{field}: type", f"is {printable(entry.type)}; pi2rt reads {', '.join(TYPES)}"
            )
        kind = TYPES[entry.type]
        if entry.shape[-1] % kind.block_elements:
            raise self._error(
                f"{field}: shape",
                f"{list(entry.shape)} has rows of {entry.shape[-1]}, not whole blocks of {kind.block_elements} "
                f"({kind.name})",
            )
        if entry.layout == "rows":
            expected = kind.nbytes(math.prod(entry.shape))
        elif entry.layout == "blocks16":
            if len(entry.shape) != 2:
                raise self._error(
                    f"{field}: layout", f"is blocks16, but shape {list(entry.shape)} is no matrix"
                )
            expected = row_blocks.matrix_bytes(entry.type, *entry.shape)
        elif entry.layout == "neurons":
            if scales_bytes is None:
                raise self._error(f"{field}: layout", "is neurons, but no bundles name it")
            expected = scales_bytes
        else:
            raise UnsupportedModelError(
                self.path,
                f"{field}: layout",
                f"is {printable(entry.layout)}; pi2rt reads rows, blocks16 and neurons",
            )
        if entry.nbytes != expected:
            raise self._error(
                f"{field}: nbytes",
                f"is {entry.nbytes}, but shape {list(entry.shape)} of {kind.name} takes {expected}",
            )
        begin = self._checksums[entry.name].offset
        return TensorInfo(entry.name, entry.type, entry.shape, self.path, begin, entry.nbytes, entry.layout)

    def _error(self, field: str, problem: str) -> ModelFormatError:
        return ModelFormatError(self.path, field, problem)


def model_digest(parts: Sequence[bytes]) -> bytes:
    """See ``PackFile.source_digest``: of digests of files, or of checksums."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def header_digest(preamble: bytes | bytearray, header: bytes | bytearray) -> bytes:
    """Of what stands before the digest in the preamble, and of the header."""
    digest = hashlib.blake2b(preamble[: PREAMBLE_BYTES - DIGEST_BYTES], digest_size=DIGEST_BYTES)
    digest.update(header)
    return digest.digest()


def is_pack(path: Path) -> bool:
    """Whether the file begins as a pack does. False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
