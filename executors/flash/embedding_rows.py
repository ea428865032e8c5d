"""An embedding that is not in memory: its rows are read when a step has tokens for them."""

from __future__ import annotations

import os

from pi2rt.cython_kernels.flash.rows import Rows, memory_bytes
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.flash.late_reads import give_back
from pi2rt.formats import ModelFile


class EmbeddingRows:
    """What reads them, and its memory.

    Args:
        file: a pack; stays open as long as this.
        name: of the embedding.
        deadline: seconds; see ``Rows``.
    """

    def __init__(self, file: ModelFile, name: str, deadline: float | None) -> None:
        info = file.tensors[name]
        type_id, columns = native.TYPE_IDS[info.type], info.shape[1]
        self.nbytes = memory_bytes(type_id, columns)
        self._memory = native.Memory(self.nbytes)
        try:
            self.rows = Rows(
                file.held_path,
                type_id,
                columns,
                info.offset,
                self._memory.address,
                name=os.fspath(file.path),
                deadline=deadline,
            )
        except BaseException:
            self._memory.close()
            raise

    def close(self) -> None:
        """Waits for what is read, then frees the memory. Only after the threads that compute have ended."""
        give_back(self._memory, late=self.rows.close(), path=self.rows.path)
