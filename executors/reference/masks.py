"""Masks that the control plane gives to a worker thread, which waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pi2rt.runtime.token_mask import TokenMask


class LateMask(Exception):
    """A mask did not come in time."""


class Masks:
    """Of the steps in flight, by step and slot. The thread of the control plane adds and gives, the worker waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: dict[int, set[int]] = {}  # slots that a mask may still be given for, by step
        self._given: dict[tuple[int, int], TokenMask | None] = {}

    def add(self, step_id: int, slots: set[int]) -> None:
        """A step was submitted; slices of these slots are masked."""
        with self._changed:
            self._wanted[step_id] = slots

    def drop(self, step_id: int) -> None:
        """Its result was taken."""
        with self._changed:
            self._wanted.pop(step_id, None)
            for key in [key for key in self._given if key[0] == step_id]:
                del self._given[key]

    def give(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        """Ignored where nothing waits for it."""
        with self._changed:
            if slot in self._wanted.get(step_id, ()):
                self._wanted[step_id].remove(slot)
                self._given[step_id, slot] = None if allowed is None else allowed.copy()
                self._changed.notify_all()

    def wake(self) -> None:
        """Whoever waits looks whether it shall stop."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, step_id: int, slot: int, deadline: float, stopped: Callable[[], bool]) -> TokenMask | None:
        """Returns at once where ``stopped()``.

        Args:
            deadline: of ``time.monotonic``.

        Raises:
            LateMask: the deadline is over.
        """
        key = step_id, slot
        with self._changed:
            self._changed.wait_for(
                lambda: key in self._given or stopped(), max(0.0, deadline - time.monotonic())
            )
            if key not in self._given and not stopped():
                raise LateMask
            return self._given.get(key)
