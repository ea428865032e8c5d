"""An actor whose executors are simulated, and may fail as told."""

from __future__ import annotations

from typing import Any

import numpy as np

from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor
from pi2rt.models import Linear, ModelDescription, Norm
from pi2rt.runtime.actor import Actor
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.step import Bind, Sampling, Slice, Step
from pi2rt.runtime.trace import Trace

MODEL = ModelDescription(
    "llama", "stand-in", 32, 512, 1024, "token_embd.weight", (), Norm("n", 1e-5), Linear("token_embd.weight")
)
OPTIONS = ExecutorOptions(slots=8, pages=8, context=64, max_tokens=64)


def step(number: int, slot: int = 0) -> Step:
    """A prefill that needs nothing from before."""
    tokens = np.array([1, 2, 3], np.int32)
    piece = Slice(slot, 0, np.array([slot], np.int32), tokens, sample=True)
    return Step(number, (piece,), (Bind(slot, Sampling(), tokens),))


class Bench:
    """Makes an actor whose n-th executor has the n-th settings; the last ones count for all later
    executors."""

    def __init__(self, *settings: dict[str, Any], trace: Trace | None = None) -> None:
        self.settings = settings or ({},)
        self.made: list[SimulatedExecutor] = []
        self.closed: list[StepExecutor] = []
        self.actor = Actor("cpu", self.make, self.open, trace)

    def make(self) -> StepExecutor:
        settings = self.settings[min(len(self.made), len(self.settings) - 1)]
        executor = Watched(self, **{"seconds_per_step": 1.0} | settings)
        self.made.append(executor)
        return executor

    async def open(self, executor: StepExecutor) -> None:
        await executor.open(None, MODEL, OPTIONS, None, lambda done, total: None)  # type: ignore[arg-type]


class Watched(SimulatedExecutor):
    def __init__(self, bench: Bench, **settings: Any) -> None:
        super().__init__(**settings)
        self.bench = bench

    async def aclose(self) -> None:
        self.bench.closed.append(self)
        await super().aclose()


def faults(**ids: Any) -> dict[str, Any]:
    return {"faults": Faults(**{k: v if isinstance(v, bool) else frozenset(v) for k, v in ids.items()})}
