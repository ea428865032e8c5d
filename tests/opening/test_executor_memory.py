"""A memory budget holds, or is refused, with every executor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pi2rt
from pi2rt._errors import MemoryBudgetError, RequestError
from pi2rt.executors.simulated.executor import SimulatedExecutor
from tests.support.real_model import smollm2
from tests.support.tiny_models import TinyModel, write_gguf


async def test_an_executor_that_does_not_say_what_it_takes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", TinyModel())

    class Plain:
        """As plug-ins without the method."""

        def __init__(self) -> None:
            self._inner = SimulatedExecutor()

        def __getattr__(self, name: str) -> object:
            if name == "need":
                raise AttributeError(name)
            return getattr(self._inner, name)

    async with pi2rt.open_runtime(path, executor=Plain) as runtime:  # type: ignore[arg-type]
        assert (await runtime.generate([1, 2], max_tokens=2, ignore_eos=True)).tokens
    with pytest.raises(
        RequestError, match=r"^memory='1G': the executor 'simulated' does not say what memory it needs"
    ):
        async with pi2rt.open_runtime(path, executor=Plain, memory="1G"):  # type: ignore[arg-type]
            pass


async def test_the_reference_executor_needs_float32(tmp_path: Path) -> None:
    model = smollm2()
    with pytest.raises(MemoryBudgetError, match=r"a memory of 200 MiB is too small; the least is \d+ MiB"):
        async with pi2rt.open_runtime(model, executor="reference", memory="200M", context=512):
            pass


PEAK = """
import sys, trio, pi2rt
from pi2rt.host.memory import peak_rss_bytes
async def main():
    budget = 1
    for _ in range(5):  # the first answers know nothing of the tokenizer
        try:
            async with pi2rt.open_runtime(sys.argv[1], executor="reference", memory=f"{budget}M", context=512,
                                          max_sequences=1) as runtime:
                await runtime.generate([7] * 300, max_tokens=3, ignore_eos=True)
                print(budget, peak_rss_bytes() >> 20)
                return
        except pi2rt.MemoryBudgetError as error:
            budget = int(str(error).split("the least is ")[1].split(" MiB")[0]) + 1
trio.run(main)
"""


@pytest.mark.slow
def test_its_budget_holds() -> None:
    """The least that it takes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, smollm2()], capture_output=True, text=True, check=True, timeout=600
    )
    budget, peak = map(int, done.stdout.split())
    print(f"a budget of {budget} MiB, a peak of {peak} MiB")
    assert peak <= budget
