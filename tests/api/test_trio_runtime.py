from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock

import pi2rt
from pi2rt.engine.prompt_encoder import LONG_TEXT
from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor, scripted
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.memory import StateStore
from pi2rt.models import ModelDescription
from pi2rt.opening import executor_plan
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.step import Step
from pi2rt.tokenizer import Tokenizer
from tests.support.tiny_models import BOS, EOS, TinyModel, write_gguf


def simulated(**options: object) -> dict[str, object]:
    return {"executor": lambda: SimulatedExecutor(**options)}


async def test_text_ids_and_messages(tiny: Path) -> None:
    async with pi2rt.open_runtime(tiny, executor="simulated") as runtime:
        encode = runtime.tokenizer.encode
        same = [
            (await runtime.generate("so it is", max_tokens=5), [BOS, *encode("so it is", add_special=False)]),
            (
                await runtime.generate([{"role": "user", "content": "hi"}], max_tokens=5),
                encode("user:hi|assistant:", add_special=False),
            ),
            (await runtime.generate(np.array([5, 6, 7]), max_tokens=5), [5, 6, 7]),
            (await runtime.generate((id_ for id_ in (5, 6)), max_tokens=5), [5, 6]),
        ]
        for completion, ids in same:
            assert completion.timing.prompt_tokens == len(ids)
            again = await runtime.generate(ids, max_tokens=5)
            assert (completion.tokens, completion.text) == (again.tokens, again.text)


async def test_a_long_text_is_tokenised_beside_the_loop(tiny: Path) -> None:
    async with pi2rt.open_runtime(tiny, executor="simulated") as runtime:
        with pytest.raises(pi2rt.ContextOverflowError):
            await runtime.generate("so it goes " * 10_000)


@pytest.mark.parametrize("kind", [1, 3, 4], ids=["normal", "control", "user-defined"])
async def test_a_turn_ends_at_a_token_of_any_type(tmp_path: Path, kind: int) -> None:
    """By its spelling, as in llama.cpp; and it is not shown."""
    path = write_gguf(tmp_path / "plain.gguf", TinyModel())
    with open_model_file(path) as file:
        tokens = list(file.metadata["tokenizer.ggml.tokens"])
    end = tokens.index("<unused0>")
    tokens[end] = "<|im_end|>"
    kinds = [kind if id_ == end else 3 if id_ in (BOS, EOS) else 1 for id_ in range(len(tokens))]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    path = write_gguf(tmp_path / "model.gguf", TinyModel(), metadata=metadata)
    async with pi2rt.open_runtime(path) as runtime:
        completion = await runtime.generate("hi", max_tokens=9, logit_bias={end: 100.0})
        assert (completion.text, completion.tokens, completion.finish_reason) == ("", (end,), "stop")
        prompt = runtime.tokenizer.encode("hi<|im_end|>", parse_special=True)
        assert prompt[-1] == end


async def test_prompts_that_cannot_be(tiny: Path, plain: Path) -> None:
    async with pi2rt.open_runtime(plain, executor="simulated") as runtime:
        with pytest.raises(pi2rt.RequestError, match=r"^prompt: the model 'tiny llama' has no chat template"):
            await runtime.generate([{"role": "user", "content": "hi"}])
        with pytest.raises(pi2rt.RequestError, match=r"not NoneType$"):
            await runtime.generate(None)  # type: ignore[arg-type]
        with pytest.raises(pi2rt.RequestError, match=r"not bytes$"):
            await runtime.generate(b"hi")
        with pytest.raises(pi2rt.RequestError, match="empty"):
            await runtime.generate([])
        with pytest.raises(TypeError, match="tempature"):
            await runtime.generate("hi", tempature=1.0)  # type: ignore[call-arg]


