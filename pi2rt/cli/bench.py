"""Measure prefill and decode speed, and compare with what the memory allows.

Each repeat runs two requests: one with a prompt of ``--prefill`` tokens and one token generated, and one with
a short prompt and ``--decode`` tokens generated after the first. Prompts are random tokens, other ones each
time, so that the prefix cache has none of them; the model's own end of text is ignored. Reported are medians
over the repeats. The memory bandwidth is measured after them, with the same cores.

The bound of decode: each token computes with the weights once, so it takes at least bytes_per_token / bandwidth; of a
model larger than its memory also as long as flash takes for what was missing, at the rate measured afterwards
(``planner/laws.py``). ``efficiency`` is that time over the one measured.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from pi2rt.cli import _runtime

if TYPE_CHECKING:
    from pi2rt import Runtime
    from pi2rt.planner.laws import DecodeUse, Rates
    from pi2rt.runtime.executor_statistics import CacheStatistics, StepUse

_SHORT_PROMPT = 16

FLASH_SECONDS = 1.0
"""For which flash is measured, where it was used."""


@dataclass(frozen=True, slots=True)
class Result:
    """Units are in the names; the fractions are of 1. ``decode_spread``: (largest - smallest) / median of the
    decode speed over the repeats, to see how quiet the machine was. ``bytes_per_token``: weights computed with,
    of neurons those that were active; of these ``streamed_bytes_per_token`` in matrices that are read for each token,
    and misses: pages of neurons that the cache did not have. ``read_through``: pages of gaps (--read-through). Rates of
    flash are 0 where nothing is read."""

    model: str
    executor: str
    sparsity: str
    kernels: str | None
    threads: int
    prefill_tokens: int
    decode_tokens: int
    repeats: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_spread: float
    ttft_ms: float
    bytes_per_token: int
    streamed_bytes_per_token: int
    misses_per_token_mean: float
    misses_per_token_p99: float
    missed_bytes_per_token_mean: float
    missed_bytes_per_token_p99: float
    neuron_reads_per_token: float
    needed_reads_per_token: float
    read_through_per_token: float
    read_through_bytes_per_token: float
    memory_bandwidth_bytes_per_s: float
    flash_bandwidth_bytes_per_s: float
    flash_reads_per_s: float
    bound_ms_per_token: float
    efficiency: float
    runtime_overhead_fraction: float
    load_s: float
    peak_rss_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _runtime.add_model_argument(parser)
    parser.add_argument(
        "--prefill", type=_runtime.positive, default=512, metavar="N", help="default: 512 tokens"
    )
    parser.add_argument(
        "--decode", type=_runtime.positive, default=128, metavar="N", help="default: 128 tokens"
    )
    parser.add_argument("--repeat", type=_runtime.positive, default=5, metavar="N", help="default: 5 times")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _runtime.add_runtime_options(parser)


def main(options: argparse.Namespace) -> int:
    from pi2rt.cli._interrupt import run_until_interrupted

    return run_until_interrupted(partial(_run, options))


async def _run(options: argparse.Namespace) -> int:
    from pi2rt.host.memory import peak_rss_bytes
    from pi2rt.planner import laws

    context = max(options.prefill, _SHORT_PROMPT + options.decode) + 1
    async with _runtime.opened(options, context=context, max_sequences=1) as opened:
        runtime = opened.runtime
        prompts = _RandomPrompts(runtime)
        await _decode(
            runtime, prompts.next(_SHORT_PROMPT), 4
        )  # first touches of memory are not what is asked
        prefills, ttfts, decodes, overheads = [], [], [], []
        steps: list[StepUse] = []
        for number in range(options.repeat):
            prefill, ttft = await _prefill(runtime, prompts.next(options.prefill))
            decode, overhead, used = await _decode(runtime, prompts.next(_SHORT_PROMPT), options.decode)
            steps += used
            prefills.append(prefill)
            ttfts.append(ttft)
            decodes.append(decode)
            overheads.append(overhead)
            if sys.stderr.isatty() and not options.json:
                print(
                    f"{number + 1} of {options.repeat}: {prefill:.1f} and {decode:.1f} tokens/s",
                    file=sys.stderr,
                )
        peak = peak_rss_bytes()
        flash = runtime.statistics().actors[0].executor.flash
    # Measured when the model is gone, for the buffers of that are not part of its memory budget.
    use = _use(opened.path, steps)
    rates = await _measure_rates(options, opened.path, use, None if flash is None else flash.neurons)
    bound = laws.bound_s(use, rates)
    decode = median(decodes)
    result = Result(
        model=runtime.model.name,
        executor=options.executor,
        sparsity=runtime.model.sparsity,
        kernels=_runtime.kernels(options),
        threads=_runtime.placement(options).threads,
        prefill_tokens=options.prefill,
        decode_tokens=options.decode,
        repeats=options.repeat,
        prefill_tokens_per_s=median(prefills),
        decode_tokens_per_s=decode,
        decode_spread=(max(decodes) - min(decodes)) / decode,
        ttft_ms=median(ttfts) * 1000,
        bytes_per_token=round(use.weight_bytes),
        streamed_bytes_per_token=round(use.streamed_bytes),
        misses_per_token_mean=use.misses_mean,
        misses_per_token_p99=use.misses_p99,
        missed_bytes_per_token_mean=use.missed_bytes_mean,
        missed_bytes_per_token_p99=use.missed_bytes_p99,
        neuron_reads_per_token=use.reads_mean,
        needed_reads_per_token=use.needed_reads,
        read_through_per_token=use.read_through_mean,
        read_through_bytes_per_token=use.read_through_bytes_mean,
        memory_bandwidth_bytes_per_s=rates.memory,
        flash_bandwidth_bytes_per_s=rates.flash,
        flash_reads_per_s=rates.flash_reads,
        bound_ms_per_token=bound * 1000,
        efficiency=bound * decode,
        runtime_overhead_fraction=median(overheads),
        load_s=opened.load_s,
        peak_rss_bytes=peak,
    )
    print(json.dumps(asdict(result)) if options.json else _describe(result))
    return 0


def _use(path: str, steps: Sequence[StepUse]) -> DecodeUse:
    """What decode took for each token, as the executor counted it; where it does not count, what the file has."""
    from pi2rt.planner.laws import DecodeUse
    from pi2rt.runtime.executor_statistics import StepUse

    counted = [step for step in steps if step.tokens == 1 and step.weight_bytes]
    return DecodeUse.of(counted or [StepUse(1, 0, bytes_per_token(path), 0, None)])


async def _measure_rates(
    options: argparse.Namespace, path: str, use: DecodeUse, neurons: CacheStatistics | None
) -> Rates:
    import trio

    from pi2rt.planner.laws import Rates, measure_flash
    from pi2rt.planner.measure.device_profile import measure_device

    def measure() -> Rates:
        flash, reads = measure_flash(
            path,
            use,
            page_bytes=0 if neurons is None else neurons.page_bytes,
            depth=0 if neurons is None else neurons.reads_at_once,
            io=options.io,
            seconds=FLASH_SECONDS,
        )
        return Rates(measure_device(_runtime.placement(options)).read_bandwidth, flash, reads)

    return await trio.to_thread.run_sync(measure)


async def _prefill(runtime: Runtime, prompt: list[int]) -> tuple[float, float]:
    """Tokens per second, and seconds to the first token."""
    timing = (await runtime.generate(prompt, max_tokens=1, ignore_eos=True)).timing
    return timing.prefill_tokens_per_s, timing.ttft_s


async def _decode(runtime: Runtime, prompt: list[int], tokens: int) -> tuple[float, float, list[StepUse]]:
    """Tokens per second after the first, the share of that time outside of kernels, and what the steps took.

    The engine submits a step before it has the result of the one before, so a snapshot of the executor may be
    a step ahead of the tokens seen. The share is therefore taken between the ends of two steps, as the
    executor counts them.
    """
    async with runtime.stream(prompt, max_tokens=tokens + 1, ignore_eos=True) as chunks:
        last = await anext(chunks)
        before = runtime.statistics().actors[0].executor
        async for chunk in chunks:
            last = chunk
    after = runtime.statistics().actors[0].executor
    timing = last.timing
    assert timing is not None
    wall_ns = after.finished_ns - before.finished_ns
    kernel_ns = after.kernel_ns - before.kernel_ns
    steps = (
        after.recent[-min(len(after.recent), after.steps - before.steps) :]
        if after.steps > before.steps
        else ()
    )
    return timing.decode_tokens_per_s, 1 - kernel_ns / wall_ns if wall_ns else 0.0, list(steps)


class _RandomPrompts:
    """Token ids drawn uniformly from the vocabulary without its special tokens, the same in each run."""

    def __init__(self, runtime: Runtime) -> None:
        self._random = random.Random(0)
        self._tokenizer = runtime.tokenizer

    def next(self, count: int) -> list[int]:
        prompt: list[int] = []
        while len(prompt) < count:
            token = self._random.randrange(self._tokenizer.vocab_size)
            if not self._tokenizer.is_special(token):
                prompt.append(token)
        return prompt


def bytes_per_token(path: str) -> int:
    """Bytes of weights that one step reads: every tensor once, of an embedding that is not the head one
    row. Of neurons that a pack stores one by one nothing: how many fire is not known before."""
    from pi2rt.formats import open_model_file
    from pi2rt.models import describe
    from pi2rt.models.tensors import iterate_tensors

    with open_model_file(path) as file:
        model = describe(file)
        total = 0
        for name, shape in iterate_tensors(model):
            size = file.tensors[name].nbytes
            if file.tensors[name].layout == "neurons":
                continue
            total += size // shape[0] if name == model.embedding != model.head.weight else size
        return total


def _describe(result: Result) -> str:
    from pi2rt.cli._console import size

    bandwidth = f"{result.memory_bandwidth_bytes_per_s / 1e9:.1f} GB/s"
    flash = ""
    if result.flash_bandwidth_bytes_per_s:
        rate = f"{result.flash_bandwidth_bytes_per_s / 1e9:.2f} GB/s"
        flash += f", {size(result.streamed_bytes_per_token)} of flash at {rate}"
    if result.flash_reads_per_s:
        flash += f", {result.needed_reads_per_token:.0f} reads of neurons at {result.flash_reads_per_s:.0f}/s"
    kernels = f", kernels {result.kernels}" if result.kernels else ""
    lines = (
        f"{result.model}: executor {result.executor}{kernels}, {result.threads} threads",
        f"medians of {result.repeats}:",
        f"  prefill of {result.prefill_tokens} tokens: {result.prefill_tokens_per_s:.1f} tokens/s",
        f"  first token after {result.ttft_ms:.1f} ms",
        f"  decode of {result.decode_tokens} tokens: {result.decode_tokens_per_s:.1f} tokens/s, "
        f"spread {result.decode_spread:.1%}",
        *_flash_lines(result),
        f"  efficiency: {result.efficiency:.1%} of what {'memory and flash allow' if flash else 'memory allows'} "
        f"({size(result.bytes_per_token)} per token at {bandwidth}{flash})",
        f"  outside kernels: {result.runtime_overhead_fraction:.1%} of a decode step",
        f"load: {result.load_s:.2f} s; peak memory: {size(result.peak_rss_bytes)}",
    )
    return "\n".join(lines)


def _flash_lines(result: Result) -> Iterator[str]:
    from pi2rt.cli._console import size

    if result.flash_reads_per_s:
        yield (
            f"  neurons missing per token: mean {result.misses_per_token_mean:.0f} "
            f"({size(round(result.missed_bytes_per_token_mean))}), P99 {result.misses_per_token_p99:.0f} "
            f"({size(round(result.missed_bytes_per_token_p99))})"
        )
    if result.read_through_per_token:
        yield (
            f"  read through in gaps per token: {result.read_through_per_token:.0f} pages "
            f"({size(round(result.read_through_bytes_per_token))})"
        )
