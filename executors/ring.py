"""The memory that streamed weights pass through, and the stream that reads them into it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pi2rt.cython_kernels import native
from pi2rt.cython_kernels.stream import Stream
from pi2rt.executors.late_reads import give_back
from pi2rt.formats import ModelFile


class Ring:
    """Reading begins at once.

    Args:
        file: a pack; stays open as long as this.
        extents: (offset, bytes) of the streamed matrices, in the order of their use.
        nbytes: of memory; see ``Stream``.
        io: "auto", "uring" or "preadv".
        deadline: seconds; see ``Stream``.
    """

    def __init__(
        self,
        file: ModelFile,
        extents: Sequence[tuple[int, int]],
        nbytes: int,
        io: str,
        deadline: float | None,
    ) -> None:
        self.nbytes = nbytes
        self._memory = native.Memory(nbytes)
        try:
            self.stream = Stream(
                file.held_path,
                extents,
                self._memory.address,
                nbytes,
                name=os.fspath(file.path),
                io=io,
                deadline=deadline,
            )
        except BaseException:
            self._memory.close()
            raise

    def close(self) -> None:
        """Joins the reader, then frees the memory that it wrote to. Only after the threads that compute have ended."""
        give_back(self._memory, late=self.stream.close(), path=self.stream.path)
