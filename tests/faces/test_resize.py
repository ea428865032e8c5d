"""Another memory budget while text is made: the text stays, and the memory is given back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio

import pi2rt
from pi2rt._errors import MemoryBudgetError, RequestError
from pi2rt.formats import open_model_file
from pi2rt.planner.convert import convert
from pi2rt.planner.streaming import all_neurons, least_neurons
from tests.support.tiny_models import TinyModel, write_gguf

MODEL = TinyModel(
    "llama", seed=1, dim=512, hidden=4096, layers=4, heads=8, kv_heads=2, head_dim=64, config={"hidden_act": "drelu"}
)  # fmt: skip
LARGE = 1 << 30


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resize")
    convert(write_gguf(folder / "m.gguf", MODEL, weight_type="Q4_0"), folder / "m.pi2")
    return folder / "m.pi2"


def sizes(path: Path) -> tuple[int, int]:
    """Bytes of the smallest neuron cache, and of all neurons."""
    with open_model_file(path) as file:
        return least_neurons(file), all_neurons(file)


async def test_text_is_the_same_while_the_budget_changes_a_hundred_times(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        expected = (await runtime.generate("Once", max_tokens=100, ignore_eos=True)).tokens
        done = trio.Event()

        async def change() -> None:
            random = np.random.default_rng(5)
            for _ in range(100):
                await runtime.resize(int(LARGE - most + random.integers(least, most)))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            rounds = 0
            while not done.is_set() or rounds == 0:
                assert (await runtime.generate("Once", max_tokens=100, ignore_eos=True)).tokens == expected
                rounds += 1
        details = runtime.statistics().actors[0].executor.details
        assert int(str(details["neuron_evictions"])) > 0


async def test_memory_is_given_back_and_taken_again(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        before = runtime.statistics().memory["neurons"]
        await runtime.resize(LARGE - most + least)
        assert runtime.statistics().memory["neurons"] <= least < before
        await runtime.generate("Once", max_tokens=5, ignore_eos=True)
        await runtime.resize(LARGE)
        assert runtime.statistics().memory["neurons"] == before


async def test_too_little_is_refused_and_changes_nothing(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        with pytest.raises(
            MemoryBudgetError, match="is too small; the least that a running model can change to is"
        ):
            await runtime.resize(LARGE - most + least - 1)
        with pytest.raises(RequestError, match="'much' is not a size"):
            await runtime.resize("much")
        assert (await runtime.generate("Once", max_tokens=3, ignore_eos=True)).tokens
    async with pi2rt.open_runtime(pack, context=256) as runtime:
        with pytest.raises(RequestError, match="takes a memory budget, and a pack with neuron bundles"):
            await runtime.resize("1G")


@pytest.mark.parametrize(
    "option", [{"cache": "off"}, {"pipeline": "none"}, {"cache": "8M", "pipeline": "matrix"}]
)
async def test_options_that_would_do_nothing_are_refused(
    pack: Path, tmp_path: Path, option: dict[str, str]
) -> None:
    with pytest.raises(RequestError, match="takes a memory budget, and a pack with neuron bundles"):
        async with pi2rt.open_runtime(pack, context=256, **option):  # type: ignore[arg-type]
            pass
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE, **option) as runtime:  # type: ignore[arg-type]
        assert (await runtime.generate("Once", max_tokens=3, ignore_eos=True)).tokens
