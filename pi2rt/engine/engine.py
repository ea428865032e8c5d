"""The step loops: continuous batching over one actor or several, one step ahead of the results of each.

Step k + 1 is submitted before the result of step k is looked at, so that the executor never waits for
Python. Its decode slices say "the token sampled last" instead of naming it. Where k turns out to have ended
a sequence, the slice of it in k + 1 is discarded when it comes back, and only then are its slot and pages
free.

Each actor that runs at the same time as others has a lane (``lane.py``) with a loop of its own. Lane 0 decodes. Other
lanes compute prompts, all tokens but the last, into the same KV pages; then lane 0 takes the sequence over and computes
the last token as a step like any other, so that sampling, penalties and seeds live in one place.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable
from typing import Literal, SupportsIndex

import trio

from pi2rt._errors import ClosedError, ExecutorError, InternalError, RequestError
from pi2rt.engine.blame import blame, carried, copied
from pi2rt.engine.chunk import Timing
from pi2rt.engine.lane import Lane, PrefillLane, StepActor, rows_in_flight
from pi2rt.engine.masker import Masker, MaskFunction
from pi2rt.engine.options import EngineOptions
from pi2rt.engine.prompt import check_token, prompt_tokens
from pi2rt.engine.queue import Queue, Ticket
from pi2rt.engine.reading import Reading
from pi2rt.engine.recorder import Recorder
from pi2rt.engine.sampling_params import SamplingParams
from pi2rt.engine.scheduler import Flight, PrefillRoute, Scheduler
from pi2rt.engine.sequence import Sequence, SequenceState
from pi2rt.engine.statistics import EngineStatistics
from pi2rt.engine.stop_finder import StopFinder
from pi2rt.engine.token_stream import TokenStream
from pi2rt.engine.writer import Writer
from pi2rt.memory import PAGE_TOKENS, PagePool, PageTable, PrefixIndex, StateStore, least_window_pages
from pi2rt.runtime.actor import NotRebuilt, Reopened
from pi2rt.runtime.own_nursery import open_own_nursery
from pi2rt.runtime.step import Floats, Sampling, Skipped, Step, StepResult, Unusable, Verified
from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer


class Engine:
    """Runs requests. All methods are called from the Trio thread; ``run`` is a task of the caller's
    nursery.

    Args:
        actor: decodes, and computes the prompts that no other takes.
        prefill: actors that compute prompts beside it. They share its KV pages.
        store: of the KV pages. None: they are the executor's, and are lost with it; but where there are several, they
            share some all the same.
    """

    def __init__(
        self,
        actor: StepActor,
        tokenizer: Tokenizer,
        options: EngineOptions,
        trace: Trace | None = None,
        *,
        prefill: tuple[PrefillLane, ...] = (),
        store: StateStore | None = None,
    ) -> None:
        self._lanes = [Lane(number, each) for number, each in enumerate([actor, *(p.actor for p in prefill)])]
        self._keeps_pages = store is not None or bool(prefill)
        self._tokenizer = tokenizer
        self.options = options
        self._recorder = None if trace is None else Recorder(trace)
        self.pool = PagePool(options.pages) if store is None else store.pool
        self._check_windows(prefill)
        self._index = PrefixIndex(self.pool, PAGE_TOKENS)
        self._scheduler = Scheduler(
            self._index,
            options.slots,
            options.max_tokens,
            options.mixed_chunk,
            None if self._recorder is None else self._recorder.request,
            tuple(PrefillRoute(p.max_tokens, p.least_tokens, _usable(p.actor)) for p in prefill),
            lambda lane: self._lanes[lane].wake(),
        )
        self._queue = Queue(options.max_queue, options.slots)
        self._masking: trio.Nursery | None = None  # of calls of requests' token_mask
        self._departed = trio.Event()  # set when a request ends
        self._closed = False
        self._requests = self._finished = self._cancelled = self._failed = 0
        self._generated = self._discarded = 0

    def _check_windows(self, prefill: tuple[PrefillLane, ...]) -> None:
        """Raises RequestError: steps might wait for the windowed bytes of pages."""
        windows, options = self.pool.windows, self.options
        if windows is None:
            return
        tokens = [options.max_tokens, *(each.max_tokens for each in prefill)]
        each = zip(tokens, self._lanes, strict=True)
        rows = sum(rows_in_flight(most, lane.actor.max_in_flight, options.slots) for most, lane in each)
        least = least_window_pages(windows.window, options.slots, rows, options.context)
        if windows.capacity < least:
            raise RequestError(
                f"window_pages={windows.capacity}: fewer than the {least} KV pages whose windowed bytes "
                f"{options.slots} sequences and the steps in flight hold; make the plan again with 'pi2rt plan'"
            )

    # The step loops

    async def run(self) -> None:
        """Submits steps and handles their results until ``close``. An error that leaves it is a bug in
        pi2rt."""
        try:
            async with open_own_nursery() as self._masking:
                if len(self._lanes) == 1:
                    await self._loop(self._lanes[0])
                else:
                    async with open_own_nursery() as nursery:
                        for lane in self._lanes:
                            nursery.start_soon(self._loop, lane)
        except ClosedError:
            # Both tasks are cancelled together; where the actor's runs first, it is closed before this one learns of
            # the cancellation, which is then what ended it.
            await trio.lowlevel.checkpoint()
            raise
        finally:
            self.close()  # whatever ended it, nobody waits for ever
            del self._tokenizer  # which may be large; a closed engine is asked for nothing but its statistics

    async def _loop(self, lane: Lane) -> None:
        while True:
            if lane.actor.generation != lane.generation:
                await self._recover(lane, None, None)
            while lane.may_run_ahead() and (flight := self._scheduler.compose(lane.number)) is not None:
                await self._submit(lane, flight)
            if lane.flights:
                await self._receive(lane)
                if len(self._lanes) > 1:
                    self._wake()  # it may have given back pages or a slot, or handed a sequence over
            elif self._closed:
                return
            else:
                await lane.until_work()

    async def _submit(self, lane: Lane, flight: Flight) -> None:
        lane.flights.append(flight)
        try:
            await lane.actor.submit(flight.step)
        except ExecutorError as error:
            lane.flights.pop()
            await self._recover(lane, error, flight)
            return
        for sequence in flight.begun:
            if sequence.writer is not None:
                sequence.writer.start(sequence.computed)
            self._make_mask(sequence)
        if flight.masked:
            self._ask_masks(lane, flight)

    def _ask_masks(self, lane: Lane, flight: Flight) -> None:
        """A step with slices that wait for masks was submitted."""
        for sequence, slice_ in zip(flight.members, flight.step.slices, strict=True):
            if not slice_.masked or sequence.masker is None:
                continue
            if sequence.live:
                sequence.masker.ask(slice_.start + slice_.count, flight.step.id, slice_.slot)
            else:  # it has left while there was no room for the step
                lane.actor.mask(flight.step.id, slice_.slot, None)

    def _make_mask(self, sequence: Sequence) -> None:
        """Begins to make the mask of a request's next token, where it has masks."""
        if sequence.masker is not None and sequence.masker.wanted and self._masking is not None:
            self._masking.start_soon(self._made_mask, sequence, sequence.masker)

    async def _made_mask(self, sequence: Sequence, masker: Masker) -> None:
        started_ns = time.perf_counter_ns()
        try:
            await masker.make()
        except Exception as error:
            if _unfinished(sequence):
                self._fail(sequence, error)
        if self._recorder is not None:
            self._recorder.mask(sequence, started_ns)
        self._wake()  # it may have been left out of steps until now

    async def _receive(self, lane: Lane) -> None:
        """Waits for the oldest step and hands out what it brought."""
        try:
            result = await lane.actor.result()
        except ExecutorError as error:
            await self._recover(lane, error, lane.flights.popleft())
            return
        flight = lane.flights.popleft()
        if result.id != flight.step.id:
            raise InternalError(f"the result of step {result.id} came where {flight.step} was expected")
        lane.returned(result)
        if self._recorder is not None:
            self._recorder.step(lane, flight, result)
        for i, sequence in enumerate(flight.members):
            sequence.in_flight -= 1
            if result.stopped or sequence.state is SequenceState.LEAVING:
                slice_ = flight.step.slices[i]  # others count on what it no longer needs of windowed bytes
                sequence.table.pass_by(slice_.start + slice_.count)
            if sequence.state is SequenceState.LEAVING:
                self._discarded += 1
                if not sequence.in_flight:
                    self._scheduler.release(sequence)
            elif result.stopped:  # only where the executor stops on its own account: what it had done is lost
                self._scheduler.leave(sequence, again=True)
            else:
                self._advance(sequence, lane, flight, result, i)

    def _advance(self, sequence: Sequence, lane: Lane, flight: Flight, result: StepResult, i: int) -> None:
        """One slice of a live sequence has returned."""
        slice_ = flight.step.slices[i]
        sequence.computed = slice_.start + slice_.count
        if sequence.computed >= sequence.table.due:
            sequence.table.pass_by(sequence.computed)
        lane.prefilled += len(slice_.tokens)
        writer, masker = sequence.writer, sequence.masker
        if masker is not None:
            masker.returned(sequence.computed)
        if writer is None:
            reading = sequence.reading
            assert reading is not None
            if (unusable := reading.accept(slice_, result, i)) is not None:
                self._blame(sequence, lane, flight.step, unusable)
            elif sequence.computed == sequence.limit:
                self._finish(sequence)
            return
        outcome = result.sampled[i] if slice_.sample else None
        if isinstance(outcome, Unusable):
            self._blame(sequence, lane, flight.step, outcome)
            return
        if isinstance(outcome, Skipped | Verified) or (
            slice_.sample and (outcome is None or not 0 <= outcome.token < self.options.vocab_size)
        ):
            problem = f"the executor gave {outcome} instead of a token of the vocabulary"
            self._fail(sequence, ExecutorError(lane.actor.name, flight.step, problem))
            return
        if sequence.computed - sequence.table.committed >= PAGE_TOKENS:
            sequence.table.commit(sequence.known, sequence.computed)
        if sequence.on_prefill is not None and not writer.generated:
            try:
                sequence.on_prefill(sequence.computed, sequence.prompt)
            except BaseException as error:  # it belongs to the request's consumer, whatever it is
                if sequence.live:
                    self._fail(sequence, carried(error))
            if not sequence.live:  # the callback may also have left the stream
                return
        if self._scheduler.hand_over(sequence):
            lane.handed_over += 1
        if outcome is not None:
            sequence.known.append(outcome.token)
            self._generated += 1
            try:
                finished = writer.accept(outcome) is not None
            except Exception as error:  # such as a token that the model has and the tokenizer has not
                self._fail(sequence, error)
                return
            if finished:
                self._finish(sequence)
            elif masker is not None:
                self._make_mask(sequence)

    def _blame(self, sequence: Sequence, lane: Lane, step: Step, unusable: Unusable) -> None:
        """No token can be picked: that ends this request, and concerns no other."""
        if not unusable.parameters:
            self._index.clear()  # what else the executor has computed for it may be as wrong, and be found again
        late = None
        if sequence.masker is not None and sequence.masker.made != sequence.computed:
            late = self.options.mask_deadline
        position = sequence.computed
        self._fail(sequence, blame(unusable, sequence.sampling, position, lane.actor.name, step, late))

    async def _recover(self, lane: Lane, error: ExecutorError | None, failed: Flight | None) -> None:
        """The executor of a lane was lost. The requests in a step that failed fail. Every other one goes on from what
        is in the KV pages, or where these were lost too, is computed again from the tokens it knows. Its consumer
        notices only the time. Sequences of other lanes are not concerned."""
        lost = [*lane.flights]
        lane.flights.clear()
        for _ in lost:
            try:  # they went down with the executor
                await lane.actor.result()
            except ExecutorError:
                continue
        if isinstance(error, NotRebuilt):
            if not lane.number:  # those that wait too: each would wait for an attempt of its own
                self._fail_all(lambda: copied(error))
        elif error is not None and failed is not None and not isinstance(error, Reopened):
            for sequence in failed.members:
                if sequence.live:
                    self._fail(sequence, copied(error))
        if failed is not None:
            lost.append(failed)
        # Until the executor is closed it may still write to the pages of its steps, so these count as in flight.
        unsafe: set[int] = set()
        if self._keeps_pages and not isinstance(error, NotRebuilt) and not await lane.actor.gone():
            unsafe = {sequence.id for flight in lost for sequence in flight.members}
        for flight in lost:
            for sequence in flight.members:
                sequence.in_flight -= 1
        for sequence in self._scheduler.running.copy():
            if self._keeps_pages and sequence.lane != lane.number:
                continue
            if sequence.id in unsafe:
                sequence.table.abandon()
            if not sequence.live:
                self._scheduler.release(sequence)
            elif self._keeps_pages and sequence.id not in unsafe:
                self._scheduler.resume(sequence)
            else:
                self._scheduler.leave(sequence, again=True)
        if not self._keeps_pages:
            self._index.clear()
        lane.lost += lane.actor.generation - lane.generation  # none of an actor that is broken for good
        lane.generation = lane.actor.generation
        self._wake()

    def _wake(self) -> None:
        """There may be something to compose again."""
        for lane in self._lanes:
            lane.wake()

    # The ways out of it

    def _finish(self, sequence: Sequence) -> None:
        self._finished += 1
        sequence.stream.end()
        self._leave(sequence)

    def _fail(self, sequence: Sequence, error: BaseException | None) -> None:
        self._failed += 1
        sequence.stream.end(error)
        self._leave(sequence)

    def _cancel(self, sequence: Sequence) -> None:
        """The consumer has left its stream. After the end of the sequence that means nothing."""
        if _unfinished(sequence):
            self._cancelled += 1
            self._leave(sequence)
        self._wake()

    def _fail_all(self, error: Callable[[], Exception]) -> None:
        """``error``: makes one for each request."""
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            if _unfinished(sequence):
                self._fail(sequence, error())

    def _leave(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.WAITING:
            self._scheduler.drop(sequence)
        elif sequence.live:
            self._scheduler.leave(sequence)
        sequence.again = False
        if sequence.masker is not None:
            sequence.masker.cancel()
        self._departed.set()
        for lane in self._lanes:
            for flight in lane.flights:
                if not flight.stopped and not any(member.live for member in flight.members):
                    flight.stopped = True
                    lane.actor.stop(flight.step.id)

    def close(self) -> None:
        """No more requests; those there are fail with ClosedError. ``run`` returns when their steps have."""
        self._closed = True
        self._fail_all(lambda: ClosedError("the engine was closed while this request ran"))
        self._index.clear()
        self._wake()

    @property
    def closed(self) -> bool:
        return self._closed

    async def idle(self) -> None:
        """Returns when no request waits or runs."""
        while any(map(_unfinished, [*self._scheduler.waiting, *self._scheduler.running])):
            if self._departed.is_set():
                self._departed = trio.Event()
            await self._departed.wait()

    # Requests

    def reserve(self) -> Ticket:
        """A place in the queue, to be taken before a prompt is tokenised: what the queue does not take costs nothing.

        Raises:
            BusyError: ``max_queue`` requests wait already.
            ClosedError: the engine is closed.
        """
        self._check_open()
        return self._queue.reserve(self._scheduler.open_slots, trio.current_time())

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed")

    def stream(
        self,
        prompt: Iterable[SupportsIndex],
        params: SamplingParams | None = None,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        token_mask: MaskFunction | None = None,
        ticket: Ticket | None = None,
    ) -> TokenStream:
        """Starts a request for the text after ``prompt`` (token ids).

        ``on_prefill(done, total)``, in prompt tokens, is called in the engine's task; what it raises ends the request.
        ``token_mask``: see ``Runtime.stream``. ``ticket``: of ``reserve``; it is used up, and given back where this
        raises.

        Raises:
            RequestError: the prompt is empty or has a token outside the vocabulary; ``token_mask`` cannot be called,
                or the executor takes no masks; or (from iterating) the parameters leave no token to pick, or
                ``token_mask`` raised or gave no mask.
            ContextOverflowError: prompt and ``max_tokens`` together exceed the context.
            BusyError: the queue is full.
            ClosedError: the engine is closed.
        """
        with ticket or self.reserve() as place:
            return self._stream(prompt, params or SamplingParams(), on_prefill, token_mask, place)

    def _stream(
        self,
        prompt: Iterable[SupportsIndex],
        params: SamplingParams,
        on_prefill: Callable[[int, int], None] | None,
        token_mask: MaskFunction | None,
        ticket: Ticket,
    ) -> TokenStream:
        self._check_open()  # first: a closed engine has no tokenizer
        self.check(params, token_mask)
        options, tokenizer = self.options, self._tokenizer
        known = prompt_tokens(prompt, params.max_tokens, options)
        max_tokens = params.max_tokens if params.max_tokens is not None else options.context - len(known)
        stream = TokenStream(options.stream_buffer)
        writer = Writer(
            stream,
            # A space at the beginning is one, unless nothing that shows stands before it.
            tokenizer.detokenizer(continuation=not all(map(tokenizer.is_special, known))),
            StopFinder(params.stop, self._control_spelling) if params.stop else None,
            frozenset() if params.ignore_eos else tokenizer.eos_ids,
            frozenset(params.stop_token_ids),
            prompt=len(known),
            max_tokens=max_tokens,
            logprobs=params.logprobs is not None,
            queued=ticket.since,
        )
        masker = None
        if token_mask is not None:
            masker = Masker(token_mask, known, options.vocab_size, self._lanes[0].actor.mask)
        limit = len(known) + max_tokens
        self._enqueue(known, limit, params.sampling(), stream, writer, ticket, on_prefill, masker)
        return stream

    def check(self, params: SamplingParams, token_mask: MaskFunction | None = None) -> None:
        """What parameters can be checked for without their prompt. Safe from any thread.

        Raises:
            RequestError: a token is outside the vocabulary; or as ``stream``, for ``token_mask``.
        """
        if token_mask is not None:
            if not callable(token_mask):
                raise RequestError(
                    f"token_mask={token_mask!r}: a function of the tokens generated so far is needed"
                )
            if not (actor := self._lanes[0].actor).takes_masks:
                raise RequestError(
                    f"token_mask: the executor of actor {actor.name!r} takes no masks; take executor='cpu', or leave "
                    f"it out"
                )
        if params.logit_bias:
            for token in (min(params.logit_bias), max(params.logit_bias)):
                check_token("logit_bias", token, self.options)

    async def score(self, tokens: Iterable[SupportsIndex], *, ticket: Ticket | None = None) -> Floats:
        """The natural log probability of each token but the first, given those before it. float32 (n - 1,).

        Raises: as ``stream``; ExecutorError also where the model's logits are no numbers.
        """
        return await self._read(tokens, "scores", ticket)

    async def logits(self, tokens: Iterable[SupportsIndex], *, ticket: Ticket | None = None) -> Floats:
        """The logits of the token after each, as the model gives them. float32 (n, vocab_size): for tests; large.

        Raises: as ``stream``.
        """
        return await self._read(tokens, "logits", ticket)

    def statistics(self) -> EngineStatistics:
        states = [sequence.state for sequence in self._scheduler.running]
        return EngineStatistics(
            requests=self._requests,
            finished=self._finished,
            cancelled=self._cancelled,
            failed=self._failed,
            waiting=self._queue.waiting + self._scheduler.preempted,
            prefilling=states.count(SequenceState.PREFILL),
            decoding=states.count(SequenceState.DECODE),
            leaving=states.count(SequenceState.LEAVING),
            free_slots=self._scheduler.free_slots,
            steps=sum(lane.steps for lane in self._lanes),
            steps_in_flight=sum(len(lane.flights) for lane in self._lanes),
            prefill_tokens=sum(lane.prefilled for lane in self._lanes),
            generated_tokens=self._generated,
            discarded_slices=self._discarded,
            preemptions=self._scheduler.preemptions,
            rebuilds=sum(lane.lost for lane in self._lanes),
            queue=self._queue.statistics(),
            pages=self.pool.statistics(),
            prefixes=self._index.statistics(),
            windows=None if self.pool.windows is None else self.pool.windows.statistics(),
            lanes=tuple(lane.statistics() for lane in self._lanes),
        )

    async def _read(
        self, tokens: Iterable[SupportsIndex], kind: Literal["scores", "logits"], ticket: Ticket | None
    ) -> Floats:
        reading = Reading(kind)
        stream = TokenStream(self.options.stream_buffer)
        with ticket or self.reserve() as place:
            self._check_open()
            known = prompt_tokens(tokens, 0, self.options)
            self._enqueue(known, len(known), Sampling(), stream, reading, place, None)
        async with stream:
            async for _ in stream:
                raise InternalError("a sequence that is only read has sampled a token")
        return reading.result()

    def _enqueue(
        self,
        known: array[int],
        limit: int,
        sampling: Sampling,
        stream: TokenStream,
        output: Writer | Reading,
        ticket: Ticket,
        on_prefill: Callable[[int, int], None] | None,
        masker: Masker | None = None,
    ) -> None:
        ticket.use()
        self._requests += 1
        table = PageTable(self._index, -(-limit // PAGE_TOKENS))
        sequence = Sequence(
            self._requests, known, limit, sampling, stream, table, output, ticket, on_prefill, masker
        )
        stream.attach(
            lambda: self._cancel(sequence),
            self._wake,
            output.timing if isinstance(output, Writer) else Timing,
        )
        self._scheduler.add(sequence)
        self._wake()

    def _control_spelling(self, token: int) -> str:
        """ "" for a token whose text is shown."""
        tokenizer = self._tokenizer
        return tokenizer.token_bytes(token).decode(errors="replace") if tokenizer.is_special(token) else ""


def _usable(actor: StepActor) -> Callable[[], bool]:
    return lambda: actor.usable


def _unfinished(sequence: Sequence) -> bool:
    """Whether its consumer still has something to wait for from the engine."""
    return sequence.live or sequence.state is SequenceState.WAITING or sequence.again