async def test_streams_and_overrides(tiny: Path) -> None:
    script = scripted([30, 31, 32, EOS])
    async with pi2rt.open_runtime(tiny, **simulated(next_token=script)) as runtime:  # type: ignore[arg-type]
        params = pi2rt.SamplingParams(max_tokens=2, logprobs=1)
        async with runtime.stream("hi", params) as chunks:
            assert [chunk.token async for chunk in chunks] == [30, 31]
        async with runtime.stream("hi", params, max_tokens=10) as chunks:
            got = [chunk async for chunk in chunks]
        assert [chunk.token for chunk in got] == [30, 31, 32, EOS]
        assert got[-1].finish_reason == "stop"
        assert got[0].top_logprobs[0][0] == 30
        calls: list[tuple[int, int]] = []
        await runtime.generate([1, 2], max_tokens=1, on_prefill=lambda *call: calls.append(call))
        assert calls == [(2, 2)]


async def test_what_it_says_about_the_model(tiny: Path) -> None:
    async with pi2rt.open_runtime(tiny, executor="simulated", context=300) as runtime:
        model = runtime.model
        assert (model.name, model.architecture, model.path) == ("tiny llama", "llama", tiny)
        assert (model.context, model.model_context, model.layers) == (300, 1024, 3)
        assert model.quantisation == "F32"
        assert model.file_bytes == 4 * model.parameters
    async with pi2rt.open_runtime(tiny, executor="simulated") as runtime:
        assert runtime.model.context == 1024  # of 4096


async def test_scores_and_statistics(tiny: Path) -> None:
    async with pi2rt.open_runtime(tiny, executor="simulated", max_sequences=3) as runtime:
        completion = await runtime.generate([1, 2, 3], max_tokens=6, ignore_eos=True)
        scores = await runtime.score([1, 2, 3, *completion.tokens])
        assert (scores[2:] > -1).all()
        assert (await runtime.logits([1, 2, 3]))[-1].argmax() == completion.tokens[0]
        statistics = runtime.statistics()
        assert statistics.engine.finished == 3
        assert statistics.engine.free_slots == 3
        assert [actor.state for actor in statistics.actors] == ["ready"]
        assert [channel.buffered for channel in statistics.channels] == [0]
        assert statistics.memory["peak_rss"] > statistics.memory["kv"] > 0


async def test_the_executor_is_told_what_was_asked(tiny: Path) -> None:
    told: list[tuple[ModelDescription, ExecutorOptions]] = []
    progress_seen: list[tuple[int, int]] = []

    class Asked(SimulatedExecutor):
        async def open(
            self,
            file: ModelFile,
            model: ModelDescription,
            options: ExecutorOptions,
            store: StateStore | None,
            progress: Progress,
        ) -> None:
            told.append((model, options))
            await super().open(file, model, options, store, progress)

    async with pi2rt.open_runtime(
        tiny,
        executor=Asked,
        context=200,
        max_sequences=600,
        threads=1,
        kv_type="q8",
        exact_floats=True,
        kernels="scalar",
        prefill_chunk=64,
        on_load=lambda done, total: progress_seen.append((done, total)),
    ):
        ((model, options),) = told
        assert model.architecture == "llama"
        assert (options.slots, options.context, options.max_tokens) == (600, 200, 600)
        assert 4 <= options.pages <= 2400
        assert (options.kv_type, options.exact_floats, options.kernels) == ("q8", True, "scalar")
        assert len(options.cores) == 1
        assert options.trace is None
    assert progress_seen[0][0] == 0
    assert progress_seen[-1][0] == progress_seen[-1][1]


async def test_each_class_of_cores_is_an_actor(tiny: Path) -> None:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        pytest.skip("one core only: it cannot be of two classes")
    cores = {"big": [usable[0]], "little": [usable[1]]}
    async with pi2rt.open_runtime(tiny, cores=cores) as runtime:
        await runtime.generate(list(range(3, 203)), max_tokens=9, ignore_eos=True)
        statistics = runtime.statistics()
    assert [actor.name for actor in statistics.actors] == ["big", "little"]
    big, little = statistics.actors
    assert little.completed == big.completed == statistics.engine.steps
    assert little.executor.steps == big.executor.steps > 0
    assert [thread.core for thread in little.executor.threads] == [usable[1]]
    # Nobody waits for it: it may have had nothing to do.
    assert 0 <= little.executor.kernel_ns <= little.executor.busy_ns
    assert 0 <= little.busy <= big.busy
    assert not little.executor.bytes  # the memory is the leader's


