"""The token masks of one request: made by its function in a worker thread, given to the steps that wait for them.

A step is submitted before the token before it is known, let alone the mask that follows from that. So the function runs
while the model computes, and the executor waits for the mask with all else done (``runtime.executor.Masking``).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import TypeAlias, overload

import trio

from pi2rt._errors import RequestError
from pi2rt.host.limits import limits_explained
from pi2rt.runtime.token_mask import TokenMask, mask_problem

MaskFunction: TypeAlias = Callable[[Sequence[int]], TokenMask | None]
"""``function(generated)``: which tokens may come after those generated so far. None: all."""

SLOW_S = 0.03
"""A function that took longer the last time, or was never called, delays no neighbour: its request is left out of steps
until the mask is there. But for the first token, whose mask is made while the prompt is computed."""

in_thread = trio.to_thread.run_sync
"""What runs a function; tests have simulated time instead."""


class Generated(Sequence[int]):
    """The tokens generated so far. It stays as it is when more are."""

    __slots__ = ("_known", "_length", "_start")

    def __init__(self, known: array[int], start: int) -> None:
        self._known, self._start = known, start
        self._length = len(known) - start

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[int, ...]: ...
    def __getitem__(self, at: int | slice) -> int | tuple[int, ...]:
        where = range(self._start, self._start + self._length)[at]
        return self._known[where] if isinstance(where, int) else tuple(self._known[i] for i in where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Generated({list(self)})"


class Masker:
    """Positions are those of the sequence; the mask of a position says which token may stand there.

    Args:
        function: the request's.
        known: the tokens of its sequence, which only grow; the first ``prompt`` are not generated.
        give: the executor's ``mask``.
    """

    __slots__ = (
        "_allowed", "_asked", "_busy", "_ended", "_function", "_give", "_known", "_limiter", "_prompt", "_scope",
        "_seconds", "_vocab_size", "made",
    )  # fmt: skip

    def __init__(
        self,
        function: MaskFunction,
        known: array[int],
        vocab_size: int,
        give: Callable[[int, int, TokenMask | None], None],
    ) -> None:
        self._function, self._known, self._prompt = function, known, len(known)
        self._vocab_size, self._give = vocab_size, give
        self.made = -1  # the position whose mask is there
        self._allowed: TokenMask | None = None
        self._asked: dict[int, tuple[int, int]] = {}  # by position, the step and slot that wait
        self._limiter = trio.CapacityLimiter(1)  # also for a call that was given up and has not returned
        self._scope: trio.CancelScope | None = None  # of a call
        self._busy = self._ended = False
        self._seconds = math.inf  # that the last call took; the first one may compile a grammar

    @property
    def wanted(self) -> bool:
        """Whether the mask of the next token is neither there nor being made."""
        return not self._busy and not self._ended and self.made != len(self._known)

    def holds_up(self, position: int) -> bool:
        """Whether a step would wait long for the mask of ``position``."""
        return self._seconds > SLOW_S and self.made != position

    async def make(self) -> None:
        """Makes the mask of the next token, and gives it to the step that waits for it, if one does.

        Raises:
            RequestError: the function raised, which is the cause, or gave something that is no mask.
            SystemLimitError: there are no more threads.
        """
        self._busy = True
        try:
            with trio.CancelScope() as self._scope, limits_explained():
                position, began = len(self._known), trio.current_time()
                generated = Generated(self._known, self._prompt)
                self._allowed = await in_thread(
                    _masked,
                    self._function,
                    generated,
                    self._vocab_size,
                    abandon_on_cancel=True,
                    limiter=self._limiter,
                )
                self._seconds = trio.current_time() - began
                self.made = position
                if position in self._asked:
                    self._give(*self._asked[position], self._allowed)
        finally:
            self._busy = False

    def ask(self, position: int, step_id: int, slot: int) -> None:
        """A step was submitted that samples the token at ``position``."""
        self._asked[position] = step_id, slot
        if self.made == position:
            self._give(step_id, slot, self._allowed)

    def returned(self, position: int) -> None:
        """The step that samples this token has returned."""
        self._asked.pop(position, None)

    def release(self) -> None:
        """Nobody wants the tokens of the steps in flight: they do not wait."""
        for step_id, slot in self._asked.values():
            self._give(step_id, slot, None)
        self._asked.clear()

    def cancel(self) -> None:
        """The request has ended. A call that goes on is left alone; what it brings is dropped."""
        self._ended = True
        if self._scope is not None:
            self._scope.cancel()


def _masked(function: MaskFunction, generated: Generated, vocab_size: int) -> TokenMask | None:
    """In the worker thread."""
    try:
        allowed = function(generated)
    except trio.Cancelled:  # the function asks Trio whether it is still wanted
        raise
    except BaseException as error:  # it belongs to the request, whatever it is
        what = f"token_mask raised {type(error).__name__} after {len(generated)} tokens: {error}"
        raise RequestError(what) from error
    if allowed is None:
        return None
    if (problem := mask_problem(allowed, vocab_size)) is not None:
        raise RequestError(f"token_mask gave, after {len(generated)} tokens, {problem}")
    return allowed.copy()  # its function may use the array again
