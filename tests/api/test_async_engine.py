"""The asyncio API. The runtime's own thread keeps real time, so the simulated device is quick."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import pi2rt
from pi2rt.api import jobs
from pi2rt.engine import EngineStatistics
from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor, scripted
from tests.api.adapters import Gate, GatedExecutor
from tests.support.tiny_models import EOS

# Not 'async def': pytest-trio would run those under Trio.


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(main(), 60)

    asyncio.run(limited())


def simulated(**options: Any) -> Callable[[], SimulatedExecutor]:
    return lambda: SimulatedExecutor(**options)


async def settled(engine: pi2rt.AsyncEngine) -> EngineStatistics:
    """Statistics as soon as nothing runs any more."""
    while True:
        found = engine.statistics().engine
        if not (found.waiting or found.prefilling or found.decoding or found.leaving):
            assert found.pages.held == found.prefixes.unused
            return found


def test_stream_generate_score(tiny: Path) -> None:
    async def main() -> None:
        calls: list[tuple[str, int, int, threading.Thread]] = []

        def noting(what: str) -> Callable[[int, int], None]:
            return lambda done, total: calls.append((what, done, total, threading.current_thread()))

        async with pi2rt.AsyncEngine.open(
            tiny, executor=simulated(next_token=scripted([40, 41, EOS])), on_load=noting("load")
        ) as engine:
            assert engine.model.name == "tiny llama"
            got = [chunk async for chunk in engine.stream("hi", on_prefill=noting("prefill"))]
            assert [chunk.token for chunk in got] == [40, 41, EOS]
            assert got[-1].finish_reason == "stop"
            assert got[-1].timing is not None
            async with engine.stream([1, 2], pi2rt.SamplingParams(max_tokens=9), max_tokens=1) as chunks:
                assert [chunk.token async for chunk in chunks] == [40]
            completion = await engine.generate("hi", max_tokens=2)
            assert completion.tokens == (40, 41)
            assert completion.text == engine.tokenizer.decode([40, 41])
            again = await engine.generate("hi", max_tokens=2, on_prefill=noting("again"))
            assert again.tokens == completion.tokens
            assert (await engine.score([1, 2, 3])).shape == (2,)
            assert (await engine.logits([1, 2, 3])).shape == (3, 320)
            await settled(engine)
        assert {what for what, *_ in calls} == {"load", "prefill", "again"}
        assert {thread for *_, thread in calls} == {threading.current_thread()}

    run(main)


def test_many_at_once(tiny: Path) -> None:
    async def main() -> None:
        async with pi2rt.AsyncEngine(tiny, executor="simulated", max_sequences=4) as engine:
            alone = [await engine.generate([i], max_tokens=30, ignore_eos=True) for i in range(12)]

            async def tokens(i: int) -> tuple[int, ...]:
                stream = engine.stream([i], max_tokens=30, ignore_eos=True)
                return tuple([chunk.token async for chunk in stream])

            together = await asyncio.gather(*map(tokens, range(12)))
            assert together == [completion.tokens for completion in alone]

    run(main)


def test_breaking_out_ends_the_request(tiny: Path) -> None:
    async def main() -> None:
        async with pi2rt.AsyncEngine(tiny, executor=simulated(seconds_per_step=0.001)) as engine:
            async for _ in engine.stream("hi", ignore_eos=True):
                break
            assert (await settled(engine)).cancelled == 1
            async with engine.stream("hi", ignore_eos=True) as chunks:
                await anext(chunks)
            assert (await settled(engine)).cancelled == 2
            with pytest.raises(pi2rt.ClosedError, match=r"^this stream was closed$"):
                await anext(chunks)
            stream = engine.stream("hi", ignore_eos=True)
            await anext(stream)
            await stream.aclose()
            assert (await settled(engine)).cancelled == 3
            del stream
            gc.collect()

    run(main)


def test_cancelling_the_task_ends_the_request(tiny: Path) -> None:
    async def main() -> None:
        async with pi2rt.AsyncEngine(
            tiny, executor=simulated(faults=Faults(hang=frozenset([3, 6])))
        ) as engine:

            async def stream() -> None:
                async for _ in engine.stream("hi", ignore_eos=True):
                    pass

            async def generate() -> None:
                await engine.generate("hi", ignore_eos=True)

            for number, hanging in enumerate((stream, generate), 1):
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(hanging(), 0.1)
                assert (await settled(engine)).cancelled == number
            assert len((await engine.generate("hi", max_tokens=5, ignore_eos=True)).tokens) == 5

    run(main)


def test_a_timed_out_next_loses_nothing(tiny: Path) -> None:
    """Before the request has entered, and between chunks; with a block and without."""
    gate = Gate()

    async def main() -> None:
        async with pi2rt.AsyncEngine(tiny, executor=lambda: GatedExecutor(gate, 8)) as engine:
            expected = (await engine.generate("hi", max_tokens=4, ignore_eos=True)).tokens
            stream = engine.stream("hi", max_tokens=12, ignore_eos=True)
            got = [(await anext(stream)).token for _ in range(2)]
            timeouts = 0
            while timeouts < 3:
                try:
                    got.append((await asyncio.wait_for(anext(stream), 0.05)).token)
                except TimeoutError:
                    timeouts += 1
            early = engine.stream("hi", max_tokens=4, ignore_eos=True)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(early), 0.001)
            gate.open()
            got += [chunk.token async for chunk in stream]
            assert len(got) == 12
            assert tuple(got[:4]) == expected
            assert tuple([chunk.token async for chunk in early]) == expected

    run(main)


def test_a_cancelled_next_that_nobody_goes_on_with_ends_the_request(tiny: Path) -> None:
    """Also while somebody keeps the exception."""

    async def main() -> None:
        faults = Faults(hang=frozenset([3]))
        async with pi2rt.AsyncEngine(tiny, executor=simulated(faults=faults)) as engine:

            async def consume() -> None:
                async for _ in engine.stream("hi", ignore_eos=True):
                    pass

            task = asyncio.create_task(consume())
            while engine.statistics().engine.generated_tokens < 2:  # noqa: ASYNC110 - the other thread's
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as kept:
                await task
            assert (await settled(engine)).cancelled == 1
            assert kept.value is not None

    run(main)


def test_errors_reach_the_caller(tiny: Path) -> None:
    async def main() -> None:
        faults = Faults(raise_in_wait=frozenset([2]))
        async with pi2rt.AsyncEngine(tiny, executor=simulated(faults=faults)) as engine:
            with pytest.raises(pi2rt.ExecutorError, match=r"<Step 2:"):
                async for _ in engine.stream("hi", ignore_eos=True):
                    pass
            with pytest.raises(pi2rt.ContextOverflowError):
                await engine.generate("hi", max_tokens=5000)
            with pytest.raises(pi2rt.ContextOverflowError):
                await anext(engine.stream("hi", max_tokens=5000))
            with pytest.raises(pi2rt.RequestError, match=r"^top_p=3"):
                engine.stream("hi", top_p=3.0)

            def raises(done: int, total: int) -> None:
                raise LookupError("no bar")

            with pytest.raises(LookupError, match="no bar"):
                await engine.generate("hi", on_prefill=raises)
            await settled(engine)

    run(main)


def test_a_slow_consumer_pauses_its_request(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "STREAM_BUFFER", 8)

    async def main() -> None:
        async with pi2rt.AsyncEngine(tiny, executor="simulated") as engine:
            expected = await engine.generate("hi", max_tokens=300, ignore_eos=True)
            stream = engine.stream("hi", max_tokens=300, ignore_eos=True)
            got = [(await anext(stream)).token]
            pump = stream._pump
            assert pump is not None
            while not pump._waiting:  # noqa: ASYNC110 - the other thread's flag
                await asyncio.sleep(0)
            assert pump._sent <= 1 + 8
            got += [chunk.token async for chunk in stream]
            assert tuple(got) == expected.tokens

    run(main)


def test_a_load_that_fails(tiny: Path, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(pi2rt.ModelNotFoundError):
            async with pi2rt.AsyncEngine(tmp_path / "no.gguf"):
                pass
        with pytest.raises(RuntimeError, match="injected into open"):
            await pi2rt.AsyncEngine(tiny, executor=simulated(faults=Faults(raise_in_open=True))).start()
        with pytest.raises(pi2rt.RequestError, match=r"^context=0"):
            pi2rt.AsyncEngine(tiny, context=0)

    run(main)


def test_a_load_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> list[weakref.ref[pi2rt.AsyncEngine]]:
        made = []
        for _ in range(3):
            engine = pi2rt.AsyncEngine(tmp_path / "no.gguf")
            made.append(weakref.ref(engine))
            with pytest.raises(pi2rt.ModelNotFoundError):
                await engine.start()
            del engine
        return made

    left = asyncio.run(main())
    gc.collect()
    assert [reference() for reference in left] == [None] * 3


def test_a_request_whose_task_was_cancelled_makes_a_place_for_the_next(tiny: Path) -> None:
    async def main() -> None:
        options: Any = {"executor": simulated(), "max_sequences": 1, "max_queue": 0}
        async with pi2rt.AsyncEngine(tiny, **options) as engine:
            for turns in range(40):  # before it starts, while it waits, when a token has come
                request = asyncio.create_task(engine.generate("hi", ignore_eos=True))
                for _ in range(turns):
                    await asyncio.sleep(0)
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
                assert len((await engine.generate("ho", max_tokens=2, ignore_eos=True)).tokens) == 2
            assert engine.statistics().engine.queue.refused == 0

    run(main)


def test_cancelling_the_load(tiny: Path) -> None:
    async def main() -> None:
        engine = pi2rt.AsyncEngine(tiny, executor=simulated(seconds_to_open=1000))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.start(), 0.2)
        assert not any(thread.name == "pi2rt" for thread in threading.enumerate())

    run(main)


def test_life(tiny: Path) -> None:
    async def main() -> None:
        engine = pi2rt.AsyncEngine(tiny, executor=simulated(seconds_per_step=0.01))
        with pytest.raises(pi2rt.ClosedError, match="was not started"):
            engine.stream("hi")
        await engine.aclose()
        await engine.start()
        with pytest.raises(pi2rt.BusyError, match="started already"):
            await engine.start()
        stream = engine.stream("hi", ignore_eos=True)
        await anext(stream)
        await engine.aclose()
        with pytest.raises(pi2rt.ClosedError):
            async for _ in stream:
                pass
        for use in (engine.generate("hi"), engine.score([1, 2])):
            with pytest.raises(pi2rt.ClosedError):
                await use
        with pytest.raises(pi2rt.ClosedError):
            engine.stream("hi")
        await engine.aclose()
        assert not any(thread.name == "pi2rt" for thread in threading.enumerate())

    run(main)


def test_an_engine_that_nobody_closes(tiny: Path) -> None:
    async def main() -> None:
        engine = await pi2rt.AsyncEngine(tiny, executor="simulated").start()
        stream = engine.stream("hi", ignore_eos=True)
        del engine
        gc.collect()
        await anext(stream)  # a stream keeps its engine
        del stream
        gc.collect()
        assert not any(thread.name == "pi2rt" for thread in threading.enumerate())

    run(main)