async def test_requests_beyond_the_queue_are_refused_before_they_are_tokenised(
    tiny: Path, autojump_clock: MockClock
) -> None:
    made = lambda: SimulatedExecutor(seconds_per_step=0.01)  # noqa: E731
    async with pi2rt.open_runtime(tiny, executor=made, max_sequences=1, max_queue=1) as runtime:
        queue = runtime.statistics().engine.queue
        assert (queue.capacity, queue.waiting, queue.refused) == (1, 0, 0)
        async with trio.open_nursery() as nursery:
            for prompt in "first", "second":
                nursery.start_soon(partial(runtime.generate, prompt, max_tokens=20, ignore_eos=True))
                await trio.testing.wait_all_tasks_blocked()
            for prompt in "third", [1, 2], [{"role": "user", "content": "hi"}], 17:
                with pytest.raises(
                    pi2rt.BusyError, match=r"^the queue is full: 1 requests wait .* larger max_que"
                ):
                    await runtime.generate(prompt)  # type: ignore[arg-type]
            with pytest.raises(pi2rt.BusyError):
                await runtime.score([1, 2])
            with pytest.raises(pi2rt.BusyError):
                await runtime.logits([1, 2])
            assert runtime.statistics().engine.queue.refused == 6
        for _ in range(3):
            with pytest.raises(pi2rt.RequestError):
                await runtime.generate([])
            with pytest.raises(pi2rt.RequestError):
                await runtime.generate(17)  # type: ignore[arg-type]
        assert runtime.statistics().engine.queue.waiting == 0
        async with runtime.stream("fourth", max_tokens=2, ignore_eos=True) as chunks:
            last = [chunk async for chunk in chunks][-1]
        assert last.timing is not None
        assert last.timing.queue_s < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, r"^context=0: an integer from 1"),
        ({"max_sequences": True}, r"^max_sequences=True"),
        ({"prefill_chunk": 1.5}, r"^prefill_chunk=1.5"),
        ({"max_queue": -1}, r"^max_queue=-1: an integer from 0"),
        ({"max_queue": None}, r"^max_queue=None: an integer"),
        ({"activations": "int4"}, r"^activations='int4': one of 'int16', 'mixed', 'int8' is needed$"),
        ({"memory": "much"}, r"^'much' is not a size"),
        ({"memory": 0}, r"^memory=0: at least one byte"),
        ({"memory": 1.5}, r"^memory=1.5: a number of bytes or a text"),
        ({"io": "tape"}, r"^io='tape': one of"),
        ({"kv_type": "f8"}, r"^kv_type='f8': one of 'f16', 'q8' is needed$"),
        ({"threads": 0}, r"^threads=0"),
        ({"executor": "abacus"}, r"^no executor 'abacus'"),
        ({"cores": {"big": [99999]}}, r"cannot use core 99999"),
        (
            {"trace": "/no/such/folder/t.json"},
            r"^/no/such/folder/t.json: cannot be written: its folder does not exist",
        ),
    ],
)
async def test_options_that_cannot_be(tiny: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(pi2rt.RequestError, match=message):
        async with pi2rt.open_runtime(tiny, **options):  # type: ignore[arg-type]
            pass


async def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(pi2rt.ModelNotFoundError):
        async with pi2rt.open_runtime(tmp_path / "no.gguf"):
            pass


async def test_a_model_larger_than_the_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_plan, "available_memory", lambda: 1 << 20)
    with pytest.raises(pi2rt.MemoryBudgetError, match=r"1\.0 MiB are available, .* too few: weights"):
        async with pi2rt.open_runtime(tiny):
            pass


async def test_a_budget_is_refused_with_the_least_that_would_do(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        pi2rt.MemoryBudgetError, match=r"a memory of 5 MiB is too small; the least is \d+ MiB: inter"
    ):
        async with pi2rt.open_runtime(tiny, memory="5M"):
            pass
    with pytest.raises(pi2rt.MemoryBudgetError, match=r"as a pack the model would need \d+ MiB"):
        async with pi2rt.open_runtime(tiny, memory=1 << 20):
            pass


