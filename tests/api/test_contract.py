"""docs/api.md, line by line, over all three APIs."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pi2rt
from pi2rt.catalogue import names
from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor, scripted
from pi2rt.formats import open_model_file
from pi2rt.opening import pack_cache
from pi2rt.runtime.token_mask import TokenMask, masking
from tests.api.adapters import APIS, Gate, GatedExecutor, TrioApi, parameters
from tests.support.tiny_models import BOS, EOS

CLOSED_STREAM = r"^this stream was closed$"
CLOSED_ENGINE = r"^the engine is closed$"


@pytest.fixture(params=APIS, ids=[api.name for api in APIS])
def api(request: pytest.FixtureRequest) -> TrioApi:
    """Typed as one of them; the others have the same methods."""
    found: TrioApi = request.param
    return found


def contract(line: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A line of the contract, run under the API that the fixture ``api`` is."""

    @functools.wraps(line)
    def test(api: TrioApi, **fixtures: Any) -> None:
        api.run(lambda: line(api, **fixtures))

    return test


def simulated(**options: Any) -> Callable[[], SimulatedExecutor]:
    return lambda: SimulatedExecutor(**options)


def gated(gate: Gate, at: int, **options: Any) -> Callable[[], SimulatedExecutor]:
    return lambda: GatedExecutor(gate, at, **options)


async def settled(api: TrioApi, engine: Any) -> Any:
    """The engine's statistics as soon as nothing runs any more. They are consistent."""
    while True:
        found = engine.statistics().engine
        unfinished = found.waiting + found.prefilling + found.decoding
        ended = found.finished + found.cancelled + found.failed
        assert (
            ended <= found.requests <= ended + unfinished
        )  # what is being tokenised waits, and is no request yet
        if not unfinished and not found.leaving:
            assert found.pages.held == found.prefixes.unused
            return found
        await api.turn()


# Names

METHODS = ("stream", "generate", "score", "logits", "resize", "statistics")


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_the_same_parameters(method: str) -> None:
    of_trio, of_asyncio, of_sync = (parameters(getattr(api.engine, method)) for api in APIS)
    assert of_asyncio == of_trio
    assert of_sync.pop("timeout", ...) in ((inspect.Parameter.KEYWORD_ONLY, None), ...)
    assert of_sync == of_trio


def test_closing_has_the_same_parameters() -> None:
    closing = parameters(pi2rt.Engine.close)
    assert closing == {"drain": (inspect.Parameter.KEYWORD_ONLY, 0.0)}
    assert parameters(pi2rt.Runtime.aclose) == parameters(pi2rt.AsyncEngine.aclose) == closing
    assert parameters(pi2rt.AsyncEngine.pull) == parameters(pi2rt.Engine.pull) == parameters(pi2rt.pull)
    packs = (pi2rt.AsyncEngine.ensure_pack, pi2rt.Engine.ensure_pack)
    assert [parameters(pack) for pack in packs] == [parameters(pi2rt.ensure_pack)] * 2


def test_statistics_is_a_plain_method() -> None:
    assert not any(inspect.iscoroutinefunction(api.engine.statistics) for api in APIS)


# Calling

BAD_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 3}, r"^top_p=3: a number above 0 and up to 1 is needed$"),
    ({"params": {"top_p": 0.5}}, r"^params={'top_p': 0.5}: SamplingParams are needed; "),
    ({"logit_bias": {5000: 1.0}}, r"^logit_bias: token id 5000 is outside the vocabulary of 320 tokens$"),
    ({"max_tokens": True}, r"^max_tokens=True: an integer from 1"),
    ({"token_mask": 7}, r"^token_mask=7: a function of the tokens generated so far is needed$"),
    ({"stop": [""]}, r"^stop=\[''\]: at most 64 strings, none of them empty, are allowed$"),
]


@contract
async def test_parameters_are_checked_by_the_call(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor="simulated") as engine:
        for parameters_, message in BAD_PARAMETERS:
            with pytest.raises(pi2rt.RequestError, match=message):
                engine.stream("hi", **parameters_)
            with pytest.raises(pi2rt.RequestError, match=message):
                await engine.generate("hi", **parameters_)
        with pytest.raises(TypeError, match="tempature"):
            engine.stream("hi", tempature=1)
        assert engine.statistics().engine.requests == 0


BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ([], pi2rt.RequestError, r"^prompt: empty"),
    (b"hi", pi2rt.RequestError, r"not bytes$"),
    (None, pi2rt.RequestError, r"not NoneType$"),
    ([1, 5000], pi2rt.RequestError, r"^prompt: token id 5000 is outside the vocabulary"),
    ([1.5], pi2rt.RequestError, r"^prompt: item 0 is a float \(1.5\)"),
    ([1] * 2000, pi2rt.ContextOverflowError, r"^prompt of 2000 tokens"),
]


@contract
async def test_prompts_are_checked_by_entering(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor="simulated") as engine:
        for prompt, kind, message in BAD_PROMPTS:
            stream = engine.stream(prompt)
            with pytest.raises(kind, match=message):
                await stream.__aenter__()
            with pytest.raises(kind, match=message):
                await engine.generate(prompt)
        assert engine.statistics().engine.requests == 0


@contract
async def test_a_full_queue_is_met_by_entering(api: TrioApi, tiny: Path) -> None:
    gate = Gate()
    async with api.open(tiny, executor=gated(gate, 2), max_sequences=1, max_queue=0) as engine:
        async with engine.stream("hi", ignore_eos=True) as chunks:
            await anext(chunks)
            stream = engine.stream("ho")
            with pytest.raises(pi2rt.BusyError, match="max_queue=0 is the limit"):
                await stream.__aenter__()
            with pytest.raises(pi2rt.BusyError, match="max_queue=0 is the limit"):
                await engine.generate("ho")


@contract
async def test_whoever_leaves_makes_a_place_for_the_next_request(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor=simulated(), max_sequences=1, max_queue=0) as engine:
        for _ in range(20):  # tasks run in a random order
            async with engine.stream("hi", ignore_eos=True) as chunks:
                await anext(chunks)
            assert len((await engine.generate("ho", max_tokens=2, ignore_eos=True)).tokens) == 2
        assert engine.statistics().engine.queue.refused == 0


@contract
async def test_parameters_that_leave_no_token_are_met_by_iterating(api: TrioApi, tiny: Path) -> None:
    nothing = dict.fromkeys(range(320), float("-inf"))
    async with api.open(tiny, context=128) as engine:
        async with engine.stream("hi", logit_bias=nothing) as chunks:
            for _ in range(2):
                with pytest.raises(pi2rt.RequestError, match="logit_bias"):
                    await anext(chunks)
        assert len((await engine.generate("hi", max_tokens=3, ignore_eos=True)).tokens) == 3


@contract
async def test_a_text_keeps_to_its_token_masks(api: TrioApi, tiny: Path) -> None:
    """They are made on another thread, of the tokens generated so far."""
    here, seen = threading.current_thread(), []

    def even_or_odd(generated: Sequence[int]) -> TokenMask:
        assert threading.current_thread() is not here
        seen.append(tuple(generated))
        return masking(np.arange(320) % 2 == len(generated) % 2)

    for executor in ("simulated", "cpu"):
        async with api.open(tiny, executor=executor, context=128) as engine:
            seen.clear()
            whole = await engine.generate("hi", max_tokens=8, ignore_eos=True, token_mask=even_or_odd)
            assert [token % 2 for token in whole.tokens] == [0, 1] * 4
            assert seen == [whole.tokens[:count] for count in range(8)]
            async with engine.stream("hi", max_tokens=8, ignore_eos=True, token_mask=even_or_odd) as chunks:
                assert tuple([chunk.token async for chunk in chunks]) == whole.tokens


