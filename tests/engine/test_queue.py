"""The queue has a bound; a place in it is taken before anything else is done for a request."""

from __future__ import annotations

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from trio.testing import MockClock

from pi2rt._errors import BusyError, ClosedError, ContextOverflowError, RequestError
from pi2rt.engine import EngineOptions, QueueStatistics, SamplingParams, Ticket
from pi2rt.engine.queue import Queue
from pi2rt.executors.simulated.executor import Faults
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened

FULL = (
    r"^the queue is full: 2 requests wait for one of 1 slots, and max_queue=2 is the limit; try again when one has "
    r"ended, or open the runtime with a larger max_queue$"
)


async def test_one_too_many(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, max_queue=2, seconds_per_step=0.01) as o:
        async with trio.open_nursery() as nursery:
            for seed in range(3):
                nursery.start_soon(o.tokens, numbers(5, seed=seed), 20)
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                with pytest.raises(BusyError, match=FULL):
                    o.engine.stream(numbers(5))
                with pytest.raises(BusyError, match=FULL):
                    await o.engine.score(numbers(5))
                with pytest.raises(BusyError, match=FULL):
                    await o.engine.logits(numbers(5))
                with pytest.raises(BusyError, match=FULL):
                    o.engine.reserve()
            statistics = o.engine.statistics()
            assert statistics.queue == QueueStatistics(capacity=2, waiting=2, peak=2, refused=12)
            assert (statistics.waiting, statistics.requests, statistics.failed) == (2, 3, 0)
        prompt = numbers(5)
        assert await o.tokens(prompt, 3) == continuation(prompt, 3)
        statistics = o.engine.statistics()
        assert (statistics.finished, statistics.queue.waiting, statistics.waiting) == (4, 0, 0)


async def test_without_a_queue_slots_are_used_all_the_same(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, slots=2, max_queue=0, seconds_per_step=0.01) as o:
        for seed in range(5):  # the slot of the one before is not free yet: its step ahead has not returned
            await o.tokens(numbers(5, seed=seed), 3)
        async with o.engine.stream(numbers(5)), o.engine.stream(numbers(6)):
            with pytest.raises(BusyError, match=r"^the queue is full: 2 requests wait .* max_queue=0 is"):
                o.engine.stream(numbers(5))
            await trio.sleep(0.1)
            with pytest.raises(BusyError, match=r"^the queue is full: 0 requests wait .* max_queue=0 is"):
                o.engine.stream(numbers(5))


async def test_who_leaves_the_queue_makes_a_place(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, max_queue=1, seconds_per_step=0.01) as o:
        async with o.engine.stream(numbers(5)):
            await trio.sleep(0.1)
            for _ in range(4):
                async with o.engine.stream(numbers(6)):
                    with pytest.raises(BusyError):
                        o.engine.reserve()
            assert o.engine.statistics().queue.waiting == 0


async def test_a_ticket_holds_its_place_until_it_is_used_or_given_back(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, slots=1, max_queue=1, seconds_per_step=0.01) as o:
        async with o.engine.stream(numbers(5)):
            await trio.sleep(0.1)
            with o.engine.reserve() as ticket:
                assert ticket.held
                assert o.engine.statistics().waiting == 1
                with pytest.raises(BusyError):
                    o.engine.stream(numbers(5))
            assert not ticket.held
            with pytest.raises(LookupError), o.engine.reserve():
                raise LookupError("no tokenizer")
            for bad, error in ([], RequestError), (numbers(2000), ContextOverflowError):
                for _ in range(3):
                    with pytest.raises(error):
                        o.engine.stream(bad)
                with o.engine.reserve() as ticket:
                    with pytest.raises(error):
                        o.engine.stream(bad, ticket=ticket)
                    assert not ticket.held
                with pytest.raises(error):
                    await o.engine.score(bad)
            assert o.engine.statistics().queue.waiting == 0
            with o.engine.reserve() as ticket:
                stream = o.engine.stream(numbers(5), SamplingParams(max_tokens=2), ticket=ticket)
                with pytest.raises(BusyError, match="used or given back already"):
                    o.engine.stream(numbers(5), ticket=ticket)
            assert ticket.held  # it waits
            assert o.engine.statistics().queue.waiting == 1
        async with stream:
            assert len([chunk async for chunk in stream]) == 2
        assert not ticket.held


