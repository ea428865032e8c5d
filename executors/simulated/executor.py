"""A simulated hardware unit: keeps time on Trio's clock, and keeps the books of a KV cache.

It computes nothing, so a schedule can be tried on a device that one does not have: say what a step costs and
look at the trace. Under ``trio.testing.MockClock`` it takes no real time at all.

It is also the oracle of the engine's tests. Its pages hold token ids where a real KV cache holds keys and
values, and the next token is a function of all the tokens that a slice can see through its page table. A
wrong page, a stale prefix or a lost position therefore changes the text or breaks a rule; broken rules raise
InternalError from ``submit``:

- a slice reads only positions that its sequence has written, or a sequence whose prefix it shares;
- no page is written by two living sequences, and none that a slice reads is written in the same step;
- what a slice reads or writes agrees with the prompt given to ``Bind`` (where one was given);
- a slice without tokens follows a step that sampled for its slot, at the very next position;
- slots are bound before use; slots, pages, positions, tokens and step sizes keep to the options of ``open``.

A step whose slices wait for masks is run when these are there, and so are the steps behind it. What is wrong with them
is then an InternalError from ``wait``.
"""

from __future__ import annotations

import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import trio

from pi2rt._errors import BusyError, ClosedError, InternalError
from pi2rt.executors.reference.sampling import log_softmax, penalised
from pi2rt.executors.simulated.cache import SimulatedCache, SimulatedPages, SimulatedSequence
from pi2rt.formats import ModelFile
from pi2rt.memory import PAGE_TOKENS, MemoryNeed, StateStore
from pi2rt.models import ModelDescription
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.step import (
    Floats,
    Int32s,
    Outcome,
    Sampled,
    Sampling,
    Skipped,
    Slice,
    Step,
    StepResult,
    Unusable,
)
from pi2rt.runtime.token_mask import TokenMask, allows, mask_problem

NextToken: TypeAlias = Callable[[Int32s, int, Sampling], int]
"""``next_token(context, generated, sampling)``: the token after ``context``, all tokens of the sequence so
far, int32 (positions,). ``generated``: tokens sampled for it before. Taken modulo the size of the
vocabulary."""

_PEAK = 8.0  # logit of the next token; all others have 0
_HASH_KEY = 0x9E3779B9  # so that different seeds give different texts


class SimulatedFault(RuntimeError):
    """What an injected fault raises."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Failures to inject, by ``Step.id``. ``hang``: takes for ever, until stopped. ``no_numbers``: by slot too; the
    logits of that slice are NaN."""

    raise_in_submit: frozenset[int] = frozenset()
    raise_in_wait: frozenset[int] = frozenset()
    hang: frozenset[int] = frozenset()
    no_numbers: frozenset[tuple[int, int]] = frozenset()
    raise_in_open: bool = False
    raise_in_close: bool = False
    hang_in_close: bool = False


NO_FAULTS = Faults()


def hashed_token(context: Int32s, generated: int, sampling: Sampling) -> int:
    """The default: depends on every token of the context and, unless greedy, on the seed."""
    key = 0 if sampling.temperature == 0 else (sampling.seed + 1) * _HASH_KEY & 0xFFFFFFFF
    return zlib.crc32(np.ascontiguousarray(context).tobytes(), key)


def scripted(tokens: Sequence[int]) -> NextToken:
    """Every sequence generates ``tokens``, then the last of them for ever. An end-of-text token at the end
    makes sequences end there."""
    if not tokens:
        raise ValueError("a script needs at least one token")
    script = tuple(tokens)

    def next_token(context: Int32s, generated: int, sampling: Sampling) -> int:
        return script[min(generated, len(script) - 1)]

    return next_token


@dataclass(slots=True)
class _Running:
    """A step in flight. Times are Trio's, in seconds. ``masks``: by slot, those that are there; ``complete_at``: when
    the last of them came, or all others were given up. ``begun``: what its slices bring is known, or what is wrong with
    them (``problem``). ``void``: slots whose sequence is undefined since a step before was stopped."""

    step: Step
    submitted: float
    cost: float
    touched: list[tuple[SimulatedSequence, Slice]] = field(default_factory=list)
    sampled: list[Outcome | None] = field(default_factory=list)
    scores: list[Floats | None] = field(default_factory=list)
    logits: list[Floats | None] = field(default_factory=list)
    masks: dict[int, TokenMask | None] = field(default_factory=dict)
    complete_at: float = 0.0
    begun: bool = False
    problem: InternalError | None = None
    void: set[int] = field(default_factory=set)
    starts: float = 0.0
    ends: float = 0.0
    stopped: bool = False