@contract
async def test_a_token_mask_that_raises_is_met_by_iterating(api: TrioApi, tiny: Path) -> None:
    def raises(generated: Sequence[int]) -> None:
        if len(generated) == 2:
            raise KeyError("of mine")

    async with api.open(tiny, executor="simulated") as engine:
        async with engine.stream("hi", ignore_eos=True, token_mask=raises) as chunks:
            assert [(await anext(chunks)).token >= 0 for _ in range(2)] == [True, True]
            for _ in range(2):
                with pytest.raises(pi2rt.RequestError, match=r"^token_mask raised KeyError after 2") as info:
                    await anext(chunks)
                assert isinstance(info.value.__cause__, KeyError)
        with pytest.raises(pi2rt.RequestError, match=r"^token_mask raised KeyError after 2"):
            await engine.generate("hi", ignore_eos=True, token_mask=raises)
        assert len((await engine.generate("hi", max_tokens=3, ignore_eos=True)).tokens) == 3


@contract
async def test_leaving_does_not_wait_for_a_token_mask(api: TrioApi, tiny: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def blocks(generated: Sequence[int]) -> None:
        entered.set()
        assert leave.wait(60)

    async with api.open(tiny, executor="cpu", context=128, mask_deadline=1000) as engine:
        try:
            async with engine.stream("hi", token_mask=blocks):
                while not entered.is_set():
                    await api.turn()
            assert len((await engine.generate("ho", max_tokens=3, ignore_eos=True)).tokens) == 3
            assert (await settled(api, engine)).cancelled == 1
        finally:
            leave.set()


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), 1e7, None, "10", True])
@contract
async def test_a_mask_deadline_that_cannot_be(api: TrioApi, tiny: Path, seconds: object) -> None:
    with pytest.raises(pi2rt.RequestError, match=r"^mask_deadline=.*: seconds, up to a million, are needed$"):
        async with api.open(tiny, mask_deadline=seconds):
            pass


class WithoutMasks(SimulatedExecutor):
    takes_masks = False


@contract
async def test_an_executor_without_masks_is_met_by_the_call(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor=WithoutMasks) as engine:
        with pytest.raises(pi2rt.RequestError, match=r"^token_mask: the executor of actor .* takes no masks"):
            engine.stream("hi", token_mask=lambda generated: None)
        with pytest.raises(pi2rt.RequestError, match=r"^token_mask: the executor of actor .* takes no masks"):
            await engine.generate("hi", token_mask=lambda generated: None)
        assert engine.statistics().engine.requests == 0


@contract
async def test_inputs_of_all_kinds(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor="simulated") as engine:
        expected = await engine.generate([5, 6], max_tokens=6, ignore_eos=True)
        for prompt in ((5, 6), np.array([5, 6]), iter([np.int64(5), np.uint8(6)])):
            same = await engine.generate(
                prompt, max_tokens=np.int32(6), temperature=np.float32(0), ignore_eos=True
            )
            assert same.tokens == expected.tokens
        third = expected.tokens[2]
        for ids in ([third], (third,), {third}, np.array([third]), iter([third])):
            ended = await engine.generate([5, 6], stop_token_ids=ids, stop=None, ignore_eos=True)
            assert (ended.finish_detail, ended.stop_reason) == ("stop_token", third)


@contract
async def test_methods_give_the_same(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor="simulated") as engine:
        whole = await engine.generate("hi", max_tokens=6, ignore_eos=True)
        async with engine.stream("hi", max_tokens=6, ignore_eos=True) as chunks:
            got = [chunk async for chunk in chunks]
            assert got[-1].timing == chunks.timing
        assert tuple(chunk.token for chunk in got) == whole.tokens
        assert (await engine.score([1, 2, 3])).shape == (2,)
        assert (await engine.logits([1, 2, 3])).shape == (3, 320)
        with pytest.raises(pi2rt.RequestError, match="cannot change while it runs"):
            await engine.resize("1G")
        assert engine.statistics().engine.finished == 4


