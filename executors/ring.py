"""The memory that streamed weights pass through, and the stream that reads them into it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pi2rt.cython_kernels import native
from pi2rt.cython_kernels.stream import Stream
from pi2rt.executors.late_reads import give_back
from pi2rt.formats import ModelFile
from pi2rt.models.stream_pieces import Piece
from pi2rt.runtime.flash_reads import FlashReads


class Ring:
    """Reading begins at once.

    Args:
        file: a pack; stays open as long as this.
        pieces: of the streamed matrices, in the order of their use.
        nbytes: of memory; see ``Stream``.
        io: "auto", "uring" or "preadv".
        deadline: seconds; see ``Stream``.
        reads: how much is read at once.
    """

    def __init__(
        self,
        file: ModelFile,
        pieces: Sequence[Piece],
        nbytes: int,
        io: str,
        deadline: float | None,
        reads: FlashReads,
    ) -> None:
        self.nbytes, self.reads, self.pieces = nbytes, reads, pieces
        self._memory = native.Memory(nbytes)
        try:
            self.stream = Stream(
                file.held_path,
                [(piece.offset, piece.bytes, piece.skip) for piece in pieces],
                self._memory.address,
                nbytes,
                name=os.fspath(file.path),
                io=io,
                read_bytes=reads.stream_bytes,
                depth=reads.stream_depth,
                deadline=deadline,
            )
        except BaseException:
            self._memory.close()
            raise

    @property
    def io_reason(self) -> str:
        """How it reads, and why."""
        return str(self.stream.io_reason)

    def close(self) -> None:
        """Joins the reader, then frees the memory that it wrote to. Only after the threads that compute have ended."""
        give_back(self._memory, late=self.stream.close(), path=self.stream.path)
