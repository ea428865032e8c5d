"""A read error in the middle of decoding: how long until the next answer begins.

    python benchmarks/recovery.py PACK [--memory 2.4G] [--rounds 5]

The pack is served by a FUSE file system that fails reads when it is told to, so it needs FUSE and a system that permits
mounting. Each round: a request fails with the error, the disk works again, and the next request is sent at once. The
table has the time from the error, as the program sees it, to the first token of that answer, and the time to the first
token of the same request when nothing has failed.
"""

from __future__ import annotations

import argparse
import errno
import sys
import time
from pathlib import Path
from statistics import median

import trio

import pi2rt

sys.path.append(str(Path(__file__).resolve().parent.parent))
from tests.support.faulty_disk import FaultyDisk

PROMPT = [1, 17]


async def first_token(runtime: pi2rt.Runtime) -> float:
    begin = time.perf_counter()
    await runtime.generate(PROMPT, max_tokens=1, ignore_eos=True)
    return time.perf_counter() - begin


async def measure(path: Path, memory: str, rounds: int) -> None:
    undisturbed, recovered = [], []
    loads: list[int] = []
    with FaultyDisk(path) as disk:
        async with pi2rt.open_runtime(
            disk.path, memory=memory, context=512, max_sequences=1, on_load=lambda done, _: loads.append(done)
        ) as runtime:
            await runtime.generate(PROMPT, max_tokens=8, ignore_eos=True)
            opened = len(loads)
            for _ in range(rounds):
                undisturbed.append(await first_token(runtime))
                disk.fail(errno.EIO)
                try:
                    await runtime.generate(PROMPT, max_tokens=400, ignore_eos=True)
                except pi2rt.ExecutorError as error:
                    what = str(error)
                else:
                    raise SystemExit("no read failed: everything is in memory; take a smaller --memory")
                began = time.perf_counter()
                disk.work()
                await first_token(runtime)
                recovered.append(time.perf_counter() - began)
            again = len(loads) - opened
    print(f"the error: {what}\n")
    print("| | seconds to the first token: median | longest |\n|---|---|---|")
    for name, each in (("after an error", recovered), ("undisturbed", undisturbed)):
        print(f"| {name} | {median(each):.3f} | {max(each):.3f} |")
    print(f"\nweights loaded again: {'no' if not again else f'yes, {again} reports'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("--memory", default="2.4G")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trio.run(measure, options.pack, options.memory, options.rounds)


if __name__ == "__main__":
    main()