@contract
async def test_what_ended_a_text(api: TrioApi, tiny: Path) -> None:
    def ended(end: pi2rt.Completion | pi2rt.Chunk) -> tuple[object, ...]:
        return end.finish_reason, end.finish_detail, end.stop_reason

    script = scripted([40, 41, BOS, 42, EOS])
    async with api.open(tiny, executor=simulated(next_token=script)) as engine:
        text = engine.tokenizer.decode([41])
        wanted: list[tuple[dict[str, Any], tuple[object, ...], str]] = [
            ({}, ("stop", "end_token", None), engine.tokenizer.decode([40, 41, 42])),
            ({"max_tokens": 2}, ("length", "length", None), engine.tokenizer.decode([40, 41])),
            ({"stop": text}, ("stop", "stop_string", text), engine.tokenizer.decode([40])),
            ({"stop": ["<|bos|>"]}, ("stop", "stop_string", "<|bos|>"), engine.tokenizer.decode([40, 41])),
            ({"stop_token_ids": [41]}, ("stop", "stop_token", 41), engine.tokenizer.decode([40])),
        ]
        for keywords, end, shown in wanted:
            completion = await engine.generate([1], **keywords)
            assert ended(completion) == end
            assert completion.text == shown
            async with engine.stream([1], **keywords) as chunks:
                got = [chunk async for chunk in chunks]
            assert ended(got[-1]) == end
            assert {ended(chunk) for chunk in got[:-1]} <= {(None, None, None)}


# Progress callbacks


@contract
async def test_an_error_of_a_progress_callback_comes_out(api: TrioApi, tiny: Path) -> None:
    def raises(done: int, total: int) -> None:
        raise LookupError("no bar")

    with pytest.raises(LookupError, match="no bar"):
        async with api.open(tiny, executor="simulated", on_load=raises):
            pass
    async with api.open(tiny, executor="simulated") as engine:
        with pytest.raises(LookupError, match="no bar"):
            await engine.generate("hi", on_prefill=raises)
        async with engine.stream("hi", on_prefill=raises) as chunks:
            for _ in range(2):  # what ended it is raised again
                with pytest.raises(LookupError, match="no bar"):
                    await anext(chunks)
        await settled(api, engine)


@contract
async def test_a_progress_callback_cannot_make_a_text_look_whole(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor="simulated") as engine:
        for kind in StopIteration, StopAsyncIteration, GeneratorExit:

            def raises(done: int, total: int, kind: type[BaseException] = kind) -> None:
                raise kind

            with pytest.raises(pi2rt.RequestError, match=rf"^on_prefill raised {kind.__name__}, "):
                await engine.generate("hi", on_prefill=raises)
            async with engine.stream("hi", on_prefill=raises) as chunks:
                for _ in range(2):
                    with pytest.raises(pi2rt.RequestError, match=rf"^on_prefill raised {kind.__name__}, "):
                        await anext(chunks)


# The end of a stream


@contract
async def test_a_whole_text_ends_again_and_again(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor="simulated") as engine:
        async with engine.stream("hi", max_tokens=2) as chunks:
            assert len([chunk async for chunk in chunks]) == 2
            assert [chunk async for chunk in chunks] == []
        assert [chunk async for chunk in chunks] == []


@contract
async def test_a_stream_that_was_left_says_so_and_tells_its_usage(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor=simulated(seconds_per_step=0.001)) as engine:
        async with engine.stream([1, 2, 3], ignore_eos=True) as chunks:
            assert chunks.timing.prompt_tokens == 3
            for _ in range(4):
                await anext(chunks)
        found = await settled(api, engine)
        assert (found.cancelled, found.finished) == (1, 0)
        timing = chunks.timing
        assert (timing.prompt_tokens, timing.cached_tokens) == (3, 0)
        assert timing.generated_tokens == found.generated_tokens >= 4
        assert timing.ttft_s == timing.queue_s + timing.prefill_s > 0
        assert timing.decode_s > 0
        assert chunks.timing == timing  # the end has come
        with pytest.raises(pi2rt.ClosedError, match=CLOSED_STREAM):
            await anext(chunks)


@contract
async def test_a_cached_prefix_is_in_the_usage_of_a_cancelled_request(api: TrioApi, tiny: Path) -> None:
    prompt = list(range(200))
    async with api.open(tiny, executor=simulated(seconds_per_step=0.001)) as engine:
        await engine.generate(prompt, max_tokens=1)
        async with engine.stream(prompt, ignore_eos=True) as chunks:
            await anext(chunks)
        await settled(api, engine)
        assert chunks.timing.cached_tokens == 192


