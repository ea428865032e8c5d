"""What a contended core is worth: a full core alone, and beside one that has a CPU quota.

    python benchmarks/little_core.py [MODEL] [--quota 0.3] [--periods 0.1 0.01]

"big" is one core. "little" is another one, as an assistant; a quota imitates a slower or contended core. Each round
measures all ways one after another; the table has medians of tokens per second, and of the ratios to the full core
alone in the same round. Needs root and two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import AbstractContextManager, nullcontext
from statistics import median

from cpu_group import cpu_quota, threads_named

import pi2rt

PROMPT = "The history of the world is"


def speed(engine: pi2rt.Engine, tokens: int) -> tuple[float, str]:
    begin = time.perf_counter()
    result = engine.generate(PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True)
    return tokens / (time.perf_counter() - begin), result.text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--quota", type=float, default=0.3, help="share of the little core")
    parser.add_argument("--periods", type=float, nargs="*", default=[0.1, 0.01], help="of the quota, seconds")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    big, little = sorted(os.sched_getaffinity(0))[:2]
    ways: dict[str, tuple[dict[str, list[int]], float | None]] = {"big": ({"big": [big]}, None)}
    both = {"big": [big], "little": [little]}
    for period in options.periods:
        ways[f"big, and little at {options.quota:.0%} of each {period * 1e3:g} ms"] = (both, period)
    ways["big and little"] = (both, None)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, float] = {}
    texts = set()
    for _ in range(options.rounds):
        for name, (cores, period) in ways.items():
            with pi2rt.Engine(options.model, cores=cores, context=1024) as engine:
                slow: AbstractContextManager[None] = nullcontext()
                if period is not None:
                    slow = cpu_quota(threads_named("pi2rt/1"), options.quota, period)
                with slow:
                    speed(engine, 16)
                    rate, text = speed(engine, options.tokens)
                threads = [
                    thread
                    for actor in engine.statistics().actors[:1]
                    for thread in actor.executor.threads
                    if thread.actor != "flash"
                ]
                shares[name] = sum(each.row_blocks for each in threads[1:]) / sum(
                    each.row_blocks for each in threads
                )
                rates[name].append(rate)
                texts.add(text)
    print("| cores | tokens/s | over big alone | row blocks of little |\n|---|---|---|---|")
    for name, each in rates.items():
        ratio = median(rate / alone for rate, alone in zip(each, rates["big"], strict=True))
        print(f"| {name} | {median(each):.1f} | {ratio:.2f} | {shares[name]:.0%} |")
    print(f"\ntexts: {'all the same' if len(texts) == 1 else 'NOT the same'}")


if __name__ == "__main__":
    main()
