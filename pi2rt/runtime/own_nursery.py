"""A nursery that is the business of a library function, so that its callers do not meet exception groups."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def open_own_nursery() -> AsyncIterator[trio.Nursery]:
    """As ``trio.open_nursery``, but an error of the body or of a child comes out as it is. Where there are
    several, the first one comes out, with a note on each of the others; errors go before cancellations."""
    first: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        first = _first(group)
        if first is None:
            raise
    if first is not None:
        try:
            raise first  # out here, where it gets no context that it did not have
        finally:
            del first  # or its traceback, which has this frame, would keep all that its frames hold


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """With notes on the others; None where there are only cancellations."""
    errors = [error for error in group.exceptions if not _cancelled(error)]
    for other in errors[1:]:
        errors[0].add_note(f"and {type(other).__name__}: {other}")
    return errors[0] if errors else None


def _cancelled(error: BaseException) -> bool:
    """Whether it is a cancellation, or a group of them, as a nursery within brings."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_cancelled, error.exceptions))
    return isinstance(error, trio.Cancelled)
