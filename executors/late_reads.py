"""Memory that reads go to, at the end: given back, unless a device has not answered yet and may still write to it."""

from __future__ import annotations

import os
import warnings

from pi2rt.cython_kernels import native


def give_back(memory: native.Memory, *, ended: bool, path: str | os.PathLike[str]) -> None:
    """Closes it, or leaves it taken for good where not all reads have ended: what has reached a device cannot be
    cancelled. Warns with RuntimeWarning then."""
    if ended:
        memory.close()
        return
    warnings.warn(
        f"{os.fspath(path)}: the device does not answer; {memory.nbytes} bytes that it may write to stay reserved",
        RuntimeWarning,
        stacklevel=2,
    )
    memory.abandon()
