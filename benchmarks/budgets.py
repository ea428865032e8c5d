"""A mixture of experts in several budgets, each far below its size, against llama.cpp's mmap on the same shape.

    python benchmarks/make_model.py turbosparse-mixtral-47b mixtral.gguf
    python benchmarks/make_model.py turbosparse-mixtral-47b mixtral.pi2
    python benchmarks/budgets.py mixtral.gguf mixtral.pi2 --peer /path/to/python-with-llama-cpp-python

Each engine runs alone in a memory cgroup of the budget, page cache included, starting with its file uncached; they take
turns, ``--repeat`` times at each budget. Tokens are drawn at temperature 1. Needs root, and 53 GB of disk for the two
files. Prints a Markdown table; its columns are those of ladder.py, and the first is the budget.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from ladder import COLUMNS, child, flash_rates, row
from offload import HERE, measure

from pi2rt.host.topology import read_topology
from pi2rt.planner.measure.device_profile import measure_device
from pi2rt.planner.placement import default_placement


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf")
    parser.add_argument("pack")
    parser.add_argument("--peer", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--budgets", type=float, nargs="+", default=[7, 10, 13, 16, 19], help="GB")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--peer-tokens", type=int, default=3, help="0: llama.cpp is not measured")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    options.prefill = None
    bandwidth = measure_device(default_placement(read_topology())).read_bandwidth
    sampling = {"temperature": 1.0}
    work = {"what": "decode", "context": 16, "tokens": options.tokens, "sampling": sampling}
    peer_work = work | {"tokens": options.peer_tokens}
    print(
        f"{Path(options.gguf).name}, {os.path.getsize(options.gguf) / 1e9:.1f} GB, {options.threads} threads, "
        f"decode of {options.tokens} tokens, medians of {options.repeat}; memory {bandwidth / 1e9:.1f} GB/s\n\n"
        f"| memory | llama.cpp tokens/s {COLUMNS[0]}\n|---|---{COLUMNS[1]}",
        flush=True,
    )
    for budget in options.budgets:
        limit = int(budget * 1e9) // 4096 * 4096
        mine: list[dict[str, Any]] = []
        theirs = []
        for _ in range(options.repeat):
            before = flash_rates(options.pack)
            got = measure(child(options.pack, options, {"memory": limit}), limit, [options.pack], work, 1)
            if "failed" in got:
                raise SystemExit(f"{budget:g} GB: {got['failed']}")
            both = zip(before, flash_rates(options.pack), strict=True)
            mine.append(got | {"flash": tuple((a + b) / 2 for a, b in both)})
            peer = [options.peer, str(HERE / "llama_cpp_child.py"), options.gguf]
            peer += [str(options.threads), str(options.context), "1", "mapped"]
            if options.peer_tokens:
                theirs.append(measure(peer, limit, [options.gguf], peer_work, 0).get("tokens_per_s", 0.0))
        other = median(theirs) if theirs else 0.0
        name = f"{budget:g} GB | {f'{other:.3f}' if other else 'did not run' if theirs else 'not measured'}"
        print(row(name, mine, other, limit, bandwidth), flush=True)


if __name__ == "__main__":
    main()
