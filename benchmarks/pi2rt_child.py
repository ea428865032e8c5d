"""pi2rt's half of ``against_llama_cpp.py``: the same commands through the public API, everything included: scheduling,
sampling, text and delivery."""

from __future__ import annotations

import json
import random
import sys
import time
from itertools import pairwise
from typing import Any

import trio

import pi2rt
from pi2rt.runtime.executor import ExecutorStatistics
from pi2rt.runtime.host_memory import peak_rss_bytes


class Model:
    def __init__(self, runtime: pi2rt.Runtime) -> None:
        self.runtime = runtime
        self.random = random.Random(0)
        self.kept: tuple[tuple[int, int], list[list[int]]] = ((0, 0), [])

    def prompt(self, count: int) -> list[int]:
        return [self.random.randrange(300, self.runtime.tokenizer.vocab_size - 300) for _ in range(count)]

    async def run(self, command: dict[str, Any]) -> dict[str, float]:
        if command["what"] == "prefill":
            timing = (
                await self.runtime.generate(self.prompt(command["tokens"]), max_tokens=1, ignore_eos=True)
            ).timing
            return {"tokens_per_s": timing.prefill_tokens_per_s}
        sequences = command.get("sequences", 1)
        before = ExecutorStatistics()
        tokens: list[
            tuple[float, float]
        ] = []  # of one sequence: when each came, and reads of neurons until then
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
                tokens.extend([(time.perf_counter(), self.neuron_reads()) async for _ in chunks])
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

    def neuron_reads(self) -> float:
        """Of neurons, since the start."""
        details = self.runtime.statistics().actors[0].executor.details
        return float(str(details.get("flash_reads", 0)))

    def reads(self, before: ExecutorStatistics, after: ExecutorStatistics) -> dict[str, float]:
        """Of weights that do not fit: bytes read per step, and the share of time that steps have waited for them."""
        if "flash_bytes" not in after.details:
            return {}
        steps = after.steps - before.steps

        def spent(name: str) -> int:
            return int(str(after.details[name])) - int(str(before.details[name]))

        more = {}
        if "neuron_misses" in after.details:
            asked = spent("neuron_misses") + spent("neuron_hits")
            # what was foreseen was not there either: it was read for this step
            not_there = spent("neuron_misses") + spent("neuron_early")
            more = {"flash_reads": spent("flash_reads") / steps, "missing": not_there / asked}
        return {
            **more,
            "flash_bytes": spent("flash_bytes") / steps,
            "flash_wait": spent("flash_stall_ns") / (after.finished_ns - before.finished_ns),
        }


def each_token(tokens: list[tuple[float, float]]) -> dict[str, float]:
    """Milliseconds from token to token, and reads of neurons for each: means and percentiles."""
    if len(tokens) < 3:
        return {}
    gaps = sorted(1e3 * (b[0] - a[0]) for a, b in pairwise(tokens))
    reads = sorted(b[1] - a[1] for a, b in pairwise(tokens))

    def at(values: list[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))]

    return {
        "mean_ms": sum(gaps) / len(gaps),
        "p50_ms": at(gaps, 0.5),
        "p90_ms": at(gaps, 0.9),
        "p99_ms": at(gaps, 0.99),
        "reads_mean": sum(reads) / len(reads),
        "reads_p99": at(reads, 0.99),
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
