"""The memory that streamed weights pass through, and the stream that reads them into it.

Some of a budget is for what rarely comes: activations of long steps, pages of the KV cache that no context has reached.
A step of a few rows lends it to the stream, for pieces that then need not be read again; it is taken back before it is
needed (``cython_kernels/plane/ops_streamed.c``). Addresses are others, only the memory behind them is lent: so nothing
but what has to be read depends on who has it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pi2rt.cython_kernels.flash.stream import Stream
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.flash.late_reads import give_back
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
        self._loan: native.Memory | None = None
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

    def borrow(self, nbytes: int) -> int:
        """Memory for so many bytes of pieces, spread over the step, which a program may lend. Returns how many have a
        home there. None of it is taken before."""
        homes: dict[int, int] = {}
        used = due = 0
        total = sum(piece.bytes for piece in self.pieces)
        for number, piece in enumerate(self.pieces):
            due += piece.bytes
            if due * nbytes >= (used + piece.bytes) * total and used + piece.bytes <= nbytes:
                homes[number] = used
                used += piece.bytes
        if homes:
            self._loan = native.Memory(used, huge_pages=False)  # which would take more than is lent
            self.stream.borrow(self._loan.address, homes)
        return used

    @property
    def io_reason(self) -> str:
        """How it reads, and why."""
        return str(self.stream.io_reason)

    def close(self) -> None:
        """Joins the reader, then frees the memory that it wrote to. Only after the threads that compute have ended."""
        memories = [self._memory, *([] if self._loan is None else [self._loan])]
        give_back(*memories, late=self.stream.close(), path=self.stream.path)