class SimulatedExecutor:
    """Keeps time and the books of a KV cache; computes nothing. Reads only ``vocab_size`` of the model, so takes blocks
    of all kinds.

    Steps run one after another, each for ``seconds_per_step + seconds_per_token * tokens`` on Trio's clock.
    Log probabilities, scores and logits are those of a distribution that gives the next token e**8 times the
    weight of each other token. Where a mask does not allow that token, the first one that it allows comes instead.

    Args:
        name: for messages.
        max_in_flight: steps at once.
        seconds_per_step, seconds_per_token: what a step costs.
        seconds_to_open: what loading takes.
        next_token: what a model would say; ``hashed_token``, ``scripted(...)`` or one of your own.
        faults: failures to inject.
        pages: of its KV cache, shared with others; None: it has its own, which go with it.
    """

    block_kinds: frozenset[str] | None = None
    takes_masks = True

    def __init__(
        self,
        name: str = "simulated",
        *,
        max_in_flight: int = 2,
        seconds_per_step: float = 0.0,
        seconds_per_token: float = 0.0,
        seconds_to_open: float = 0.0,
        next_token: NextToken = hashed_token,
        faults: Faults = NO_FAULTS,
        pages: SimulatedPages | None = None,
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")
        for what, seconds in (
            ("seconds_per_step", seconds_per_step),
            ("seconds_per_token", seconds_per_token),
            ("seconds_to_open", seconds_to_open),
        ):
            if not (seconds >= 0 and math.isfinite(seconds)):
                raise ValueError(f"{what} must be finite and not negative, not {seconds}")
        self.name = name
        self.max_in_flight = max_in_flight
        self._seconds_per_step, self._seconds_per_token = seconds_per_step, seconds_per_token
        self._seconds_to_open = seconds_to_open
        self._next_token = next_token
        self._faults = faults
        self._pages = pages
        self._cache: SimulatedCache | None = None  # while open
        self._vocab_size = self._max_tokens = 0
        self._mask_deadline = 0.0
        self._free_at = 0.0  # when the last step that was waited for ended
        self._epoch_ns = 0  # perf_counter_ns at Trio's time 0
        self._queue: deque[_Running] = deque()
        self._changed = trio.lowlevel.ParkingLot()  # wait waits here, until a deadline or a change of it
        self._steps = self._tokens = self._busy_ns = self._finished_ns = 0

    def need(self, file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> MemoryNeed:
        """Token ids of its pages: it loads no weights, and computes nothing."""
        return MemoryNeed(0, PAGE_TOKENS * np.dtype(np.int32).itemsize, 0)

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        """Takes ``seconds_to_open``. ``file`` is not read: any stand-in will do."""
        total = max(1, options.pages)
        progress(0, total)
        await trio.sleep(self._seconds_to_open)
        if self._faults.raise_in_open:
            raise SimulatedFault("injected into open")
        self._vocab_size, self._max_tokens = model.vocab_size, options.max_tokens
        self._mask_deadline = options.mask_deadline
        self._epoch_ns = time.perf_counter_ns() - round(trio.current_time() * 1e9)
        self._cache = SimulatedCache(
            options.slots, self._pages or SimulatedPages(options.pages), options.context, model.vocab_size
        )
        progress(total, total)

    def submit(self, step: Step) -> None:
        """Raises, besides what the protocol says, InternalError for a step that breaks a rule of the
        cache."""
        self._opened()
        if len(self._queue) >= self.max_in_flight:
            raise BusyError(f"executor {self.name!r}: {self.max_in_flight} steps are in flight already")
        if step.id in self._faults.raise_in_submit:
            raise SimulatedFault(f"injected into submit of {step}")
        if step.tokens > self._max_tokens:
            raise InternalError(f"{step}: more than {self._max_tokens} tokens in one step")
        running = _Running(
            step=step,
            submitted=trio.current_time(),
            cost=math.inf
            if step.id in self._faults.hang
            else self._seconds_per_step + self._seconds_per_token * step.tokens,
        )
        self._queue.append(running)
        try:
            self._advance()
            if running.problem is not None:
                raise running.problem
        except BaseException:
            self._queue.pop()
            raise

    async def wait(self) -> StepResult:
        await trio.lowlevel.checkpoint()
        while True:
            self._opened()
            if not self._queue:
                raise InternalError(f"executor {self.name!r}: wait without a step in flight")
            head = self._queue[0]
            if head.ends <= trio.current_time():
                break
            with trio.CancelScope(deadline=head.ends) as scope:
                await self._changed.park()
            if scope.cancelled_caught:  # not a comparison of times: those are rounded
                break
        if not head.begun:
            head.complete_at = head.ends  # it waits no longer
            self._begin(head)
            self._advance()
        self._queue.popleft()
        if head.problem is not None:
            raise head.problem
        self._opened().end(head.step)
        self._free_at = head.ends
        started_ns, finished_ns = (self._epoch_ns + round(at * 1e9) for at in (head.starts, head.ends))
        spent_ns = (
            finished_ns - started_ns
        )  # and not rounded by itself, or this step could end after the next begins
        self._steps += 1
        self._tokens += head.step.tokens
        self._busy_ns += spent_ns
        if head.step.id in self._faults.raise_in_wait:
            raise SimulatedFault(f"injected into wait for {head.step}")
        self._finished_ns = finished_ns
        if head.stopped:
            return StepResult(head.step.id, stopped=True, started_ns=started_ns, finished_ns=finished_ns)
        return StepResult(
            head.step.id,
            sampled=tuple(head.sampled),
            scores=tuple(head.scores),
            logits=tuple(head.logits),
            started_ns=started_ns,
            finished_ns=finished_ns,
            kernel_ns=spent_ns,
        )

    def stop(self, step_id: int) -> None:
        """Ends a step at once. What it wrote, and what later steps built on that, becomes undefined."""
        now = trio.current_time()
        for running in self._queue:
            if running.step.id == step_id and not running.stopped and running.ends > now:
                running.stopped = True
                running.cost = max(0.0, now - running.starts)
                if running.begun:
                    self._undo_from(running)
                self._void_behind(running)
                self._advance()
                self._changed.unpark_all()
                return

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        """See ``pi2rt.runtime.executor.Masking``."""
        problem = None if allowed is None else mask_problem(allowed, self._vocab_size)
        if problem is not None:
            raise InternalError(f"step {step_id}, the mask of slot {slot}: {problem}")
        for running in self._queue:
            masked = any(piece.masked and piece.slot == slot for piece in running.step.slices)
            if running.step.id == step_id and masked and not running.begun and slot not in running.masks:
                running.masks[slot] = None if allowed is None else allowed.copy()
                running.complete_at = trio.current_time()
                self._advance()
                self._changed.unpark_all()

    async def aclose(self) -> None:
        if self._faults.hang_in_close:
            await trio.sleep_forever()
        if self._cache is not None:
            for running in self._queue:
                if running.begun and running.problem is None:
                    self._cache.end(running.step)
        self._cache = None
        self._queue.clear()
        self._changed.unpark_all()
        await trio.lowlevel.checkpoint()
        if self._faults.raise_in_close:
            raise SimulatedFault("injected into aclose")

    def statistics(self) -> ExecutorStatistics:
        return ExecutorStatistics(
            steps=self._steps,
            tokens=self._tokens,
            in_flight=len(self._queue),
            busy_ns=self._busy_ns,
            kernel_ns=self._busy_ns,
            finished_ns=self._finished_ns,
            bytes={} if self._cache is None else {"kv": self._cache.nbytes},
        )

    def _opened(self) -> SimulatedCache:
        if self._cache is None:
            raise ClosedError(f"executor {self.name!r} is not open")
        return self._cache

    def _advance(self) -> None:
        """Lays the steps in flight end to end, and runs those that wait for no mask, nor for a step that does."""
        free_at, waits = self._free_at, False
        for running in self._queue:
            running.starts = max(running.submitted, free_at)
            running.ends = running.starts + running.cost
            if not running.begun:
                waits = waits or self._waits(running)
                if not waits:
                    self._begin(running)
            if running.begun and not running.stopped:
                running.ends = max(running.ends, running.complete_at)
            elif not running.begun:
                running.ends += self._mask_deadline
            free_at = running.ends

    def _waits(self, running: _Running) -> bool:
        """Whether a slice waits for its mask, all steps before having been run."""
        if running.stopped:
            return False
        cache, bound = self._opened(), {bind.slot for bind in running.step.binds}
        known = running.masks.keys() | running.void
        return any(
            piece.masked and piece.slot not in known and (piece.slot in bound or not cache.skips(piece))
            for piece in running.step.slices
        )

    def _begin(self, running: _Running) -> None:
        """What its slices bring."""
        cache = self._opened()
        running.begun = True
        try:
            cache.begin(running.step)
            for piece in running.step.slices:
                self._run(cache, running, piece)
        except InternalError as problem:
            running.problem = problem
        if running.stopped:
            self._undo_from(running)

    def _void_behind(self, stopped: _Running) -> None:
        """Steps that were submitted behind one that was stopped, and were not run yet, continue nothing."""
        undefined: set[int] = set()
        for running in self._queue:
            undefined -= {bind.slot for bind in running.step.binds}
            if undefined and not running.begun:
                running.void |= undefined
            if running is stopped:
                undefined = {piece.slot for piece in running.step.slices}

    def _run(self, cache: SimulatedCache, running: _Running, piece: Slice) -> None:
        if cache.skips(piece):
            running.sampled.append(Skipped())
            running.scores.append(None)
            running.logits.append(None)
            return
        if piece.drafts:
            raise InternalError(f"{piece!r}: executor {self.name!r} verifies no drafts")
        if piece.masked and not piece.sample:
            raise InternalError(f"{piece!r}: a mask, and nothing to sample")
        if piece.slot in running.void:
            running.sampled.append(Unusable() if piece.sample else None)
            running.scores.append(None if piece.targets is None else np.zeros(piece.count, np.float32))
            shape = piece.count, self._vocab_size
            running.logits.append(np.zeros(shape, np.float32) if piece.logits else None)
            return
        sequence, context = cache.write(piece)
        running.touched.append((sequence, piece))
        sampling = sequence.bound.sampling
        end = len(context)

        def next_after(length: int) -> int:
            first = sequence.first_sample
            generated = 0 if first is None else max(0, length - first)
            return self._next_token(context[:length], generated, sampling) % self._vocab_size

        broken = (running.step.id, piece.slot) in self._faults.no_numbers
        sampled: Sampled | Unusable | None = None
        if piece.sample:
            token = next_after(end)
            late = piece.masked and piece.slot not in running.masks
            mask = running.masks.get(piece.slot)
            if broken or late:
                sampled = Unusable(() if broken else ("token_mask",))
            else:
                sampled = self._sampled(token, sampling, context, mask)
            cache.sample(sequence, end, sampled.token if isinstance(sampled, Sampled) else token)
        nexts = None
        if piece.targets is not None or piece.logits:
            nexts = np.array([next_after(length) for length in range(piece.start + 1, end + 1)], np.int32)
        scores = logits = None
        if piece.targets is not None:
            hit, miss = self._logprobs()
            scores = np.where(piece.targets == nexts, hit, miss).astype(np.float32)
            scores[piece.targets < 0] = 0.0
            if broken:
                scores[piece.targets >= 0] = np.nan
        if piece.logits:
            assert nexts is not None  # set above
            logits = np.zeros((len(nexts), self._vocab_size), np.float32)
            logits[np.arange(len(nexts)), nexts] = np.nan if broken else _PEAK
        running.sampled.append(sampled)
        running.scores.append(scores)
        running.logits.append(logits)

    def _logprobs(self) -> tuple[float, float]:
        """Of the next token, and of each other one."""
        total = math.log(math.exp(_PEAK) + self._vocab_size - 1)
        return _PEAK - total, -total

    def _sampled(
        self, token: int, sampling: Sampling, context: Int32s, mask: TokenMask | None
    ) -> Sampled | Unusable:
        """``token``, or the first one that the mask allows, unless mask, bias and penalties leave no usable logit; bias
        and penalties change nothing else here."""
        if sampling.logit_bias or sampling.repetition_penalty != 1.0 or mask is not None:
            logits = np.zeros(self._vocab_size, np.float32)
            logits[token] = _PEAK
            counts = np.bincount(context, minlength=self._vocab_size).astype(np.int32)
            changed = penalised(logits, sampling, counts, mask)
            if isinstance(changed, Unusable):
                return changed
            if mask is not None:
                logits[~allows(mask, self._vocab_size)] = -np.inf
                return _picked(logits, sampling)
        if sampling.logprobs < 0:
            return Sampled(token)
        hit, miss = self._logprobs()
        others = (other for other in range(self._vocab_size) if other != token)
        ranked = [(token, hit), *((other, miss) for other in others)] if sampling.logprobs else []
        return Sampled(token, hit, tuple(ranked[: sampling.logprobs]))

    def _undo_from(self, stopped: _Running) -> None:
        cache = self._opened()
        undefined: set[int] = set()  # by identity of the sequence
        lost: dict[int, int] = {}  # of pages, from which position on
        reached = False
        for running in self._queue:
            reached = reached or running is stopped
            if not reached or not running.begun:
                continue
            cache.undo_copies(running.step, lost, stopped=running is stopped)
            for sequence, piece in running.touched:
                if running is stopped or id(sequence) in undefined or not cache.readable(piece):
                    cache.undo(sequence, piece, lost)
                    undefined.add(id(sequence))


def _picked(logits: Floats, sampling: Sampling) -> Sampled:
    """The first of the largest, with log probabilities."""
    token = int(logits.argmax())
    if sampling.logprobs < 0:
        return Sampled(token)
    logprobs = log_softmax(logits)
    best = np.argsort(-logits, kind="stable")[: sampling.logprobs].tolist()
    return Sampled(token, float(logprobs[token]), tuple((i, float(logprobs[i])) for i in best))
