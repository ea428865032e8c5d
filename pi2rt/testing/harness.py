"""What the tests of the suite stand on: a model, an executor that is opened and closed, steps and their results."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import numpy as np
import pytest
import trio

from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.memory import StateStore
from pi2rt.models import ModelDescription, describe
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import ExecutorOptions, Progress, StepExecutor, make_store
from pi2rt.runtime.step import Bind, Floats, Int32s, Sampled, Sampling, Skipped, Slice, Step, StepResult
from pi2rt.testing.tiny_models import TINY_MODELS, tiny_model_path
from pi2rt.testing.tolerance import Tolerance, allowed_tokens, near_ties, relative_errors

GREEDY = Sampling()
SEEDED = Sampling(temperature=1.0, seed=7)
FOLLOW_ON = np.empty(0, np.int32)
"""Tokens of a slice that continues the token sampled last."""

Arguments = ParamSpec("Arguments")
Suite = TypeVar("Suite", bound="Harness")


def no_progress(done: int, total: int) -> None:
    pass


def in_trio(
    test: Callable[Concatenate[Suite, Arguments], Awaitable[None]],
) -> Callable[Concatenate[Suite, Arguments], None]:
    """A test as a plain function, which runs Trio itself: no plug-in of pytest is needed. Fails after ``patience``
    seconds."""

    @functools.wraps(test)
    def run(self: Suite, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        __tracebackhide__ = True

        async def main() -> None:
            try:
                with trio.fail_after(self.patience):
                    await test(self, *args, **kwargs)
            except trio.TooSlowError:
                raise AssertionError(f"{self.doing} did not end within {self.patience:g} s") from None

        trio.run(main)

    return run


@dataclass(frozen=True, slots=True)
class Output:
    """What a step gave for one slice."""

    sampled: object
    scores: Floats | None
    logits: Floats | None

    @property
    def token(self) -> int:
        assert isinstance(self.sampled, Sampled), f"a token was asked for, the result has {self.sampled!r}"
        return self.sampled.token

    @property
    def rows(self) -> Floats:
        assert self.logits is not None, "logits were asked for, the result has none"
        return self.logits


def shown(sampling: Sampling) -> str:
    """What differs from the default, for a message."""
    found = []
    for each in fields(sampling):
        value = getattr(sampling, each.name)
        if value != each.default:
            found.append(
                f"logit_bias of {len(value)}" if each.name == "logit_bias" else f"{each.name}={value}"
            )
    return f"Sampling({', '.join(found)})"


class Harness:
    """Where a part of the suite begins. Subclasses give ``make_executor``; the rest may stay as it is.

    ``models``: names of those of ``TINY_MODELS`` that the executor can run; most tests take the first one. Where
    ``open_model`` is overridden, any names. ``options``: what ``StepExecutor.open`` gets; 4 slots, 256 positions and
    192 tokens in a step at least, and 4 pages for each slot. ``tolerance``: see there. ``patience``: seconds that a
    test may take; only a hang takes that long, on an emulated processor too. ``tries``: how often a race between a call
    and a step is tried, where one of its outcomes must be seen at least once.
    """

    models: ClassVar[Sequence[str]] = tuple(TINY_MODELS)
    options: ExecutorOptions = ExecutorOptions(slots=4, pages=16, context=256, max_tokens=192)
    tolerance: Tolerance = Tolerance()
    patience: float = 300.0
    tries: int = 50
    folder: Path
    doing = "the test"  # what a test that hangs is blamed on
    vocab_size = 0
    stores: tuple[
        StateStore | None, ...
    ] = ()  # kept to the end: a wrong executor may use one after ``aclose``

    @pytest.fixture(autouse=True)
    def _in_a_folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folder = tmp_path_factory.getbasetemp() / "conformance"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests with an argument ``model`` run once for each of ``models``."""
        if "model" in metafunc.fixturenames:
            metafunc.parametrize("model", list(self.models))

    # -- what authors give

    def make_executor(self) -> StepExecutor:
        """A new executor, not opened."""
        raise NotImplementedError("return a new executor")

    def open_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        """One of ``models``, opened anew, and its description."""
        file = open_model_file(tiny_model_path(self.folder, name))
        return file, describe(file)

    def open_reference_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        """The same model as the reference executor can read it."""
        return self.open_model(name)

    # -- executors

    @asynccontextmanager
    async def opened(self, model: str | None = None, **options: Any) -> AsyncIterator[StepExecutor]:
        """An executor with the model, which is closed at the end. ``options`` replace those of the suite."""
        file, description = self.open_model(self.models[0] if model is None else model)
        executor = self.make_executor()
        async with self._opened(executor, file, description, replace(self.options, **options)):
            yield executor

    async def open(
        self,
        executor: StepExecutor,
        file: ModelFile,
        description: ModelDescription,
        options: ExecutorOptions,
        progress: Progress = no_progress,
        store: StateStore | None = None,
    ) -> None:
        """With KV pages to borrow: ``store``'s, or new ones."""
        self.vocab_size = description.vocab_size
        self.doing = "open"
        if store is None:
            store = make_store(executor, description, options)
        self.stores = (*self.stores, store)
        try:
            await executor.open(file, description, options, store, progress)
        except Exception as error:
            raise AssertionError(f"open failed with {error!r}") from error

    @asynccontextmanager
    async def _opened(
        self,
        executor: StepExecutor,
        file: ModelFile,
        description: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None = None,
    ) -> AsyncIterator[None]:
        try:
            await self.open(executor, file, description, options, store=store)
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the first error says what is wrong
                await self.close(executor)
            raise
        else:
            await self.close(executor)
        finally:
            file.close()

    async def close(self, executor: StepExecutor) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(self.patience) as scope:
            await executor.aclose()
        assert not scope.cancelled_caught, f"aclose did not end within {self.patience:g} s"

    async def reference_logits(self, model: str, tokens: Int32s) -> Floats:
        """Logits (t, vocab_size) of a sequence of tokens (t,), by the reference executor."""
        file, description = self.open_reference_model(model)
        executor = ReferenceExecutor()
        options = ExecutorOptions(
            slots=1, pages=self.options.pages, context=len(tokens), max_tokens=len(tokens)
        )
        table = np.arange(-(-len(tokens) // PAGE_TOKENS), dtype=np.int32)
        async with self._opened(executor, file, description, options):
            piece = Slice(0, 0, table, tokens, logits=True)
            return (await self.run(executor, Step(0, (piece,), (Bind(0, GREEDY, tokens),))))[0].rows

    # -- steps

    def prompt(self, length: int, salt: int = 0) -> Int32s:
        """Some tokens, int32 (length,); other ones for another salt."""
        ids = (np.arange(length) * 7 + np.arange(length) ** 2 // 5 + 3 + 11 * salt) % self.vocab_size
        return ids.astype(np.int32)

    def pages(self, slot: int) -> Int32s:
        """The slot's own: 0 to 3 of slot 0, 4 to 7 of slot 1."""
        each = self.options.pages // self.options.slots
        return np.arange(slot * each, (slot + 1) * each, dtype=np.int32)

    def prefill(
        self, number: int, prompt: Int32s, slot: int = 0, sampling: Sampling = GREEDY, *, logits: bool = False
    ) -> Step:
        """The whole prompt in one step, sampling the token after it."""
        piece = Slice(slot, 0, self.pages(slot), prompt, sample=True, logits=logits)
        return Step(number, (piece,), (Bind(slot, sampling, prompt),))

    def following(self, number: int, start: int, slot: int = 0, *, logits: bool = False) -> Step:
        """One token more: the one sampled last, at position ``start``."""
        return Step(number, (Slice(slot, start, self.pages(slot), FOLLOW_ON, sample=True, logits=logits),))

    async def wait(self, executor: StepExecutor, step_id: int) -> StepResult:
        self.doing = f"wait for step {step_id}"
        try:
            result = await executor.wait()
        except Exception as error:
            raise AssertionError(f"step {step_id} failed with {error!r}") from error
        assert result.id == step_id, (
            f"step {step_id} is the oldest, but wait gave the result of step {result.id}"
        )
        return result

    async def run(self, executor: StepExecutor, step: Step) -> list[Output]:
        """What a step gives for each of its slices, complete and of the right shapes."""
        try:
            executor.submit(step)
        except Exception as error:
            counts = " and ".join(str(piece.count) for piece in step.slices)
            raise AssertionError(f"{step}, slices of {counts} tokens, was refused with {error!r}") from error
        return self.outputs(step, await self.wait(executor, step.id))

    def outputs(self, step: Step, result: StepResult) -> list[Output]:
        assert not result.stopped, f"step {step.id} has the result of a stopped one, but nobody stopped it"
        for name in ("sampled", "scores", "logits"):
            length = len(getattr(result, name))
            assert length == len(step.slices), f"{name}: {length} entries for {len(step.slices)} slices"
        found = [Output(*each) for each in zip(result.sampled, result.scores, result.logits, strict=True)]
        for number, (piece, output) in enumerate(zip(step.slices, found, strict=True)):
            where = f"step {step.id}, slice {number}"
            if isinstance(output.sampled, Skipped):
                assert not len(piece.tokens), f"{where} has tokens of its own, so it must not be skipped"
                assert (output.scores, output.logits) == (None, None), f"{where} was skipped, but has numbers"
                continue
            self._check_asked(f"{where}: sampled", piece.sample, output.sampled)
            self._check_array(f"{where}: scores", piece.targets is not None, output.scores, (piece.count,))
            shape = (piece.count, self.vocab_size)
            self._check_array(f"{where}: logits", piece.logits, output.logits, shape)
            if isinstance(output.sampled, Sampled):
                token = output.sampled.token
                assert 0 <= token < self.vocab_size, (
                    f"{where}: token {token} of a vocabulary of {self.vocab_size}"
                )
        return found

    def _check_asked(self, what: str, asked: bool, value: object) -> None:
        if asked:
            assert value is not None, f"{what} is None, but was asked for"
        else:
            assert value is None, f"{what} must be None, since it was not asked for"

    def _check_array(self, what: str, asked: bool, value: Floats | None, shape: tuple[int, ...]) -> None:
        self._check_asked(what, asked, value)
        if value is not None:
            assert value.shape == shape and value.dtype == np.float32, (  # noqa: PT018 - one message for both
                f"{what} must be float32 {shape}, but is {value.dtype} {value.shape}"
            )

    async def generate(
        self,
        executor: StepExecutor,
        prompt: Int32s,
        count: int,
        slots: Sequence[int] = (0,),
        sampling: Sampling = GREEDY,
    ) -> list[list[int]]:
        """``count`` tokens after the prompt in each of ``slots``, which are decoded together."""
        texts: list[list[int]] = []
        for slot in slots:
            (output,) = await self.run(executor, self.prefill(1000 + slot, prompt, slot, sampling))
            texts.append([output.token])
        for i in range(count - 1):
            slices = tuple(
                Slice(slot, len(prompt) + i, self.pages(slot), FOLLOW_ON, sample=True) for slot in slots
            )
            for text, output in zip(texts, await self.run(executor, Step(2000 + i, slices)), strict=True):
                text.append(output.token)
        return texts

    # -- checks

    @contextlib.contextmanager
    def raises(self, error: type[Exception], what: str) -> Iterator[None]:
        try:
            yield
        except error:
            return
        except Exception as other:
            raise AssertionError(f"{what} must raise {error.__name__}, not {other!r}") from other
        raise AssertionError(f"{what} must raise {error.__name__}, but raised nothing")

    def check_same(self, got: Floats, expected: Floats, what: str, first: int = 0) -> None:
        """Logits (t, vocab_size) of positions ``first`` on are those that this executor gave another time."""
        errors = relative_errors(got, expected)
        allowed = self.tolerance.repeat
        wrong = (got != expected).any(axis=-1) if allowed == 0.0 else errors > allowed
        assert not wrong.any(), (
            f"{what}: logits of {np.count_nonzero(wrong)} of {len(got)} positions are not those of the same tokens run "
            f"alone in one step, the first at position {first + int(np.argmax(wrong))}; relative error "
            f"{errors.max():.2g}, allowed {allowed:g}"
        )

    def check_reference(self, got: Floats, expected: Floats, what: str, first: int = 0) -> None:
        """Logits (t, vocab_size) of positions ``first`` on are those of the reference."""
        errors = relative_errors(got, expected)
        wrong = errors > self.tolerance.reference
        assert np.mean(~wrong) >= self.tolerance.within, (
            f"{what}: logits of {np.count_nonzero(wrong)} of {len(got)} positions are not the reference's, the first "
            f"at position {first + int(np.argmax(wrong))}; relative error {errors.max():.2g}, allowed "
            f"{self.tolerance.reference:g}"
        )
        agree = near_ties(expected, got.argmax(axis=-1).astype(np.int32), self.tolerance.reference)
        share = float(np.mean(agree))
        assert share >= self.tolerance.top1, (
            f"{what}: the most likely token is the reference's at {share:.1%} of the positions, near ties not counted; "
            f"allowed {self.tolerance.top1:.1%}"
        )

    async def check_text(
        self,
        executor: StepExecutor,
        prompt: Int32s,
        sampling: Sampling,
        got: Sequence[int],
        expected: Sequence[int],
        what: str,
    ) -> None:
        """Tokens after the prompt are those that this executor gave another time. Where it is inexact, they are up to
        the first near tie, where errors of that size decide what is sampled. ``sampling`` has no penalties."""
        if list(got) == list(expected):
            return
        message = f"{what}: tokens are {list(got)}, not {list(expected)}"
        assert self.tolerance.repeat > 0.0, message
        at = next(i for i, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1])
        tokens = np.concatenate((prompt, np.array(expected[:at], np.int32)))
        (output,) = await self.run(executor, self.prefill(3000, tokens, 3, logits=True))
        counts = np.zeros(self.vocab_size, np.int32)
        error = 2 * self.tolerance.repeat  # both may have one, and that of these logits
        allowed = allowed_tokens(output.rows[-1], sampling, counts, len(tokens), error)
        assert len(allowed) > 1, message

    def check_token(
        self, token: int, logits: Floats, sampling: Sampling, counts: Int32s, position: int, what: str
    ) -> None:
        """The token at ``position`` is what ``sampling`` picks from these logits (vocab_size,) of the same step."""
        allowed = allowed_tokens(logits, sampling, counts, position)
        assert token in allowed, (
            f"{what}: token {token} at position {position}, but from the executor's own logits {shown(sampling)} picks "
            f"{' or '.join(map(str, sorted(allowed))) or 'none'}"
        )
