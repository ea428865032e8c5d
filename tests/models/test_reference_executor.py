"""The reference executor as an executor: slices, run-ahead, stopping, faults, closing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

from pi2rt._errors import BusyError, ClosedError, ModelFormatError
from pi2rt.executors.reference import model as reference_model
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import open_model_file
from pi2rt.models import describe
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.step import Bind, Sampling, Slice, Step, StepResult
from pi2rt.runtime.trace import Trace
from tests.support.running import NOTHING, all_logits, greedy, open_with_state, opened, page_table
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf, write_huggingface

TOKENS = np.random.RandomState(3).randint(0, VOCAB_SIZE - 2, 150).astype(np.int32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", TinyModel(seed=42, config={"sliding_window": 70}))


async def _run(
    executor: StepExecutor, *slices: Slice, binds: tuple[Bind, ...] = (), step_id: int = 1
) -> StepResult:
    executor.submit(Step(step_id, slices, binds))
    return await executor.wait()


def _bind(slot: int, sampling: Sampling | None = None, history: np.ndarray = NOTHING) -> Bind:
    return Bind(slot, sampling or Sampling(), history)


@pytest.mark.parametrize("cuts", [(1,), (64,), (63, 65, 128), tuple(range(1, 150, 7))])
async def test_a_prompt_in_chunks_gives_the_same_logits(path: Path, cuts: tuple[int, ...]) -> None:
    async with opened(ReferenceExecutor(), path) as executor:
        whole = await all_logits(executor, TOKENS)
        edges = [0, *cuts, len(TOKENS)]
        parts = []
        for start, end in itertools.pairwise(edges):
            part = Slice(1, start, page_table(1), TOKENS[start:end], logits=True)
            result = await _run(executor, part, binds=(_bind(1),) if start == 0 else ())
            parts.append(result.logits[0])
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=2e-5)


async def test_sequences_of_one_step_do_not_see_each_other(path: Path) -> None:
    async with opened(ReferenceExecutor(), path) as executor:
        alone = [await all_logits(executor, TOKENS[:n]) for n in (5, 100)]
        result = await _run(
            executor,
            Slice(2, 0, page_table(2), TOKENS[:5], logits=True),
            Slice(0, 0, page_table(0), TOKENS[:100], logits=True, sample=True),
            binds=(_bind(2), _bind(0)),
        )
    for together, expected in zip(result.logits, alone, strict=True):
        np.testing.assert_array_equal(together, expected)
    assert result.sampled[0] is None
    assert result.sampled[1] is not None
    assert result.sampled[1].token == int(alone[1][-1].argmax())


async def test_a_shared_page_is_read(path: Path) -> None:
    async with opened(ReferenceExecutor(), path) as executor:
        whole = await all_logits(executor, TOKENS)
        forked = page_table(1)
        forked[0] = page_table(0)[0]
        rest = Slice(1, PAGE_TOKENS, forked, TOKENS[PAGE_TOKENS:], logits=True)
        result = await _run(executor, rest, binds=(_bind(1),))
    np.testing.assert_allclose(result.logits[0], whole[PAGE_TOKENS:], rtol=0, atol=2e-5)


async def test_running_ahead_is_feeding_back(path: Path) -> None:
    sampling = Sampling(temperature=1.0, seed=11, repetition_penalty=1.3)
    async with opened(ReferenceExecutor(), path) as executor:
        ahead = await greedy(executor, TOKENS[:20], 10, sampling=sampling)
        start, tokens, fed = 0, TOKENS[:20], []
        for i in range(10):
            part = Slice(3, start, page_table(3), tokens, sample=True)
            result = await _run(executor, part, binds=(_bind(3, sampling, TOKENS[:20]),) if i == 0 else ())
            assert result.sampled[0] is not None
            start, tokens = start + len(tokens), np.array([result.sampled[0].token], np.int32)
            fed.append(int(tokens[0]))
    assert ahead == fed


async def test_the_text_does_not_depend_on_the_batch(path: Path) -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    async with opened(ReferenceExecutor(), path) as executor:
        alone = await greedy(executor, TOKENS[:9], 6, sampling=sampling)
        parts = [Slice(s, 0, page_table(s), TOKENS[: 9 - s], sample=True) for s in range(4)]
        first = await _run(
            executor, *parts, binds=tuple(_bind(s, sampling, TOKENS[: 9 - s]) for s in range(4))
        )
        tokens = [first.sampled[0]]
        for i in range(5):
            parts = [Slice(s, 9 - s + i, page_table(s), NOTHING, sample=True) for s in (2, 0, 1)]
            tokens.append((await _run(executor, *parts)).sampled[1])
    assert [t.token for t in tokens if t is not None] == alone


async def test_history_counts_for_the_penalties(path: Path) -> None:
    sampling = Sampling(presence_penalty=1000.0)
    async with opened(ReferenceExecutor(), path) as executor:
        free = await greedy(executor, TOKENS[:9], 1)
        everything_else = np.setdiff1d(np.arange(VOCAB_SIZE), [free[0], 17]).astype(np.int32)
        part = Slice(1, 0, page_table(1), TOKENS[:9], sample=True)
        binds = (_bind(1, sampling, np.append(everything_else, free).astype(np.int32)),)
        result = await _run(executor, part, binds=binds)
        again = await greedy(executor, TOKENS[:9], 40, sampling=Sampling(presence_penalty=1000.0))
    assert result.sampled[0] is not None
    assert result.sampled[0].token == 17
    assert len(set(again)) == 40  # generated tokens count too


async def test_scores_are_log_probabilities_of_the_targets(path: Path) -> None:
    targets = TOKENS[1:11].copy()
    targets[[0, 4]] = -1
    async with opened(ReferenceExecutor(), path) as executor:
        logits = (await all_logits(executor, TOKENS[:10])).astype(np.float64)
        part = Slice(1, 0, page_table(1), TOKENS[:10], targets=targets)
        result = await _run(executor, part, binds=(_bind(1, Sampling(logit_bias=((3, 50.0),))),))
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    scores = result.scores[0]
    assert scores is not None
    assert scores.dtype == np.float32
    for i, target in enumerate(targets):
        assert scores[i] == (0 if target < 0 else pytest.approx(expected[i, target], abs=1e-5))
    assert result.logits == (None,)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Slice(3, 0, page_table(0), TOKENS[:2]), "slot 3 was never bound"),
        (Slice(0, 0, page_table(0), NOTHING), "slot 0 continues a token that was never sampled"),
        (
            Slice(0, 0, page_table(0), np.array([VOCAB_SIZE], np.int32)),
            "token ids 320 to 320 outside a vocabulary",
        ),
        (Slice(0, 0, page_table(0), np.array([-1], np.int32)), "token ids -1 to -1 outside"),
        (Slice(0, 1023, page_table(0), TOKENS[:2]), "positions 1023 to 1025 outside a context of 1024"),
        (Slice(0, 64, page_table(0)[:1], TOKENS[:1]), "1 pages for 65 positions"),
        (Slice(0, 0, np.array([64], np.int32), TOKENS[:1]), "pages 64 to 64 outside a cache of 64"),
    ],
)
async def test_a_slice_that_cannot_be_fails_its_step_alone(path: Path, part: Slice, message: str) -> None:
    async with opened(ReferenceExecutor(), path) as executor:
        executor.submit(Step(1, (part,), (_bind(0),)))
        executor.submit(Step(2, (Slice(0, 0, page_table(0), TOKENS[:4], sample=True),), (_bind(0),)))
        with pytest.raises(ValueError, match=message):
            await executor.wait()
        assert (await executor.wait()).id == 2
        assert executor.statistics().in_flight == 0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    real = reference_model.activate

    def activate(kind: reference_model.Activation, x: np.ndarray) -> np.ndarray:
        made.pass_through()
        return real(kind, x)

    monkeypatch.setattr(reference_model, "activate", activate)
    yield made
    made.open.set()


class Gate:
    """Holds the worker inside the first feed-forward block it comes to."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.passed = 0

    def pass_through(self) -> None:
        self.passed += 1
        self.reached.set()
        assert self.open.wait(60)

    async def wait_reached(self) -> None:
        assert await trio.to_thread.run_sync(self.reached.wait, 60)


