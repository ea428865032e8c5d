"""The synchronous API. The runtime's own thread keeps real time, so the simulated device is quick."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import pi2rt
from pi2rt.api import jobs
from pi2rt.engine import EngineStatistics
from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor, scripted
from tests.support.tiny_models import EOS


def simulated(**options: Any) -> Callable[[], SimulatedExecutor]:
    return lambda: SimulatedExecutor(**options)


def settled(engine: pi2rt.Engine) -> EngineStatistics:
    """Statistics as soon as nothing runs any more."""
    while True:
        found = engine.statistics().engine
        if not (found.waiting or found.prefilling or found.decoding or found.leaving):
            assert found.pages.held == found.prefixes.unused
            return found


def alive() -> bool:
    return any(thread.name == "pi2rt" for thread in threading.enumerate())


def test_stream_generate_score(tiny: Path) -> None:
    calls: list[tuple[str, threading.Thread]] = []

    def noting(what: str) -> Callable[[int, int], None]:
        return lambda done, total: calls.append((what, threading.current_thread()))

    with pi2rt.Engine(
        tiny, executor=simulated(next_token=scripted([40, 41, EOS])), on_load=noting("load")
    ) as engine:
        assert engine.model.name == "tiny llama"
        got = list(engine.stream("hi", on_prefill=noting("prefill")))
        assert [chunk.token for chunk in got] == [40, 41, EOS]
        assert got[-1].timing is not None
        with engine.stream([1, 2], pi2rt.SamplingParams(max_tokens=9), max_tokens=1) as chunks:
            assert [chunk.token for chunk in chunks] == [40]
        completion = engine.generate("hi", max_tokens=2)
        assert completion.text == engine.tokenizer.decode([40, 41])
        assert engine.generate("hi", max_tokens=2, on_prefill=noting("again")).tokens == completion.tokens
        assert engine.score([1, 2, 3]).shape == (2,)
        assert engine.logits([1, 2, 3]).shape == (3, 320)
        settled(engine)
    assert {what for what, _ in calls} == {"load", "prefill", "again"}
    assert {thread for _, thread in calls} == {threading.current_thread()}
    assert not alive()


def test_from_several_threads(tiny: Path) -> None:
    with pi2rt.Engine(tiny, executor="simulated", max_sequences=4) as engine:

        def tokens(i: int) -> tuple[int, ...]:
            return tuple(chunk.token for chunk in engine.stream([i], max_tokens=30, ignore_eos=True))

        alone = [tokens(i) for i in range(12)]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(tokens, range(12))) == alone


def test_leaving_the_loop_ends_the_request(tiny: Path) -> None:
    with pi2rt.Engine(tiny, executor=simulated(seconds_per_step=0.001)) as engine:
        for _ in engine.stream("hi", ignore_eos=True):
            break
        assert settled(engine).cancelled == 1
        stream = engine.stream("hi", ignore_eos=True)
        next(stream)
        stream.close()
        with pytest.raises(pi2rt.ClosedError, match=r"^this stream was closed$"):
            next(stream)
        assert settled(engine).cancelled == 2


def test_errors_reach_the_caller(tiny: Path) -> None:
    faults = Faults(raise_in_wait=frozenset([2]))
    with pi2rt.Engine(tiny, executor=simulated(faults=faults)) as engine:
        with pytest.raises(pi2rt.ExecutorError, match=r"<Step 2:"):
            list(engine.stream("hi", ignore_eos=True))
        with pytest.raises(pi2rt.ContextOverflowError):
            engine.generate("hi", max_tokens=5000)
        with pytest.raises(pi2rt.RequestError, match=r"^top_p=3"):
            engine.stream("hi", top_p=3.0)

        def raises(done: int, total: int) -> None:
            raise LookupError("no bar")

        with pytest.raises(LookupError, match="no bar"):
            engine.generate("hi", on_prefill=raises)
        settled(engine)


def test_a_timeout_ends_the_request(tiny: Path) -> None:
    faults = Faults(hang=frozenset([4]))
    with pi2rt.Engine(tiny, executor=simulated(faults=faults)) as engine:
        got: list[int] = []
        with engine.stream([1, 2], ignore_eos=True, timeout=3) as chunks:
            for _ in range(2):  # what ended it is raised again
                with pytest.raises(
                    TimeoutError, match=r"^timeout=3: the request took longer, .* after 3 tokens$"
                ):
                    got.extend(chunk.token for chunk in chunks)
            assert len(got) == 3
        timing = chunks.timing
        assert (timing.prompt_tokens, timing.generated_tokens) == (2, 3)
        assert timing.decode_s > 0.05
        assert settled(engine).cancelled == 1
        assert len(engine.generate("hi", max_tokens=5, ignore_eos=True, timeout=60).tokens) == 5
        assert len(list(engine.stream("hi", max_tokens=5, ignore_eos=True, timeout=60))) == 5


def test_calls_have_timeouts(tiny: Path) -> None:
    always = Faults(hang=frozenset(range(1, 100)))
    with pi2rt.Engine(tiny, executor=simulated(faults=always)) as engine:
        for number, call in enumerate(
            (
                lambda: engine.generate("hi", timeout=0.02),
                lambda: engine.generate("hi", timeout=0.02, on_prefill=lambda done, total: None),
                lambda: engine.score([1, 2, 3], timeout=0.02),
                lambda: engine.logits([1, 2, 3], timeout=np.float32(0.02)),
            ),
            1,
        ):
            with pytest.raises(TimeoutError, match=r"^timeout=0.02: the "):
                call()
            assert settled(engine).cancelled == number
        for timeout in (0, -1, "1", True, float("nan")):
            for refused in (
                lambda: engine.stream("hi", timeout=timeout),  # noqa: B023
                lambda: engine.generate("hi", timeout=timeout),  # noqa: B023
                lambda: engine.resize("1G", timeout=timeout),  # noqa: B023
            ):
                with pytest.raises(
                    pi2rt.RequestError, match=r"^timeout=.* a number above 0 and up to inf is needed$"
                ):
                    refused()


def test_a_slow_consumer_pauses_its_request(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "STREAM_BUFFER", 8)
    with pi2rt.Engine(tiny, executor="simulated") as engine:
        expected = engine.generate("hi", max_tokens=300, ignore_eos=True)
        stream = engine.stream("hi", max_tokens=300, ignore_eos=True)
        got = [next(stream).token]
        pump = stream._pump
        assert pump is not None
        while not pump._waiting:
            pass
        assert pump._sent <= 1 + 8
        got += [chunk.token for chunk in stream]
        assert tuple(got) == expected.tokens


def test_a_load_that_fails(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(pi2rt.ModelNotFoundError):
        pi2rt.Engine(tmp_path / "no.gguf")
    with pytest.raises(RuntimeError, match="injected into open"):
        pi2rt.Engine(tiny, executor=simulated(faults=Faults(raise_in_open=True)))
    with pytest.raises(pi2rt.RequestError, match=r"^context=0"):
        pi2rt.Engine(tiny, context=0)

    def raises(done: int, total: int) -> None:
        raise LookupError("no bar")

    with pytest.raises(LookupError, match="no bar"):
        pi2rt.Engine(tiny, executor="simulated", on_load=raises)
    assert not alive()


def test_life(tiny: Path) -> None:
    engine = pi2rt.Engine(tiny, executor=simulated(seconds_per_step=0.01))
    stream = engine.stream("hi", ignore_eos=True)
    next(stream)
    engine.close()
    with pytest.raises(pi2rt.ClosedError):
        list(stream)
    with pytest.raises(pi2rt.ClosedError):
        engine.generate("hi")
    with pytest.raises(pi2rt.ClosedError):
        list(engine.stream("hi"))
    engine.close()
    assert not alive()


class StartsAnother(jobs.Job):
    """At its end another thread, which has found the engine open, starts a job."""

    def __init__(self, engine: pi2rt.Engine, then: Callable[[], None]) -> None:
        super().__init__(engine._thread.trio)
        self._then = then
        self.refused: BaseException | None = None

    async def run(self, runtime: pi2rt.Runtime) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self._then()

    def refuse(self, error: BaseException) -> None:
        self.refused = error


def test_a_request_that_comes_when_the_last_one_has_ended(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(12):  # tasks run in a random order
        engine = pi2rt.Engine(tiny, executor=simulated())
        thread, late = engine._thread, StartsAnother(engine, lambda: None)
        thread.start(StartsAnother(engine, lambda thread=thread, late=late: thread.start(late)))  # type: ignore[misc]
        with monkeypatch.context() as patched:
            patched.setattr(thread, "check_open", lambda: None)
            engine.close()
        assert str(late.refused) == "the engine is closed"


def test_an_engine_that_nobody_closes(tiny: Path) -> None:
    stream = pi2rt.Engine(tiny, executor="simulated").stream("hi", ignore_eos=True)
    gc.collect()
    next(stream)  # a stream keeps its engine
    del stream
    gc.collect()
    assert not alive()


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Ctrl-C for the main thread."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c(tiny: Path) -> None:
    faults = Faults(hang=frozenset([3, 6]))
    with pi2rt.Engine(tiny, executor=simulated(faults=faults)) as engine:
        stream = engine.stream("hi", ignore_eos=True)
        with pytest.raises(KeyboardInterrupt), interrupt_after(0.1):
            for _ in stream:
                pass
        with pytest.raises(pi2rt.ClosedError, match=r"^this stream was interrupted$"):
            next(stream)
        assert settled(engine).cancelled == 1
        with pytest.raises(KeyboardInterrupt), interrupt_after(0.1):
            engine.generate("hi", ignore_eos=True)
        assert settled(engine).cancelled == 2
        assert len(engine.generate("hi", max_tokens=5, ignore_eos=True).tokens) == 5


def test_ctrl_c_ends_a_drain(tiny: Path) -> None:
    engine = pi2rt.Engine(tiny, executor=simulated(faults=Faults(hang=frozenset([2]))))
    stream = engine.stream("hi", ignore_eos=True)
    next(stream)
    with pytest.raises(KeyboardInterrupt), interrupt_after(0.1):
        engine.close(drain=10_000)
    engine.close()
    with pytest.raises(pi2rt.ClosedError, match=r"^the engine was closed while this request ran$"):
        next(stream)
    assert not alive()


def test_ctrl_c_while_it_loads(tiny: Path) -> None:
    with pytest.raises(KeyboardInterrupt), interrupt_after(0.3):
        pi2rt.Engine(tiny, executor=simulated(seconds_to_open=1000))
    assert not alive()


def test_an_interpreter_that_exits_with_an_open_engine(tiny: Path) -> None:
    code = (
        "import sys, pi2rt\n"
        "engine = pi2rt.Engine(sys.argv[1], executor='simulated')\n"
        "stream = engine.stream('hi', ignore_eos=True)\n"
        "print(len(next(stream).text) >= 0)\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tiny)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "True\n", "")


def test_a_thread_that_waits_for_a_chunk_does_not_keep_the_process(tiny: Path) -> None:
    """Of two threads in one stream, none waits for ever."""
    code = (
        "import sys, threading, pi2rt\n"
        "engine = pi2rt.Engine(sys.argv[1], executor='simulated')\n"
        "stream = engine.stream('hi', ignore_eos=True, max_tokens=500)\n"
        "def use():\n"
        "    try: print(len(list(stream)) == 500)\n"
        "    except pi2rt.BusyError: print('busy')\n"
        "threads = [threading.Thread(target=use) for _ in range(2)]\n"
        "[thread.start() for thread in threads]\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tiny)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(run.stdout.split()) in (["True", "busy"], ["False", "True"], ["False", "busy"])


def test_statistics_from_many_threads(tiny: Path) -> None:
    with pi2rt.Engine(tiny, executor="simulated") as engine:

        def use(i: int) -> None:
            engine.generate([i], max_tokens=20, ignore_eos=True)
            for _ in range(20):
                s = engine.statistics().engine
                assert (
                    s.requests == s.finished + s.cancelled + s.failed + s.waiting + s.prefilling + s.decoding
                )

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(32)))
        assert engine.statistics().engine.finished == 32
