"""pi2rt's half of ``against_llama_cpp.py``: the same commands through the public API, everything included: scheduling,
sampling, text and delivery."""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import trio

import pi2rt
from pi2rt.host.memory import peak_rss_bytes
from pi2rt.planner.laws import DecodeUse, percentile
from pi2rt.runtime.executor_statistics import ExecutorStatistics


class Model:
    def __init__(self, runtime: pi2rt.Runtime) -> None:
        self.runtime = runtime
        self.random = random.Random(0)
        self.kept: tuple[tuple[int, int], list[list[int]]] = ((0, 0), [])

    def prompt(self, count: int) -> list[int]:
        return [self.random.randrange(300, self.runtime.tokenizer.vocab_size - 300) for _ in range(count)]

    async def run(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["what"] == "prefill":
            earlier = self.runtime.statistics().actors[0].executor
            timing = (
                await self.runtime.generate(self.prompt(command["tokens"]), max_tokens=1, ignore_eos=True)
            ).timing
            later = self.runtime.statistics().actors[0].executor
            return {"tokens_per_s": timing.prefill_tokens_per_s, **self.reads(earlier, later)}
        sequences = command.get("sequences", 1)
        before = ExecutorStatistics()
        tokens: list[float] = []  # of one sequence: when each came
        ends: list[tuple[float, float]] = []  # of each sequence: its first token and its last, on one clock
        waiting = sequences
        if self.kept[0] != (command["context"], sequences):
            self.kept = (
                (command["context"], sequences),
                [self.prompt(command["context"]) for _ in range(sequences)],
            )

        async def generate(prompt: list[int]) -> None:
            nonlocal waiting, before
            async with self.runtime.stream(
                prompt, max_tokens=command["tokens"] + 1, ignore_eos=True, **command.get("sampling", {})
            ) as chunks:
                await anext(chunks)
                waiting -= 1
                if not waiting:
                    before = self.runtime.statistics().actors[0].executor
                first = time.perf_counter()
                tokens.extend([time.perf_counter() async for _ in chunks])
                ends.append((first, time.perf_counter()))

        async with trio.open_nursery() as nursery:
            for prompt in self.kept[1]:  # the same as last time: only decode is measured
                nursery.start_soon(generate, prompt)
        after = self.runtime.statistics().actors[0].executor
        # sequences that started earlier have decoded alone for a while: count the time from the last first token on,
        # and of the others' tokens only their share after it
        start = max(first for first, _ in ends)
        end = max(last for _, last in ends)
        count = sum(command["tokens"] * (last - start) / (last - first) for first, last in ends)
        return {
            "tokens_per_s": count / (end - start),
            **(each_token(tokens) if sequences == 1 else {}),
            **self.reads(before, after),
            "outside_kernels": 1
            - (after.kernel_ns - before.kernel_ns) / (after.finished_ns - before.finished_ns),
        }

    def reads(self, before: ExecutorStatistics, after: ExecutorStatistics) -> dict[str, Any]:
        """What steps used (``DecodeUse``, and how neurons are read); of weights that do not fit, bytes read for each
        step and in all, and the share of time that steps have waited for them."""
        steps = after.steps - before.steps

        def spent(name: str) -> int:
            values = [0 if each.flash is None else int(getattr(each.flash, name)) for each in (before, after)]
            return values[1] - values[0]

        neurons = None if after.flash is None else after.flash.neurons
        recent = after.recent[-min(steps, len(after.recent)) :]
        return {
            "use": asdict(DecodeUse.of([step for step in recent if step.weight_bytes])),
            "page_bytes": 0 if neurons is None else neurons.page_bytes,
            "depth": 0 if neurons is None else neurons.reads_at_once,
            "flash_bytes": spent("bytes") / steps,
            "flash_bytes_all": spent("bytes"),
            "flash_wait": spent("stall_ns") / (after.finished_ns - before.finished_ns),
        }


def each_token(tokens: list[float]) -> dict[str, float]:
    """Milliseconds from token to token: mean and percentiles."""
    gaps = [1e3 * (b - a) for a, b in pairwise(tokens)]
    if not gaps:
        return {}
    shares = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}
    return {"mean_ms": sum(gaps) / len(gaps)} | {
        name: percentile(gaps, share) for name, share in shares.items()
    }


async def serve(path: str, threads: int, context: int, sequences: int, more: dict[str, Any]) -> None:
    """``more``: further keywords of ``pi2rt.open_runtime``."""
    begin = time.perf_counter()
    async with pi2rt.open_runtime(
        path, threads=threads, context=context, max_sequences=sequences, **more
    ) as runtime:
        model = Model(runtime)
        load_s = time.perf_counter() - begin
        print(json.dumps({"load_s": load_s, "version": pi2rt.__version__}), flush=True)
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            print(json.dumps(await model.run(json.loads(line)) | {"peak_rss": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    trio.run(serve, sys.argv[1], *map(int, sys.argv[2:5]), json.loads(sys.argv[5]))
