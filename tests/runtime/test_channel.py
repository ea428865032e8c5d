from __future__ import annotations

import pytest
import trio
import trio.testing

from pi2rt._errors import ClosedError
from pi2rt.runtime.channel import ChannelStatistics, open_channel


async def test_items_arrive_in_order_and_are_counted() -> None:
    sender, receiver = open_channel[int]("steps", 3)
    for i in range(3):
        await sender.send(i)
    with pytest.raises(trio.WouldBlock):
        sender.send_nowait(3)
    assert await receiver.receive() == 0
    assert receiver.receive_nowait() == 1
    expected = ChannelStatistics("steps", capacity=3, sent=3, received=2, buffered=1, peak_buffered=3)
    assert sender.statistics() == receiver.statistics() == expected


async def test_who_waits_is_counted(autojump_clock: trio.testing.MockClock) -> None:
    sender, receiver = open_channel[int]("steps", 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receiver.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert sender.statistics().waiting_receivers == 1
        await sender.send(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert sender.statistics().waiting_senders == 1
        assert sender.statistics().sent == 1  # not yet
        assert await receiver.receive() == 2
    assert (sender.statistics().sent, sender.statistics().received) == (2, 2)


async def test_closing_the_sender_ends_the_loop() -> None:
    sender, receiver = open_channel[str]("words", 2)
    async with sender:
        await sender.send("a")
        await sender.send("b")
    assert [word async for word in receiver] == ["a", "b"]
    assert receiver.statistics().closed
    with pytest.raises(trio.EndOfChannel):
        await receiver.receive()
    for call in (sender.send("c"),):
        with pytest.raises(ClosedError, match=r"^channel 'words': the sending end is closed$"):
            await call
    with pytest.raises(ClosedError, match="sending end"):
        sender.send_nowait("c")
    sender.close()


async def test_closing_the_receiver_tells_the_sender() -> None:
    sender, receiver = open_channel[int]("steps", 1)
    await receiver.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await sender.send(1)
    with pytest.raises(trio.BrokenResourceError):
        sender.send_nowait(1)
    with pytest.raises(ClosedError, match=r"^channel 'steps': the receiving end is closed$"):
        await receiver.receive()
    with pytest.raises(ClosedError, match="receiving end"):
        receiver.receive_nowait()
    assert sender.statistics().sent == 0


async def test_cancelled_send_and_receive_lose_nothing(autojump_clock: trio.testing.MockClock) -> None:
    sender, receiver = open_channel[int]("steps", 1)
    with trio.move_on_after(1) as scope:
        await receiver.receive()
    assert scope.cancelled_caught
    await sender.send(1)
    with trio.move_on_after(1) as scope:
        await sender.send(2)
    assert scope.cancelled_caught
    assert await receiver.receive() == 1
    with pytest.raises(trio.WouldBlock):
        receiver.receive_nowait()


async def test_every_call_is_a_checkpoint() -> None:
    sender, receiver = open_channel[int]("steps", 1)
    with trio.testing.assert_checkpoints():
        await sender.send(1)
    with trio.testing.assert_checkpoints():
        await receiver.receive()
    with trio.testing.assert_checkpoints():
        await sender.aclose()
    with trio.testing.assert_checkpoints():
        await receiver.aclose()


def test_capacity_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="channel 'steps': capacity must not be negative, not -1"):
        open_channel[int]("steps", -1)