async def test_streamed_weights_give_the_same_text(tmp_path: Path) -> None:
    """The least memory that is named is enough, and streams every layer."""
    model = TinyModel(context=512, dim=256, hidden=1024, layers=12, heads=4, kv_heads=4, head_dim=64)
    pack = tmp_path / "m.pi2"
    await trio.to_thread.run_sync(convert, write_gguf(tmp_path / "m.gguf", model, weight_type="F32"), pack)
    prompt = list(range(3, 43))
    async with pi2rt.open_runtime(pack, context=128) as runtime:
        resident = await runtime.generate(prompt, max_tokens=20, ignore_eos=True)
        assert "ring" not in runtime.statistics().memory
    with pytest.raises(pi2rt.MemoryBudgetError) as refused:
        async with pi2rt.open_runtime(pack, context=128, memory=1):
            pass
    least = re.search(r"least is (\d+) MiB", str(refused.value))
    assert least is not None
    async with pi2rt.open_runtime(pack, context=128, memory=f"{int(least[1]) + 2}M") as runtime:
        streamed = await runtime.generate(prompt, max_tokens=20, ignore_eos=True)
        statistics = runtime.statistics()
        assert statistics.memory["ring"] > 0
        assert statistics.actors[-1].name == "flash"
        flash_bytes = statistics.actors[0].executor.flash.bytes
        assert isinstance(flash_bytes, int)
        assert flash_bytes > statistics.engine.steps * 12 * 4 * 256 * (4 * 256)
    assert streamed.tokens == resident.tokens


async def test_errors_of_the_body_come_out_as_they_are(tiny: Path) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with pi2rt.open_runtime(tiny, executor="simulated"):
            raise LookupError("mine")
    group = ExceptionGroup("mine", [ValueError(), ValueError()])
    with pytest.raises(ExceptionGroup) as info:
        async with pi2rt.open_runtime(tiny, executor="simulated"):
            raise group
    assert (info.value.message, info.value.exceptions) == ("mine", group.exceptions)


async def test_an_executor_that_cannot_open(tiny: Path) -> None:
    with pytest.raises(RuntimeError, match="injected into open"):
        async with pi2rt.open_runtime(tiny, **simulated(faults=Faults(raise_in_open=True))):  # type: ignore[arg-type]
            pass


async def test_a_failing_step_leaves_the_runtime_usable(tiny: Path) -> None:
    faults = Faults(raise_in_wait=frozenset([2]))
    async with pi2rt.open_runtime(tiny, **simulated(faults=faults)) as runtime:  # type: ignore[arg-type]
        with pytest.raises(pi2rt.ExecutorError, match="<Step 2"):
            await runtime.generate("hi", max_tokens=5, ignore_eos=True)
        assert len((await runtime.generate("hi", max_tokens=5, ignore_eos=True)).tokens) == 5