async def test_closing_refuses_reservations(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        with o.engine.reserve() as ticket:
            o.engine.close()
            with pytest.raises(ClosedError):
                o.engine.reserve()
            with pytest.raises(ClosedError):
                o.engine.stream(numbers(5), ticket=ticket)
        assert o.engine.statistics().queue.waiting == 0


async def test_preempted_sequences_do_not_count_and_keep_their_claim(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, slots=2, context=256, pages=4, max_queue=0, seconds_per_step=0.01) as o:
        async with trio.open_nursery() as nursery:
            for seed in range(2):
                nursery.start_soon(o.tokens, numbers(60, seed=seed), 190)
            while not o.engine.statistics().preemptions:  # noqa: ASYNC110 - simulated time
                await trio.sleep(0.01)
            await trio.sleep(0.05)
            statistics = o.engine.statistics()
            assert (statistics.waiting, statistics.queue.waiting, statistics.free_slots) == (1, 0, 1)
            with pytest.raises(BusyError):
                o.engine.reserve()  # the free slot is not for new ones


async def test_time_in_the_queue(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, seconds_per_step=1.0) as o:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(o.tokens, numbers(5), 10)
            await trio.sleep(0.5)
            with o.engine.reserve() as ticket:
                await trio.sleep(2)  # tokenising
                params = SamplingParams(max_tokens=3, ignore_eos=True)
                stream = o.engine.stream(numbers(6), params, ticket=ticket)
            async with stream:
                chunks = [chunk async for chunk in stream]
        timing = chunks[-1].timing
        assert timing is not None
        assert timing.queue_s == pytest.approx(9.5)  # from the reservation to the end of the first request
        assert timing.prefill_s == pytest.approx(1.0)
        assert timing.ttft_s == pytest.approx(10.5)
        assert (timing.decode_s, timing.requeued_s) == (pytest.approx(2.0), 0.0)


async def test_time_in_the_queue_again(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """A preempted request has queued for its first step once; what it waits later is told apart."""
    async with opened(tokenizer, slots=2, context=256, pages=4, seconds_per_step=0.01) as o:
        timings = []

        async def one(seed: int) -> None:
            chunks = await o.chunks(numbers(60, seed=seed), max_tokens=190)
            timings.append(chunks[-1].timing)

        async with trio.open_nursery() as nursery:
            for seed in range(2):
                nursery.start_soon(one, seed)
        assert o.engine.statistics().preemptions > 0
        first, second = timings
        assert first is not None
        assert second is not None
        assert first.requeued_s == 0.0
        assert max(first.queue_s, second.queue_s) < 0.02  # the second may begin a step later
        assert 0.5 < second.requeued_s < second.decode_s


async def test_time_that_a_lost_executor_takes(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    faults = Faults(raise_in_wait=frozenset([50]))
    async with opened(
        tokenizer, slots=2, stream_buffer=20, seconds_per_step=0.01, seconds_to_open=3.0, faults=faults
    ) as o:
        prompt = numbers(100)
        async with o.engine.stream(prompt, SamplingParams(max_tokens=60, ignore_eos=True)) as stalled:
            with pytest.raises(Exception, match="injected"):
                await o.tokens(numbers(30, seed=2), 100)
            chunks = [chunk async for chunk in stalled]
        timing = chunks[-1].timing
        assert timing is not None
        assert timing.requeued_s == pytest.approx(3.0, abs=0.1)


def test_the_bound_is_checked() -> None:
    with pytest.raises(RequestError, match=r"^max_queue=-1: at least 0 is needed$"):
        EngineOptions(vocab_size=10, slots=1, pages=4, context=256, max_queue=-1)


class QueueMachine(RuleBasedStateMachine):
    """Tickets in any order: the count is that of the held ones, and never above the bound when it grows."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(3, 2)
        self.tickets: list[Ticket] = []
        self.refused = self.peak = 0

    @rule(free=st.integers(0, 2))
    def reserve(self, free: int) -> None:
        held = sum(ticket.held for ticket in self.tickets)
        try:
            self.tickets.append(self.queue.reserve(free, 0.0))
        except BusyError:
            assert held >= 3 + free
            self.refused += 1
        else:
            assert held < 3 + free
            self.peak = max(self.peak, held + 1)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), used=st.booleans())
    def leave_the_block(self, data: st.DataObject, used: bool) -> None:
        ticket = data.draw(st.sampled_from(self.tickets))
        with ticket:
            if used and ticket.held and not ticket._used:
                ticket.use()
        assert ticket.held <= ticket._used

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.tickets)).release()

    @invariant()
    def counted(self) -> None:
        held = sum(ticket.held for ticket in self.tickets)
        assert self.queue.statistics() == QueueStatistics(3, held, self.peak, self.refused)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, deadline=None)
