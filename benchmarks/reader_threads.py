"""One thread that submits reads, or several: reads per second, and what is left for decoding beside them.

    python benchmarks/reader_threads.py FILE [--model MODEL] [--page 4096] [--depth 128]

The same number of reads is in flight, divided among 1, 2 and 4 threads with a ring each, while the model decodes on all
cores. FILE: larger than the caches of the device, such as a pack. Each round measures all of them in turn; the table
has medians.
"""

from __future__ import annotations

import argparse
import threading
import time
from statistics import median

import pi2rt
from pi2rt.cython_kernels.flash.reader import measure

PROMPT = "The history of the world is"


def beside(
    engine: pi2rt.Engine, file: str, page: int, depth: int, threads: int, seconds: float
) -> tuple[float, float]:
    """(reads per second, tokens per second)"""
    found: list[float] = []

    def read() -> None:
        found.append(measure(file, page, depth // threads, seconds) / page)

    readers = [threading.Thread(target=read) for _ in range(threads)]
    for reader in readers:
        reader.start()
    begin, tokens = time.perf_counter(), 0
    while any(reader.is_alive() for reader in readers):
        tokens += len(engine.generate(PROMPT, max_tokens=20, temperature=0, ignore_eos=True).tokens)
    taken = time.perf_counter() - begin
    for reader in readers:
        reader.join()
    return sum(found), tokens / taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--page", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ways = [threads for threads in (1, 2, 4) if options.depth >= threads]
    reads: dict[int, list[float]] = {threads: [] for threads in ways}
    tokens: dict[int, list[float]] = {threads: [] for threads in ways}
    with pi2rt.Engine(options.model, context=256) as engine:
        engine.generate(PROMPT, max_tokens=8)
        for _ in range(options.rounds):
            for threads in ways:
                rate, speed = beside(
                    engine, options.file, options.page, options.depth, threads, options.seconds
                )
                reads[threads].append(rate)
                tokens[threads].append(speed)
    print("| threads that read | reads in flight of each | reads/s | tokens/s beside |\n|---|---|---|---|")
    for threads in ways:
        print(
            f"| {threads} | {options.depth // threads} | {median(reads[threads]):,.0f} "
            f"| {median(tokens[threads]):.1f} |"
        )


if __name__ == "__main__":
    main()