async def test_cancelling_the_load(tiny: Path, autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as scope:
        async with pi2rt.open_runtime(tiny, **simulated(seconds_to_open=1000)):  # type: ignore[arg-type]
            pass
    assert scope.cancelled_caught
    assert trio.current_time() < 10


async def test_cancelling_everything(tiny: Path, autojump_clock: MockClock) -> None:
    with trio.move_on_after(1) as scope:
        async with pi2rt.open_runtime(tiny, **simulated(seconds_per_step=10)) as runtime:  # type: ignore[arg-type]
            await runtime.generate("hi")
    assert scope.cancelled_caught
    assert trio.current_time() < 10


async def test_closing_early(tiny: Path, autojump_clock: MockClock) -> None:
    async with pi2rt.open_runtime(tiny, **simulated(seconds_per_step=1)) as runtime:  # type: ignore[arg-type]
        async with runtime.stream("hi") as chunks:
            await anext(chunks)
            await runtime.aclose()
            with pytest.raises(pi2rt.ClosedError):
                async for _ in chunks:
                    pass
        with pytest.raises(pi2rt.ClosedError):
            await runtime.generate("hi")
        with pytest.raises(pi2rt.ClosedError):
            await runtime.score([1, 2])
        await runtime.aclose()


@pytest.mark.parametrize("drain", [0, 0.01])
async def test_closing_while_a_prompt_is_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: float
) -> None:
    model = write_gguf(tmp_path / "m.gguf", TinyModel(context=4096))
    begun, go_on = threading.Event(), threading.Event()
    encode = Tokenizer.encode_pieces

    def held(self: Tokenizer, text: str, **keywords: Any) -> Iterator[Any]:
        begun.set()
        go_on.wait()
        yield from encode(self, text, **keywords)

    monkeypatch.setattr(Tokenizer, "encode_pieces", held)
    async with pi2rt.open_runtime(model, **simulated()) as runtime:  # type: ignore[arg-type]

        async def request() -> None:
            with pytest.raises(pi2rt.ClosedError, match=r"^the engine is closed$"):
                await runtime.generate("a" * (LONG_TEXT + 1), max_tokens=2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(request)
            await trio.to_thread.run_sync(begun.wait)
            await runtime.aclose(drain=drain)
            go_on.set()


async def test_closing_an_executor_that_hangs_is_bounded(tiny: Path, autojump_clock: MockClock) -> None:
    faults = Faults(hang_in_close=True)
    with pytest.raises(pi2rt.ExecutorError, match="did not stop within 5 s"):
        async with pi2rt.open_runtime(tiny, **simulated(faults=faults)):  # type: ignore[arg-type]
            pass
    assert trio.current_time() < 20


async def test_the_trace_is_written_whatever_happens(tiny: Path, tmp_path: Path) -> None:
    for name in "good", "bad":
        try:
            async with pi2rt.open_runtime(tiny, executor="simulated", trace=tmp_path / name) as runtime:
                await runtime.generate("hi", max_tokens=3, ignore_eos=True)
                if name == "bad":
                    raise LookupError
        except LookupError:
            pass
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        assert {"request 1", "step 1", "step 3"} <= {event["name"] for event in events}


async def test_two_runtimes_at_once(tiny: Path, plain: Path) -> None:
    async with (
        pi2rt.open_runtime(tiny, executor="simulated") as one,
        pi2rt.open_runtime(plain, executor="simulated") as two,
    ):
        assert (await one.generate([1, 2], max_tokens=9)).tokens == (
            await two.generate([1, 2], max_tokens=9)
        ).tokens


async def test_an_executor_that_is_not_the_cpus_gives_its_actor_its_name(tiny: Path, tmp_path: Path) -> None:
    class Mine(SimulatedExecutor):
        def submit(self, step: Step) -> None:
            raise ValueError("not I")

    trace = tmp_path / "t.json"
    async with pi2rt.open_runtime(tiny, executor=lambda: Mine(name="mine"), trace=trace) as runtime:
        assert runtime.statistics().actors[0].name == "mine"
        with pytest.raises(pi2rt.ExecutorError, match=r"^actor 'mine' failed on .*: not I$") as error:
            await runtime.generate("hi", max_tokens=2)
        assert error.value.actor == "mine"
    names = [
        event["args"]["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["name"] == "thread_name"
    ]
    assert "mine" in names
    assert "cpu" not in names
    async with pi2rt.open_runtime(tiny, executor="simulated") as runtime:
        assert runtime.statistics().actors[0].name == "simulated"
    async with pi2rt.open_runtime(tiny, cores={"fast": [min(os.sched_getaffinity(0))]}) as runtime:
        assert runtime.statistics().actors[0].name == "fast"  # a class of cores


async def test_a_trace_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    tmp_path: Path,
) -> None:
    for path in (tmp_path, tmp_path / "absent" / "t.json"):
        with pytest.raises(pi2rt.RequestError, match="cannot be written: it"):
            async with pi2rt.open_runtime(tmp_path / "nothing.gguf", trace=path):
                pass