async def test_stop_ends_a_step_within_a_layer(path: Path, gate: Gate) -> None:
    async with opened(ReferenceExecutor(), path) as executor:
        part = Slice(0, 0, page_table(0), TOKENS, sample=True)
        executor.submit(Step(5, (part,), (_bind(0),)))
        executor.submit(Step(6, (part,), (_bind(0),)))
        await gate.wait_reached()
        executor.stop(5)
        executor.stop(99)  # unknown: ignored
        gate.open.set()
        stopped = await executor.wait()
        assert (stopped.id, stopped.stopped, stopped.sampled) == (5, True, ())
        after = await executor.wait()
        assert (after.id, after.stopped) == (6, False)
        assert gate.passed == 1 + 3  # one layer of the stopped step, three of the other


async def test_a_third_step_is_one_too_many(path: Path, gate: Gate) -> None:
    async with opened(ReferenceExecutor(), path) as executor:
        part = Slice(0, 0, page_table(0), TOKENS[:3])
        for i in range(2):
            executor.submit(Step(i, (part,), (_bind(0),)))
        with pytest.raises(BusyError, match="2 steps are in flight"):
            executor.submit(Step(3, (part,)))
        assert executor.statistics().in_flight == 2
        gate.open.set()
        assert [(await executor.wait()).id for _ in range(2)] == [0, 1]
        executor.submit(Step(4, (part,)))
        assert (await executor.wait()).id == 4