@contract
async def test_a_failed_request_tells_its_usage_and_its_error_again(api: TrioApi, tiny: Path) -> None:
    faults = Faults(raise_in_wait=frozenset([3]))
    async with api.open(tiny, executor=simulated(faults=faults)) as engine:
        async with engine.stream([1, 2], ignore_eos=True) as chunks:
            for _ in range(2):
                await anext(chunks)
            for _ in range(2):
                with pytest.raises(pi2rt.ExecutorError, match=r"<Step 3:"):
                    await anext(chunks)
        assert (chunks.timing.prompt_tokens, chunks.timing.generated_tokens) == (2, 2)
        assert (await settled(api, engine)).failed == 1
        assert len((await engine.generate("hi", max_tokens=5, ignore_eos=True)).tokens) == 5


@contract
async def test_a_second_consumer_is_refused_and_the_first_goes_on(api: TrioApi, tiny: Path) -> None:
    gate = Gate()
    async with api.open(tiny, executor=gated(gate, 3)) as engine:
        expected = (await engine.generate("hi", max_tokens=2, ignore_eos=True)).tokens
        async with engine.stream("hi", max_tokens=20, ignore_eos=True) as chunks:

            async def consume() -> list[int]:
                try:
                    return [chunk.token async for chunk in chunks]
                except pi2rt.BusyError:
                    gate.open()  # not before: so one of the two is refused while the other waits
                    raise

            results = await api.together(consume, consume)
        first, second = sorted(results, key=lambda result: isinstance(result, Exception))
        assert isinstance(second, pi2rt.BusyError)
        assert str(second).startswith("another consumer is waiting for a chunk of this stream")
        assert len(first) == 20
        assert tuple(first[:2]) == expected


@contract
async def test_a_consumer_whose_chunk_has_come_keeps_it(api: TrioApi, tiny: Path) -> None:
    """Many consumers that all try again: no chunk is lost, given twice, or takes another's place."""
    async with api.open(tiny, executor=simulated(seconds_per_step=0.0005)) as engine:
        expected = (await engine.generate("hi", max_tokens=60, ignore_eos=True)).tokens
        async with engine.stream("hi", max_tokens=60, ignore_eos=True) as chunks:
            got: list[int] = []

            async def consume() -> None:
                while True:
                    try:
                        got.append((await anext(chunks)).token)
                    except pi2rt.BusyError:
                        await api.turn()
                    except StopAsyncIteration:
                        return

            assert await api.together(consume, consume, consume) == [None] * 3
        assert sorted(got) == sorted(expected)


@contract
async def test_closing_from_elsewhere_wakes_the_consumer(api: TrioApi, tiny: Path) -> None:
    gate = Gate()
    async with api.open(tiny, executor=gated(gate, 2)) as engine:
        async with engine.stream("hi", ignore_eos=True) as chunks:
            await anext(chunks)

            async def consume() -> None:
                await anext(chunks)

            async def close() -> None:
                while not gate.reached.is_set():
                    await api.turn()
                await api.close_stream(chunks)

            ended, closed = await api.together(consume, close)
        assert closed is None
        assert (type(ended), str(ended)) == (pi2rt.ClosedError, "this stream was closed")
        gate.open()
        found = await settled(api, engine)
        assert (found.cancelled, found.failed) == (1, 0)


# Closing


@contract
async def test_a_closed_engine_says_so(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor=simulated(seconds_per_step=0.005)) as engine:
        later = engine.stream("hi")
        async with engine.stream("hi", ignore_eos=True) as chunks:
            await anext(chunks)
            await api.close(engine)
            with pytest.raises(pi2rt.ClosedError, match=r"^the engine was closed while this request ran$"):
                async for _ in chunks:
                    pass
        with pytest.raises(pi2rt.ClosedError, match=CLOSED_ENGINE):
            engine.stream("hi")
        with pytest.raises(pi2rt.ClosedError, match=CLOSED_ENGINE):
            await later.__aenter__()
        with pytest.raises(pi2rt.ClosedError, match=CLOSED_ENGINE):
            engine.statistics()
        for call in (
            lambda: engine.generate("hi"),
            lambda: engine.score([1, 2]),
            lambda: engine.logits([1]),
            lambda: engine.resize("1G"),
        ):
            with pytest.raises(pi2rt.ClosedError, match=CLOSED_ENGINE):
                await call()
        await api.close(engine)  # twice is fine
        await api.close(engine, drain=5)


