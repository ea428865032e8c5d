"""Logits that leave no token to pick end one request, and concern nobody else; who is to blame is told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

import pi2rt
from pi2rt._errors import ClosedError, ExecutorError, RequestError
from pi2rt.engine import Chunk, SamplingParams
from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor
from pi2rt.runtime.step import Sampled, StepResult
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf

EVERYTHING = dict.fromkeys(range(VOCAB_SIZE), -math.inf)
EXECUTORS = ["cpu", "reference", "simulated"]

BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"logit_bias": EVERYTHING},
        r"^logit_bias=\{0: -inf, 1: -inf, 2: -inf, \.\.\. 317 more\}: no token can be pic",
    ),
    (
        {
            "logit_bias": EVERYTHING,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 0.1,
            "min_p": 1.0,
            "logprobs": 64,
        },
        r"^logit_bias=",
    ),
    (  # 1e9 / 1.2e-38 is no float32
        {"logit_bias": {7: 1e9}, "repetition_penalty": 1.2e-38},
        r"^repetition_penalty=1\.2e-38: no token can be picked at position 3, because",
    ),
    (
        {
            "logit_bias": {7: 1e9},
            "repetition_penalty": 1.2e-38,
            "frequency_penalty": -100,
            "temperature": 1e-37,
        },
        r"^repetition_penalty=1\.2e-38: ",
    ),
]


async def collect(runtime: pi2rt.Runtime, prompt: list[int], **params: Any) -> list[Chunk]:
    async with runtime.stream(prompt, ignore_eos=True, **params) as stream:
        return [chunk async for chunk in stream]


def said(chunks: list[Chunk]) -> list[tuple[Any, ...]]:
    return [(chunk.token, chunk.text, chunk.logprob, chunk.top_logprobs) for chunk in chunks]


@pytest.mark.parametrize("executor", EXECUTORS)
async def test_parameters_that_leave_no_token_end_their_request_alone(tiny_path: Path, executor: str) -> None:
    """Twice as many as failures would break the actor for good."""
    async with pi2rt.open_runtime(tiny_path, executor=executor, context=256) as runtime:
        neighbours = [([5, 6, 7], {}), ([9] * 70, {"temperature": 1.0, "seed": 3}), ([8, 1], {"logprobs": 5})]
        alone = [said(await collect(runtime, p, max_tokens=40, **q)) for p, q in neighbours]
        together: dict[int, list[tuple[Any, ...]]] = {}

        async def neighbour(i: int) -> None:
            prompt, params = neighbours[i]
            together[i] = said(await collect(runtime, prompt, max_tokens=40, **params))

        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(neighbour, i)
            for _ in range(3):
                for params, message in BAD:
                    with pytest.raises(RequestError, match=message):
                        await collect(runtime, [5, 6, 7], max_tokens=5, **params)
        assert [together[i] for i in range(3)] == alone
        statistics = runtime.statistics()
        assert (statistics.actors[0].generation, statistics.actors[0].failed) == (0, 0)
        assert (statistics.engine.failed, statistics.engine.rebuilds) == (12, 0)
        assert said(await collect(runtime, [5, 6, 7], max_tokens=40)) == alone[0]


@pytest.mark.parametrize("executor", ["cpu", "reference"])  # what is simulated follows no bias
async def test_what_came_before_is_there(tiny_path: Path, executor: str) -> None:
    """The first token is the only one allowed, and then there twice."""
    bias = EVERYTHING | {7: 1e9}
    async with pi2rt.open_runtime(tiny_path, executor=executor, context=256) as runtime:
        async with runtime.stream([5, 6, 8], logit_bias=bias, repetition_penalty=1.2e-38) as stream:
            assert (await anext(stream)).token == 7
            with pytest.raises(RequestError, match=r"^repetition_penalty=1\.2e-38: .* at position 4, "):
                await anext(stream)


params_of_any_kind = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1.2e-38, 1e-30, 1e-3, 1.0, 100.0]),
        "top_k": st.sampled_from([0, 1, 3, 2**31 - 1]),
        "top_p": st.sampled_from([1.0, 0.5, 1.2e-38]),
        "min_p": st.sampled_from([0.0, 1.2e-38, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.2e-38, 1e-36, 1e-30, 0.5, 100.0]),
        "presence_penalty": st.sampled_from([0.0, 100.0, -100.0]),
        "frequency_penalty": st.sampled_from([0.0, 100.0, -100.0]),
        "logit_bias": st.one_of(
            st.just({}),
            st.just(EVERYTHING),
            st.just(EVERYTHING | {3: 1e9}),
            st.dictionaries(
                st.integers(0, VOCAB_SIZE - 1), st.sampled_from([-math.inf, 1e9, -1e9, 50.0]), max_size=5
            ),
        ),
        "seed": st.sampled_from([None, 0, 2**63 - 1]),
        "logprobs": st.sampled_from([None, 0, 64]),
        "stop_token_ids": st.sampled_from([(), (0, VOCAB_SIZE - 1, 2**31 - 1)]),
        "max_tokens": st.integers(1, 8),
    }
)


@pytest.mark.parametrize("executor", EXECUTORS)
@given(requests=st.lists(params_of_any_kind, min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_any_parameters(tiny_path: Path, executor: str, requests: list[dict[str, Any]]) -> None:
    """A request gets its tokens, or a RequestError that names a parameter of its own; the neighbour notices nothing."""

    async def main() -> None:
        async with pi2rt.open_runtime(tiny_path, executor=executor, context=128) as runtime:
            alone = said(await collect(runtime, [1, 2, 3], max_tokens=12, logprobs=3))

            async def one(params: dict[str, Any]) -> None:
                try:
                    tokens = [chunk.token for chunk in await collect(runtime, [3, 4, 3, 50], **params)]
                except RequestError as error:
                    names = str(error).split(": no token can be picked")[0].split(" and ")
                    for name in (named.split("=")[0] for named in names):
                        assert params[name] != getattr(SamplingParams(), name)
                else:
                    assert 1 <= len(tokens) <= params["max_tokens"]
                    if executor != "simulated":
                        assert all(params["logit_bias"].get(token) != -math.inf for token in tokens)

            async with trio.open_nursery() as nursery:
                for params in requests:
                    nursery.start_soon(one, params)
                assert said(await collect(runtime, [1, 2, 3], max_tokens=12, logprobs=3)) == alone
            assert runtime.statistics().actors[0].generation == 0

    trio.run(main)


async def test_logprobs_of_more_tokens_than_are_allowed(tmp_path: Path) -> None:
    """Those that are forbidden come last, by their ids."""
    path = write_gguf(tmp_path / "m.gguf", TinyModel())
    bias = dict.fromkeys(range(10, VOCAB_SIZE), -math.inf)
    ranked = []
    for executor in "cpu", "reference":
        async with pi2rt.open_runtime(path, executor=executor, context=64, exact_floats=True) as runtime:
            (chunk,) = await collect(runtime, [1, 2], max_tokens=1, logprobs=64, logit_bias=bias)
            ranked.append([token for token, _ in chunk.top_logprobs])
            assert [logprob for _, logprob in chunk.top_logprobs[10:]] == [-math.inf] * 54
            (first, *_) = (await runtime.logits([1, 2]))[-1:]
            assert ranked[-1] == [*np.argsort(-first[:10], kind="stable").tolist(), *range(10, 64)]
    assert ranked[0] == ranked[1]


@pytest.mark.parametrize("executor", ["cpu", "reference"])
async def test_a_model_whose_logits_are_no_numbers(tmp_path: Path, executor: str) -> None:
    """One row of the head overflows in both directions. The executor is blamed, each request alone, and goes on."""
    model = TinyModel()
    weights = model.weights()
    head, norm = weights["lm_head.weight"], weights["model.norm.weight"] * np.float32(1e3)
    head[VOCAB_SIZE - 5] = 3e38
    tensors = {"output.weight": head, "output_norm.weight": norm}
    path = write_gguf(tmp_path / "broken.gguf", model, extra=tensors)
    async with pi2rt.open_runtime(path, executor=executor, context=64, exact_floats=True) as runtime:
        for params in [{}, {"temperature": 1.0}, {"repetition_penalty": 2.0}, {"logprobs": 2}] * 2:
            with pytest.raises(
                ExecutorError,
                match=r"^actor '\w+' failed on <Step .* the model's logits at position 3 are not fin",
            ):
                await collect(runtime, [1, 2, 3], max_tokens=5, **params)
        with pytest.raises(ExecutorError, match="logits at position 3 are not finite"):
            await runtime.score([1, 2, 3])
        logits = await runtime.logits([1, 2, 3])
        assert not np.isfinite(logits[:, VOCAB_SIZE - 5]).any()
        statistics = runtime.statistics()
        assert (statistics.actors[0].state, statistics.actors[0].generation) == ("ready", 0)
        assert statistics.engine.failed == 9


async def test_broken_logits_of_one_sequence_leave_the_others_alone(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    faults = Faults(no_numbers=frozenset((step, slot) for step in (5, 6, 7) for slot in (1, 3)))
    async with opened(tokenizer, faults=faults, seconds_per_step=0.01) as o:
        outcomes: list[str] = []

        async def one(seed: int) -> None:
            prompt = numbers(70, seed=seed)
            try:
                assert await o.tokens(prompt, 30) == continuation(prompt, 30)
                outcomes.append("right")
            except ExecutorError as error:
                outcomes.append(str(error).split(" at position")[0].split(": ")[-1])

        async with trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(one, seed)
        blamed = "the model's logits"
        assert sorted(outcomes) == ["right", "right", blamed, blamed]
        statistics = o.engine.statistics()
        assert (statistics.failed, statistics.rebuilds, o.log.executors) == (2, 0, 1)


async def test_what_a_broken_sequence_computed_is_not_found_again(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    faults = Faults(no_numbers=frozenset([(3, 0)]))
    async with opened(tokenizer, faults=faults) as o:
        prompt = numbers(200)
        with pytest.raises(ExecutorError):
            await o.tokens(prompt, 5)
        await o.idle()
        chunks = await o.chunks(prompt, max_tokens=5)
        assert [chunk.token for chunk in chunks] == continuation(prompt, 5)
        assert chunks[-1].timing is not None
        assert chunks[-1].timing.cached_tokens == 0


async def test_scores_that_are_no_numbers(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, faults=Faults(no_numbers=frozenset([(2, 0)])), max_tokens=64) as o:
        with pytest.raises(ExecutorError, match="logits at position 128"):
            await o.engine.score(numbers(200))
        assert (await o.engine.score(numbers(200))).shape == (199,)


@pytest.mark.parametrize("wrong", [Sampled(VOCAB_SIZE), Sampled(-1), None])
async def test_an_unknown_token_is_the_executors_fault(
    tokenizer: Tokenizer, autojump_clock: MockClock, wrong: Sampled | None
) -> None:
    """A plug-in may be wrong; computing such a token would fail a step with neighbours in it."""

    class Wrong(SimulatedExecutor):
        async def wait(self) -> StepResult:
            result = await super().wait()
            return StepResult(result.id, (wrong, *result.sampled[1:]), result.scores, result.logits)

    async with opened(tokenizer, make_executor=lambda log: Wrong()) as o:
        params, prompt = SamplingParams(max_tokens=1), numbers(7, seed=1)
        async with o.engine.stream(numbers(5), params) as first, o.engine.stream(prompt, params) as second:
            with pytest.raises(
                ExecutorError, match=r"the executor gave .* instead of a token of the vocabulary"
            ):
                await anext(first)
            assert [chunk.token async for chunk in second] == continuation(prompt, 1)
        assert o.engine.statistics().rebuilds == 0


class Ends(BaseException):
    """As SystemExit is, but of nobody's."""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Ends, Ends),
        (SystemExit, SystemExit),
        (ZeroDivisionError, ZeroDivisionError),
        (StopAsyncIteration, RequestError),  # would look like a good end
        (StopIteration, RequestError),
        (GeneratorExit, RequestError),
    ],
)
async def test_whatever_a_callback_raises_is_its_requests(
    tokenizer: Tokenizer,
    autojump_clock: MockClock,
    raised: type[BaseException],
    expected: type[BaseException],
) -> None:
    def raises(done: int, total: int) -> None:
        raise raised("from the callback")

    async with opened(tokenizer, seconds_per_step=0.01) as o:
        neighbour = numbers(70, seed=1)

        async def beside() -> None:
            assert await o.tokens(neighbour, 30) == continuation(neighbour, 30)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            await trio.sleep(0.1)
            async with o.engine.stream(numbers(5), on_prefill=raises) as chunks:
                with pytest.raises(expected) as caught:
                    await anext(chunks)
                if expected is RequestError:
                    assert str(caught.value).startswith(f"on_prefill raised {raised.__name__}")
                    assert isinstance(caught.value.__cause__, raised)
        assert o.engine.statistics().failed == 1


async def test_a_callback_that_leaves_and_raises_counts_once(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer) as o:

        def leaves(done: int, total: int) -> None:
            stream.close()
            raise LookupError("gone")

        stream = o.engine.stream(numbers(5), on_prefill=leaves)
        async with stream:
            with pytest.raises(ClosedError):
                await anext(stream)
        await o.idle()
        statistics = o.engine.statistics()
        assert (statistics.cancelled, statistics.failed) == (1, 0)
