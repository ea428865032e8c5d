"""Writes a pack: front to back, under a temporary name, with a known length and little memory."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from pi2rt._errors import ConversionError, OutputError
from pi2rt.formats import row_blocks
from pi2rt.formats.neuron_bundles import NeuronBundles
from pi2rt.formats.pack import PREAMBLE, header_digest
from pi2rt.formats.pack_header import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    DIGEST_BYTES,
    MAGIC,
    MAX_HEADER_BYTES,
    ORDERED,
    PREAMBLE_BYTES,
    VERSION,
    BundlesEntry,
    Header,
    Region,
    Source,
    TensorEntry,
)
from pi2rt.formats.quants import TYPES
from pi2rt.formats.regular_file import drop_cache
from pi2rt.host.output_file import FULL, OutputFile

Bytes = npt.NDArray[np.uint8]

FLUSH_BYTES = 64 << 20
"""Written between two flushes; what the page cache holds of the file at most."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What will be written next to one another. A tensor has a ``type``, ``shape`` and ``layout``; a companion has
    none of them, but ``size``. A tensor of layout "neurons" has both: ``size`` is that of its scales. Bundles have
    ``bundles``, whose offset does not matter."""

    name: str
    type: str = ""
    shape: tuple[int, ...] = ()
    layout: str = "rows"
    size: int = 0
    bundles: NeuronBundles | None = None

    @property
    def nbytes(self) -> int:
        if self.bundles is not None:
            return self.bundles.nbytes
        if not self.type or self.layout == "neurons":
            return self.size
        if self.layout == "blocks16":
            rows, columns = self.shape
            return row_blocks.matrix_bytes(self.type, rows, columns)
        return TYPES[self.type].nbytes(math.prod(self.shape))


class PackWriter:
    """A pack in the making; a context manager. What is planned is written in that order, each in as many parts as one
    likes; ``finish`` then puts the file under its name. Leaving without it removes what was written.

    The temporary file is ``.NAME.part`` beside the destination, locked while it is written (see ``OutputFile``): what
    an interrupted run left behind is taken over, and two runs at once are an error.

    Args:
        destination: where the pack will be.
        source: what it is made from; its digests may be given to ``finish`` later.
        architecture, metadata: see ``Header``.
        plan: tensors and bundles first, then companions.
        overwrite: whether a file that is there already may be replaced.
        flags: of the preamble; that bundles have an order is added.

    Raises:
        RequestError: the destination is there already, or cannot be written to.
        ConversionError: there is too little room, or another process is writing the same file.
    """

    def __init__(
        self,
        destination: Path,
        source: Source,
        architecture: str,
        metadata: msgspec.Raw,
        plan: Sequence[Planned],
        *,
        overwrite: bool = False,
        flags: int = 0,
    ) -> None:
        self.path = destination
        ordered = any(each.bundles is not None and each.bundles.order is not None for each in plan)
        self._flags = flags | (ORDERED if ordered else 0)
        self._source, self._architecture, self._metadata = source, architecture, metadata
        self._plan = plan
        with _conversion_errors():
            self._output = OutputFile(destination, seeks=True, overwrite=overwrite)
        self._checksums: list[bytes] = []
        self._hash = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
        self._written = 0  # of the entry that is being written
        offset = 0
        self._offsets: list[int] = []
        for each in plan:
            self._offsets.append(offset)
            offset = _aligned(offset + each.nbytes)
        length = self._header_bytes()
        self._data = _aligned(PREAMBLE_BYTES + length)
        self.nbytes = self._data + offset
        self._at = self._flushed = self._data

    # -- writing

    def write(self, name: str, data: Bytes) -> None:
        """The next bytes (uint8, one-dimensional, contiguous) of ``name``, which must be the entry whose turn it is."""
        index = len(self._checksums)
        entry = self._plan[index]
        if entry.name != name or self._written + data.nbytes > entry.nbytes:
            raise ValueError(
                f"{data.nbytes} bytes of {name!r} after {self._written} of {entry.nbytes} bytes of {entry.name!r}"
            )
        self._hash.update(data.data)
        self._append(data.data)
        self._written += data.nbytes
        if self._written == entry.nbytes:
            self._append(memoryview(bytes(-entry.nbytes % ALIGNMENT)))
            self._checksums.append(self._hash.digest())
            self._hash = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
            self._written = 0
        if self._at - self._flushed >= FLUSH_BYTES:
            self._flush()

    def finish(self, source: Source) -> None:
        """Writes the header, makes sure that everything is on the disk, and puts the file under its name."""
        if len(self._checksums) < len(self._plan):
            raise ValueError(f"{self._plan[len(self._checksums)].name!r} has not been written")
        header = self._header(source)
        if self._at != self.nbytes or _aligned(PREAMBLE_BYTES + len(header)) != self._data:
            raise ValueError("what was written is not what was planned")
        preamble = PREAMBLE.pack(MAGIC, VERSION, self._flags, len(header), self.nbytes, bytes(DIGEST_BYTES))
        preamble = preamble[:-DIGEST_BYTES] + header_digest(preamble, header)
        self._at = 0
        self._append(memoryview(preamble + header))
        self._flush()
        try:
            os.ftruncate(self._output.fd, self.nbytes)  # an empty pack has nothing behind its header
            os.fsync(self._output.fd)
            drop_cache(self._output.fd, 0, self.nbytes)
        except OSError as error:
            raise self._failure(error) from error
        with _conversion_errors():
            self._output.commit()

    # -- the file

    def __enter__(self) -> Self:
        with _conversion_errors():
            self._output.__enter__()
        try:
            free = self._output.free_bytes()
            if free < self.nbytes:
                raise ConversionError(
                    f"{self.path}: the pack takes {_mib(self.nbytes)}, but only {_mib(free)} are free there; free "
                    f"{_mib(self.nbytes - free)} or choose another place"
                )
        except BaseException:
            self._output.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._output.__exit__(kind, error, traceback)

    def _append(self, data: memoryview) -> None:
        try:
            while data.nbytes:
                count = os.pwrite(self._output.fd, data, self._at)
                self._at += count
                data = data[count:]
        except OSError as error:
            raise self._failure(error) from error

    def _flush(self) -> None:
        try:
            os.fdatasync(self._output.fd)
        except OSError as error:
            raise self._failure(error) from error
        drop_cache(self._output.fd, 0, self._at)
        self._flushed = self._at

    def _failure(self, error: OSError) -> ConversionError:
        if error.errno in FULL:
            return ConversionError(
                f"{self.path}: the disk is full ({error.strerror}): the pack takes {_mib(self.nbytes)}, "
                f"{_mib(self._at)} of which were written, and {_mib(self._output.free_bytes())} are free"
            )
        return ConversionError(str(self._output.failure(error)))

    def _header_bytes(self) -> int:
        """Length of the header, which is final, as checksums and digests have a fixed size.

        Raises:
            ConversionError: no reader would accept it: it is too long, or a name is.
        """
        header = self._header(self._source)
        problem = f"it takes {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed"
        if len(header) <= MAX_HEADER_BYTES:
            try:
                msgspec.msgpack.decode(header, type=Header)
                return len(header)
            except msgspec.ValidationError as error:
                problem = str(error)
        raise ConversionError(f"{self._source.name}: its header does not fit into a pack: {problem}")

    def _header(self, source: Source) -> bytes:
        """With zeros for the checksums that are not known yet."""
        checksums = self._checksums + [bytes(CHECKSUM_BYTES)] * (len(self._plan) - len(self._checksums))
        tensors: list[TensorEntry] = []
        companions: list[Region] = []
        bundles: list[BundlesEntry] = []
        for each, offset, checksum in zip(self._plan, self._offsets, checksums, strict=True):
            if each.type:
                tensors.append(
                    TensorEntry(each.name, offset, each.nbytes, checksum, each.type, each.shape, each.layout)
                )
            elif (found := each.bundles) is not None:
                bundles.append(
                    BundlesEntry(
                        each.name,
                        offset,
                        each.nbytes,
                        checksum,
                        up=found.up,
                        down=found.down,
                        neurons=found.neurons,
                        page_bytes=found.page_bytes,
                        neurons_per_page=found.neurons_per_page,
                        neuron_bytes=found.neuron_bytes,
                        gate=found.gate,
                        order=found.order,
                    )
                )
            else:
                companions.append(Region(each.name, offset, each.nbytes, checksum))
        header = Header(source, self._architecture, self._metadata, tensors, companions, bundles)
        return msgspec.msgpack.encode(header)


@contextmanager
def _conversion_errors() -> Iterator[None]:
    """What cannot be written is a pack that cannot be made."""
    try:
        yield
    except OutputError as error:
        raise ConversionError(str(error)) from error


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