async def test_cancelling_wait_loses_nothing(path: Path, gate: Gate) -> None:
    async with opened(ReferenceExecutor(), path) as executor:
        executor.submit(Step(1, (Slice(0, 0, page_table(0), TOKENS[:3], sample=True),), (_bind(0),)))
        await gate.wait_reached()
        with trio.CancelScope() as scope:
            scope.cancel()
            await executor.wait()
        assert scope.cancelled_caught
        gate.open.set()
        assert (await executor.wait()).sampled[0] is not None


async def test_closing_stops_what_runs(path: Path, gate: Gate) -> None:
    outcomes: list[str] = []

    async def wait(executor: StepExecutor) -> None:
        with pytest.raises(ClosedError, match="was closed"):
            await executor.wait()
        outcomes.append("closed")

    async with opened(ReferenceExecutor(), path) as executor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, executor)
            executor.submit(Step(1, (Slice(0, 0, page_table(0), TOKENS),), (_bind(0),)))
            await gate.wait_reached()
            trio.lowlevel.current_trio_token().run_sync_soon(gate.open.set)
            await executor.aclose()
        assert outcomes == ["closed"]
        assert gate.passed == 1
        assert not [thread for thread in threading.enumerate() if thread.name == "pi2rt reference"]
        with pytest.raises(ClosedError, match="not open"):
            executor.submit(Step(2, ()))
        await executor.aclose()


async def test_before_open() -> None:
    executor = ReferenceExecutor()
    with pytest.raises(ClosedError, match="not open"):
        executor.submit(Step(1, ()))
    with pytest.raises(ClosedError, match="not open"):
        await executor.wait()
    await executor.aclose()


async def test_loading_reports_progress_and_can_be_cancelled(path: Path) -> None:
    options = ExecutorOptions(slots=1, pages=16, context=1024, max_tokens=64)
    seen: list[tuple[int, int]] = []
    with open_model_file(path) as file:
        executor = ReferenceExecutor()
        await open_with_state(executor, file, options, lambda done, total: seen.append((done, total)))
        await executor.aclose()
        done = [d for d, _ in seen]
        assert done == sorted(done)
        assert len({total for _, total in seen}) == 1
        assert seen[-1] == (sum(t.nbytes for t in file.tensors.values()),) * 2

        cancelled = ReferenceExecutor()
        with trio.CancelScope() as scope:
            await open_with_state(cancelled, file, options, lambda done, total: scope.cancel())
        assert scope.cancelled_caught
        with pytest.raises(ClosedError):
            cancelled.submit(Step(1, ()))
        await cancelled.aclose()


async def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    weights = TinyModel().weights()
    weights["model.layers.1.mlp.up_proj.weight"][7, 3] = np.nan
    write_huggingface(tmp_path, TinyModel())
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    good = TinyModel().weights()["model.layers.1.mlp.up_proj.weight"].tobytes()
    path.write_bytes(raw.replace(good, weights["model.layers.1.mlp.up_proj.weight"].tobytes()))
    with pytest.raises(
        ModelFormatError, match=r"tensor model.layers.1.mlp.up_proj.weight: value 451 of 6144 is nan"
    ):
        async with opened(ReferenceExecutor(), tmp_path):
            raise AssertionError("unreachable: opening fails")


async def test_statistics_and_trace(path: Path) -> None:
    trace = Trace()
    options = ExecutorOptions(slots=1, pages=16, context=1024, max_tokens=64, trace=trace)
    executor = ReferenceExecutor()
    with open_model_file(path) as file:
        model = describe(file)
        await open_with_state(executor, file, options, model=model)
    try:
        result = await _run(executor, Slice(0, 0, page_table(0), TOKENS[:5], sample=True), binds=(_bind(0),))
        statistics = executor.statistics()
    finally:
        await executor.aclose()
    assert (statistics.steps, statistics.tokens, statistics.in_flight) == (1, 5, 0)
    assert statistics.busy_ns == result.finished_ns - result.started_ns > 0
    parameters = sum(w.size for w in TinyModel(seed=42).weights().values())
    assert statistics.bytes == {"weights": 4 * parameters, "kv": 3 * 2 * 16 * PAGE_TOKENS * 2 * 16 * 4}
    assert result.weight_bytes == 4 * parameters
    assert len(trace) == 1 + 2 * 3  # the step, and two blocks of each of three layers
