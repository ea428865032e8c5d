"""Gemma 3 with a window far shorter than the text: what it computes is what it computes with memory for every page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import trio

import pi2rt
from pi2rt._errors import RequestError
from pi2rt.engine.lane import rows_in_flight
from pi2rt.formats.plan import Plan
from pi2rt.memory import StateStore, WindowPool, least_window_pages
from pi2rt.opening.opening import Opening
from pi2rt.opening.own_memory import OWN
from pi2rt.planner.pack.convert import convert
from tests.support.resident import resident_bytes
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf

WINDOW, CONTEXT = 70, 1024
GEMMA = TinyModel(
    "gemma3_text", seed=150, layers=7, context=CONTEXT, contrast=True, config={"sliding_window": WINDOW}
)


def numbers(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE - 64, count).tolist()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("windows") / "gemma.gguf", GEMMA, weight_type="Q8_0")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody holds is overwritten with NaN at once, and has no memory: who still sees it, or writes to it, shows.
    (Nothing is left for prefixes.)"""
    stores: list[StateStore] = []
    made, let_go = StateStore.__init__, WindowPool.let_go

    def make(self: StateStore, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        stores.append(self)

    def poison(self: WindowPool, page: int) -> None:
        let_go(self, page)
        if page not in self._idle:
            return
        store = next(each for each in stores if each.pool.windows is self)
        assert store.window_memory is not None
        size = store.layout.window_page_bytes
        store.window_memory.view()[page * size : (page + 1) * size] = 0xFF
        del self._idle[page]
        self._has[page] = 0
        self._backed -= 1
        self._given_back += 1

    monkeypatch.setattr(StateStore, "__init__", make)
    monkeypatch.setattr(WindowPool, "let_go", poison)


async def plan_of(path: Path, *, prefill: Sequence[str] = (), **options: Any) -> Plan:
    opening = await Opening.of(path, {"context": CONTEXT, **options}, prefill=prefill)  # type: ignore[misc]
    opening.close()
    return opening.plan


def least(plan: Plan) -> int:
    sequences = plan.choices.max_sequences
    rows = sum(rows_in_flight(lane.max_tokens, lane.in_flight, sequences) for lane in plan.lanes)
    return least_window_pages(WINDOW, sequences, rows, CONTEXT)


def with_windows(plan: Plan, pages: int) -> Plan:
    """0: all pages have memory for all blocks."""
    return msgspec.structs.replace(plan, window_pages=pages)


Rows = npt.NDArray[np.float32]


async def computed(path: Path, plan: Plan, *, given_back: bool) -> tuple[list[tuple[Any, ...]], Rows]:
    """Texts of three requests at once, with their log probabilities; and the logits of a long prompt."""
    texts: dict[int, tuple[Any, ...]] = {}
    async with pi2rt.open_runtime(path, plan=plan) as runtime:

        async def one(number: int) -> None:
            prompt = numbers(150 + 100 * number, seed=number)
            found = await runtime.generate(prompt, max_tokens=150, logprobs=0, ignore_eos=True)
            texts[number] = found.tokens, found.logprobs

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(one, number)
        logits = await runtime.logits(numbers(600, seed=9))
        windows = runtime.statistics().engine.windows
        assert (windows is not None and windows.given_back > 10) == given_back
    return [texts[number] for number in range(3)], logits


@pytest.fixture(scope="module")
def expected(gemma: Path) -> tuple[list[tuple[Any, ...]], Rows]:
    """With memory for every page."""

    async def run() -> tuple[list[tuple[Any, ...]], Rows]:
        return await computed(gemma, with_windows(await plan_of(gemma), 0), given_back=False)

    return trio.run(run)


@pytest.mark.parametrize(
    ("chunk", "threads", "sequences"), [(16, 1, 1), (64, 2, 4), (192, 1, 3), (100, 2, 1), (512, 2, 2)]
)
async def test_the_same_bits_with_the_least_memory(
    gemma: Path, eager: None, chunk: int, threads: int, sequences: int, expected: Any
) -> None:
    plan = await plan_of(gemma, prefill_chunk=chunk, threads=threads, max_sequences=sequences)
    plan = with_windows(plan, least(plan))
    assert plan.window_pages < plan.kv_pages
    texts, logits = await computed(gemma, plan, given_back=True)
    assert texts == expected[0]
    np.testing.assert_array_equal(logits, expected[1])


@pytest.mark.parametrize("kv_type", ["f16", "q8"])
@pytest.mark.parametrize("name", ["gemma", "mistral"])
async def test_the_same_bits_as_the_plan_is_made(tmp_path: Path, name: str, kv_type: str) -> None:
    """Mistral: every block has a window, so that nothing is left for the other area."""
    config = {"sliding_window": WINDOW}
    mistral = TinyModel("mistral", seed=151, layers=3, context=CONTEXT, contrast=True, config=config)
    path = write_gguf(tmp_path / "m.gguf", GEMMA if name == "gemma" else mistral, weight_type="Q8_0")
    plan = await plan_of(path, kv_type=kv_type, max_sequences=2, prefill_chunk=64)
    assert least(plan) < plan.window_pages < plan.kv_pages
    whole = await computed(path, with_windows(plan, 0), given_back=False)
    found = await computed(path, plan, given_back=True)
    assert found[0] == whole[0]
    np.testing.assert_array_equal(found[1], whole[1])


async def test_the_reference_executor(gemma: Path, eager: None) -> None:
    """The same as with all pages, and near the CPU's."""
    plan = await plan_of(gemma, executor="reference", max_sequences=3, prefill_chunk=64)
    whole = await computed(gemma, with_windows(plan, 0), given_back=False)
    found = await computed(gemma, with_windows(plan, least(plan)), given_back=True)
    np.testing.assert_allclose(found[1], whole[1], rtol=1e-4, atol=1e-4)
    assert np.isfinite(found[1]).all()
    exact = await plan_of(gemma, exact_floats=True, activations="int16", max_sequences=3, prefill_chunk=64)
    cpu = await computed(gemma, with_windows(exact, least(exact)), given_back=True)
    np.testing.assert_allclose(found[1], cpu[1], rtol=1e-3, atol=1e-3 * np.abs(cpu[1]).max())


@pytest.mark.parametrize("executor", ["cpu", "reference"])
async def test_a_lane_for_prompts(gemma: Path, eager: None, executor: str, expected: Any) -> None:
    plan = await plan_of(gemma, prefill=[executor], max_sequences=3, prefill_chunk=64)
    texts, logits = await computed(gemma, with_windows(plan, least(plan)), given_back=True)
    np.testing.assert_array_equal(logits, expected[1])
    if executor == "cpu":
        assert texts == expected[0]


async def test_another_executor_goes_on_where_the_last_was(gemma: Path, eager: None, expected: Any) -> None:
    """In the middle of a prompt and of a text: what is computed stays, its windowed bytes too."""
    plan = await plan_of(gemma, max_sequences=2, prefill_chunk=16)
    async with pi2rt.open_runtime(gemma, plan=with_windows(plan, least(plan))) as runtime:
        got: list[tuple[int, float | None]] = []
        reopened = trio.Event()

        async def reopen() -> None:
            await runtime._actors[0].reopen(lambda: None)
            reopened.set()

        async with trio.open_nursery() as nursery:

            def half(done: int, total: int) -> None:
                if done == 80:
                    nursery.start_soon(reopen)

            stream = runtime.stream(
                numbers(350, seed=2), max_tokens=150, logprobs=0, ignore_eos=True, on_prefill=half
            )
            async with stream as chunks:
                async for chunk in chunks:
                    got.append((chunk.token, chunk.logprob))
                    if len(got) == 60:
                        assert reopened.is_set()
                        await reopen()
        assert tuple(zip(*got, strict=True)) == expected[0][2]
        engine = runtime.statistics().engine
        assert engine.rebuilds == 2
        assert engine.prefill_tokens < 350 + 100  # what was computed was not computed again
        assert engine.windows is not None
        assert engine.windows.given_back > 0


async def test_streamed_weights(tmp_path: Path, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of the whole area are lent to streamed weights, and those of the windowed one are not."""
    for name in ("before_tokenizer", "with_tokenizer"):  # or it would differ from one opening to the next
        monkeypatch.setattr(OWN, name, lambda description: 100 << 20)
    wide = TinyModel(
        "gemma3_text", dim=512, hidden=2048, layers=7, heads=4, kv_heads=2, head_dim=64, context=CONTEXT,
        config={"sliding_window": WINDOW},
    )  # fmt: skip
    source = write_gguf(tmp_path / "m.gguf", wide, weight_type="Q4_0")
    convert(source, tmp_path / "m.pi2")
    roomy = await plan_of(tmp_path / "m.pi2", memory=1 << 30, max_sequences=2, prefill_chunk=64)
    segments = roomy.segments
    memory = segments.total - segments.resident // 2
    plan = await plan_of(tmp_path / "m.pi2", memory=memory, max_sequences=2, prefill_chunk=64)
    assert plan.segments.ring > 0
    assert 0 < least(plan) <= plan.window_pages < plan.kv_pages
    found = await computed(tmp_path / "m.pi2", plan, given_back=True)
    whole = await computed(tmp_path / "m.pi2", with_windows(roomy, 0), given_back=False)
    assert found[0] == whole[0]
    np.testing.assert_array_equal(found[1], whole[1])


async def test_the_next_turns_of_chats_begin_where_the_last_ended(gemma: Path) -> None:
    """Two conversations in turn, with memory as the plan is made; every text is that of a fresh runtime."""
    plan = await plan_of(gemma, max_sequences=2, prefill_chunk=64)
    chats = [numbers(300, seed=seed) for seed in range(2)]
    prompts: list[tuple[list[int], tuple[int, ...]]] = []
    async with pi2rt.open_runtime(gemma, plan=plan) as runtime:
        for turn in range(3):
            for seed, chat in enumerate(chats):
                found = await runtime.generate(chat, max_tokens=70, ignore_eos=True)
                prompts.append((chat.copy(), found.tokens))
                if turn:
                    assert found.timing.cached_tokens >= len(chat) - 64 - 65
                chat += [*found.tokens, *numbers(60, seed=10 * turn + seed)]
        windows = runtime.statistics().engine.windows
        assert windows is not None
        assert windows.given_back > 0
        assert windows.peak_backed <= plan.window_pages
    for prompt, tokens in prompts:
        async with pi2rt.open_runtime(gemma, plan=with_windows(plan, 0)) as runtime:
            assert (await runtime.generate(prompt, max_tokens=70, ignore_eos=True)).tokens == tokens


async def test_a_prefix_whose_window_was_given_back_is_computed_again(gemma: Path) -> None:
    plan = await plan_of(gemma, max_sequences=2, prefill_chunk=64)
    prompt, others = numbers(400), [numbers(900, seed=seed) for seed in range(1, 3)]
    async with pi2rt.open_runtime(gemma, plan=with_windows(plan, least(plan))) as runtime:
        first = await runtime.generate(prompt, max_tokens=20, ignore_eos=True)
        for other in others:
            await runtime.generate(other, max_tokens=1)
        again = await runtime.generate(prompt, max_tokens=20, ignore_eos=True)
        assert (again.timing.cached_tokens, again.tokens) == (0, first.tokens)
        found = await runtime.generate(prompt, max_tokens=20, ignore_eos=True)
        assert (found.timing.cached_tokens, found.tokens) == (384, first.tokens)


def resident(store: StateStore) -> int:
    """Bytes of the windowed area that have memory."""
    assert store.window_memory is not None
    return resident_bytes(store.window_memory)


async def test_a_plan_counts_what_is_taken(gemma: Path) -> None:
    """Its segment is what the store may take; and no more has memory, however long the texts are."""
    plan = await plan_of(gemma, max_sequences=3, prefill_chunk=64)
    async with pi2rt.open_runtime(gemma, plan=plan) as runtime:
        store = runtime._opening.store
        assert store is not None
        layout = store.layout
        assert plan.segments.kv == store.nbytes
        assert plan.segments.kv == (
            plan.kv_pages * layout.page_bytes + plan.window_pages * layout.window_page_bytes
        )
        assert runtime.statistics().memory["kv"] == store.nbytes
        for number in range(5):
            await runtime.generate(numbers(900, seed=number), max_tokens=100, ignore_eos=True)
            windows = runtime.statistics().engine.windows
            assert windows is not None
            assert resident(store) <= windows.backed * layout.window_page_bytes
            assert windows.backed <= plan.window_pages
        assert windows.backed == windows.peak_backed == windows.capacity == plan.window_pages
        used = sum(2 * each.v_offset * each.state.kv_heads for each in layout.paged if each.windowed)
        assert resident(store) > 0.9 * plan.window_pages * used
        assert windows.given_back > 20


async def test_a_longer_context_has_room_in_the_same_memory(gemma: Path) -> None:
    short = await plan_of(gemma, max_sequences=1, context=128)
    long = await plan_of(gemma, max_sequences=1, context=1024)
    assert (short.window_pages, short.kv_pages) == (2, 2)  # no fewer than there are
    each = (short.segments.kv, long.segments.kv)
    assert each[1] < 8 * each[0] * 0.8
    none = await plan_of(gemma, max_sequences=1, context=WINDOW)
    assert none.window_pages == 0


class Keeping:
    """An executor that keeps keys and values by itself, and does not say what memory it takes."""

    name = "keeping"
    max_in_flight = 2

    async def open(self, *arguments: object) -> None: ...

    def submit(self, step: object) -> None: ...

    async def wait(self) -> Any: ...

    def stop(self, step_id: int) -> None: ...

    async def aclose(self) -> None: ...

    def statistics(self) -> Any: ...


async def test_who_keeps_keys_and_values_by_itself_keeps_all(gemma: Path) -> None:
    plan = await plan_of(gemma, max_sequences=2, executor=Keeping)
    roomy = with_windows(await plan_of(gemma, max_sequences=2), 0)
    assert (plan.window_pages, plan.kv_pages) == (0, roomy.kv_pages)
    each = 2 * 2 * GEMMA.kv_heads * GEMMA.head_dim * 64 * GEMMA.layers
    assert plan.segments.kv >= plan.kv_pages * each


async def test_plans_with_too_little_memory_for_windows_are_refused(gemma: Path, tmp_path: Path) -> None:
    plan = await plan_of(gemma, max_sequences=2)
    few = least(plan) - 1
    with pytest.raises(RequestError, match=f"window_pages={few}: fewer than the {few + 1} that sequences"):
        await Opening.of(gemma, {"plan": with_windows(plan, few)})
    shallow = [msgspec.structs.replace(plan.lanes[0], in_flight=1, max_tokens=64)]
    lying = msgspec.structs.replace(plan, lanes=shallow, window_pages=7)
    with pytest.raises(
        RequestError, match="window_pages=7: fewer than the 8 KV pages whose windowed bytes 2 sequences"
    ):
        async with pi2rt.open_runtime(gemma, plan=lying):
            pass
    llama = write_gguf(tmp_path / "llama.gguf", TinyModel(context=CONTEXT))
    other = await plan_of(llama, max_sequences=2)
    assert other.window_pages == 0
    with pytest.raises(RequestError, match="window_pages=5: no block has a window"):
        await Opening.of(llama, {"plan": with_windows(other, 5)})
