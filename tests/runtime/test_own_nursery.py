from __future__ import annotations

import pytest
import trio

from pi2rt.runtime.own_nursery import open_own_nursery


async def fail(error: BaseException) -> None:
    await trio.lowlevel.cancel_shielded_checkpoint()
    raise error


async def test_one_error_comes_out_as_it_is() -> None:
    error, cause = LookupError("x"), ValueError("y")
    error.__cause__ = cause
    with pytest.raises(LookupError) as info:  # noqa: PT012
        async with open_own_nursery() as nursery:
            nursery.start_soon(fail, error)
            await trio.sleep_forever()
    assert info.value is error
    assert info.value.__cause__ is cause


async def test_of_several_the_first_comes_out_and_names_the_others() -> None:
    with pytest.raises((LookupError, ValueError)) as info:  # noqa: PT012
        async with open_own_nursery() as nursery:
            nursery.start_soon(fail, LookupError("x"))
            nursery.start_soon(fail, ValueError("y"))
    assert info.value.__notes__ in (["and ValueError: y"], ["and LookupError: x"])


async def test_cancellations_pass() -> None:
    with trio.CancelScope() as scope:
        async with open_own_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_good_end() -> None:
    done = []
    async with open_own_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.checkpoint)
        done.append(1)
    assert done == [1]


async def test_a_cancellation_of_a_nursery_within_hides_no_error() -> None:
    """Where it comes out before the error does."""
    error, left = LookupError("x"), trio.Event()

    async def within() -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        finally:
            left.set()

    async def cleanup_fails() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await left.wait()
                await trio.lowlevel.checkpoint()
            raise error

    with pytest.raises(LookupError) as info:  # noqa: PT012
        with trio.CancelScope() as scope:
            async with open_own_nursery() as nursery:
                nursery.start_soon(within)
                nursery.start_soon(cleanup_fails)
                scope.cancel()
    assert info.value is error