@contract
async def test_an_executor_that_cannot_be_closed_is_reported_once(api: TrioApi, tiny: Path) -> None:
    executor = simulated(faults=Faults(raise_in_close=True))
    with pytest.raises(pi2rt.ExecutorError, match="injected into aclose"):
        async with api.open(tiny, executor=executor) as engine:
            pass
    async with api.open(tiny, executor=executor) as engine:
        with pytest.raises(pi2rt.ExecutorError, match="injected into aclose"):
            await api.close(engine)


@contract
async def test_draining_lets_requests_finish_and_takes_no_more(api: TrioApi, tiny: Path) -> None:
    gate = Gate()
    async with api.open(tiny, executor=gated(gate, 3), max_sequences=1) as engine:

        async def running() -> int:
            async with engine.stream("hi", max_tokens=20, ignore_eos=True) as chunks:
                return len([chunk async for chunk in chunks])

        async def queued() -> int:
            return len((await engine.generate("ho", max_tokens=7, ignore_eos=True)).tokens)

        async def close() -> None:
            while not gate.reached.is_set() or engine.statistics().engine.requests < 2:
                await api.turn()
            await api.close(engine, drain=50)

        async def refused() -> None:
            while True:
                try:
                    engine.stream("late")
                except pi2rt.ClosedError as error:
                    gate.open()
                    with pytest.raises(pi2rt.ClosedError):
                        await engine.generate("late")
                    assert str(error) == "the engine is closing, and takes no more requests"  # noqa: PT017
                    return
                await api.turn()

        assert await api.together(running, queued, close, refused) == [20, 7, None, None]
        with pytest.raises(pi2rt.ClosedError, match=CLOSED_ENGINE):
            engine.stream("hi")


@contract
async def test_draining_ends_when_its_time_is_over(api: TrioApi, tiny: Path) -> None:
    gate = Gate()
    async with api.open(tiny, executor=gated(gate, 2)) as engine:

        async def running() -> None:
            async with engine.stream("hi", ignore_eos=True) as chunks:
                async for _ in chunks:
                    pass

        async def close() -> None:
            while not gate.reached.is_set():
                await api.turn()
            await api.close(engine, drain=0.05)

        ended, closed = await api.together(running, close)
        assert closed is None
        assert (type(ended), str(ended)) == (
            pi2rt.ClosedError,
            "the engine was closed while this request ran",
        )


@contract
async def test_closing_at_once_ends_a_drain(api: TrioApi, tiny: Path) -> None:
    gate = Gate()
    async with api.open(tiny, executor=gated(gate, 2)) as engine:

        async def running() -> None:
            await engine.generate("hi", ignore_eos=True)

        async def drain() -> None:
            while not gate.reached.is_set():
                await api.turn()
            await api.close(engine, drain=10_000)

        async def close() -> None:
            while True:
                try:
                    engine.stream("hi")
                except pi2rt.ClosedError:
                    break
                await api.turn()
            await api.close(engine)

        ended, drained, closed = await api.together(running, drain, close)
        assert isinstance(ended, pi2rt.ClosedError)
        assert (drained, closed) == (None, None)


@contract
async def test_cancelling_a_drain_closes_at_once(api: TrioApi, tiny: Path) -> None:
    if api.name == "sync":
        pytest.skip("Ctrl-C needs the main thread: test_ctrl_c_ends_a_drain")
    gate = Gate()
    async with api.open(tiny, executor=gated(gate, 2)) as engine:
        async with engine.stream("hi", ignore_eos=True) as chunks:
            await anext(chunks)

            async def drain(cancel: Callable[[], None]) -> None:
                async def cancel_it() -> None:
                    while True:
                        try:
                            engine.stream("hi")
                        except pi2rt.ClosedError:
                            return cancel()
                        await api.turn()

                await api.together(lambda: api.close(engine, drain=10_000), cancel_it)

            assert await api.cancelled(drain)
            with pytest.raises(pi2rt.ClosedError, match=r"^the engine was closed while this request ran$"):
                await anext(chunks)


@contract
async def test_a_drain_is_a_number_of_seconds(api: TrioApi, tiny: Path) -> None:
    async with api.open(tiny, executor="simulated") as engine:
        for drain in (-1, "10", True, float("nan")):
            with pytest.raises(pi2rt.RequestError, match=r"^drain="):
                await api.close(engine, drain=drain)
        assert len((await engine.generate("hi", max_tokens=2)).tokens) == 2  # nothing was closed
        await api.close(engine, drain=float("inf"))  # nothing runs: at once


# Models


class Fetched:
    """A source of models: reports until it is told to end. ``progress`` raises where the pull was cancelled."""

    def __init__(self) -> None:
        self.reports = 3

    def load(self) -> Callable[..., Path]:
        return self

    def __call__(self, rest: str, directory: Path, progress: Callable[[int, int], None]) -> Path:
        done = 0
        while done < self.reports:
            done += 1
            progress(done, 3)
        (directory / "m").write_bytes(b"content")
        return directory / "m"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fetched:
    fetched = Fetched()
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(names, "_sources", lambda: {"test": fetched})
    return fetched


def left(folder: Path) -> list[str]:
    """Files below a folder but for locks, which stay."""
    return sorted(
        path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    )


@contract
async def test_pull(api: TrioApi, source: Fetched) -> None:
    calls: list[tuple[str, int, int]] = []
    path = await api.pull("test:a/m", lambda *call: calls.append(call))
    assert path.read_bytes() == b"content"
    assert calls == [("downloading", 1, 3), ("downloading", 2, 3), ("downloading", 3, 3)]
    assert await api.pull("test:a/m") == path
    with pytest.raises(pi2rt.ModelNotFoundError):
        await api.pull("no-such-model")


@contract
async def test_a_cancelled_pull_leaves_nothing(api: TrioApi, source: Fetched, tmp_path: Path) -> None:
    source.reports = 1 << 60

    async def pull(cancel: Callable[[], None]) -> None:
        await api.pull("test:a/m", lambda stage, done, total: cancel())

    assert await api.cancelled(pull)
    assert left(tmp_path) == []
    source.reports = 3
    assert (await api.pull("test:a/m")).is_file()


@contract
async def test_an_error_of_a_pulls_callback_comes_out_and_leaves_nothing(
    api: TrioApi, source: Fetched, tmp_path: Path
) -> None:
    def raises(stage: str, done: int, total: int) -> None:
        raise LookupError("no bar")

    source.reports = 1 << 60  # it does not end before it learns of the error
    with pytest.raises(LookupError, match="no bar"):
        await api.pull("test:a/m", raises)
    assert left(tmp_path) == []


@contract
async def test_ensure_pack(api: TrioApi, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path))

    async def make(cancel: Callable[[], None]) -> None:
        await api.ensure_pack(tiny, lambda stage, done, total: cancel())

    def goes_on(*given: Any, progress: Callable[[int, int], None]) -> None:
        while True:  # it does not end before it learns of the cancellation
            progress(0, 1)

    with monkeypatch.context() as patch:
        patch.setattr(pack_cache, "convert", goes_on)
        assert await api.cancelled(make)
    assert left(tmp_path) == []
    calls: list[tuple[str, int, int]] = []
    pack = await api.ensure_pack(tiny, lambda *call: calls.append(call))
    assert {stage for stage, *_ in calls} == {"converting"}
    with open_model_file(pack) as file:
        assert file.path == pack
    assert await api.ensure_pack(tiny) == await api.ensure_pack(pack) == pack
