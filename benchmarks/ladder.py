"""The ladder of PowerInfer-2 on a ReLU model with half its feed-forward weights on flash, against llama.cpp's mmap.

    python benchmarks/make_model.py bamboo-7b b7.gguf && pi2rt convert b7.gguf b7.pi2
    python benchmarks/ladder.py b7.gguf b7.pi2 --peer /path/to/python-with-llama-cpp-python

Every rung, and llama.cpp, runs alone in a memory cgroup of the same size, page cache included: all weights but half
of the feed-forward ones, and ``--beside`` for KV cache, activations and the interpreter. Files start uncached; engines
take turns, ``--repeat`` times. Tokens are drawn at temperature 1, for a greedy text soon repeats itself and its
neurons. Needs root. Prints a Markdown table.

Rungs: no cache (neurons are read for each token, gates known, reading and computing in turn), with the cache, with
reading overlapped matrix by matrix, and cluster by cluster with a look ahead (docs/design.md). ``bound``: the law of
docs/design.md (``planner/decode_law.py``), bytes computed with over memory bandwidth or needed reads over the reads per
second that flash gives at that size and depth, whichever is longer; flash is measured before and after each run, for it
is shared with others. Misses and reads are pages of neurons for each token; what was read in vain is no miss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from offload import HERE, measure

from pi2rt.cython_kernels.flash import measure as measure_flash
from pi2rt.executors.neurons import DEPTH
from pi2rt.formats import open_model_file
from pi2rt.models import FeedForward, describe, iterate_tensors
from pi2rt.planner.decode_law import DecodeUse, Rates, bound_s
from pi2rt.planner.device_profile import measure_device
from pi2rt.planner.placement import default_placement
from pi2rt.runtime.topology import read_topology

RUNGS: dict[str, dict[str, Any]] = {
    "no cache, no pipeline": {"cache": "off", "pipeline": "none"},
    "+ cache": {"pipeline": "none"},
    "+ matrix pipeline": {"pipeline": "matrix"},
    "+ cluster pipeline": {"pipeline": "cluster"},
}
PAGE = 4096


def feed_forward_bytes(path: str) -> tuple[int, int]:
    """(bytes of all weights, of those the feed-forward ones), as a GGUF file has them."""
    with open_model_file(path) as file:
        model = describe(file)
        blocks = [block for layer in model.layers for block in layer.blocks if isinstance(block, FeedForward)]
        names = {
            linear.weight
            for block in blocks
            for linear in (block.gate, block.up, block.down)
            if linear is not None
        }
        total = sum(file.tensors[name].nbytes for name, _ in iterate_tensors(model))
        return total, sum(file.tensors[name].nbytes for name in names)


def row(name: str, runs: list[dict[str, Any]], theirs: float, limit: int, bandwidth: float) -> str:
    def middle(key: str) -> float:
        return median(run.get(key, 0.0) for run in runs)

    def used(key: str) -> float:
        return median(run["use"][key] for run in runs)

    token_s = middle("mean_ms") / 1e3
    bound = median(bound_s(DecodeUse(**run["use"]), Rates(bandwidth, *run["flash"])) for run in runs)
    latency = " / ".join(f"{middle(key):.0f}" for key in ("mean_ms", "p50_ms", "p90_ms", "p99_ms"))
    cells = (
        name,
        f"{1 / token_s:.2f}",
        f"{1 / token_s / theirs:.1f}" if theirs else "-",
        latency,
        f"{used('misses_mean'):.0f} / {used('misses_p99'):.0f} ({used('miss_share'):.1%})",
        f"{used('reads_mean'):.0f} / {used('reads_p99'):.0f}",
        f"{middle('flash_wait'):.0%}",
        f"{bound / token_s:.2f}",
        f"{max(run['peak'] for run in runs) / limit:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf")
    parser.add_argument("pack")
    parser.add_argument("--peer", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--beside", type=int, default=200, help="MiB beside the weights (default: 200)")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--peer-tokens", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--rungs", type=int, nargs="+", default=list(range(len(RUNGS))), help="by number, from 0"
    )
    options = parser.parse_args()
    total, feed_forward = feed_forward_bytes(options.gguf)
    limit = (total - feed_forward // 2 + (options.beside << 20)) // PAGE * PAGE
    bandwidth = measure_device(default_placement(read_topology())).read_bandwidth
    arguments = [str(options.threads), str(options.context), "1"]
    work = {
        "what": "decode",
        "context": 16,
        "tokens": options.tokens,
        "sampling": {"temperature": 1.0, "seed": 1},
    }
    peer_work = work | {"tokens": options.peer_tokens}
    chosen = [list(RUNGS.items())[number] for number in options.rungs]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in chosen}
    theirs = []

    def iops() -> float:
        return measure_flash(options.pack, PAGE, DEPTH, 1.0) / PAGE

    for _ in range(options.repeat):
        peer = [options.peer, str(HERE / "llama_cpp_child.py"), options.gguf, *arguments, "mapped"]
        theirs.append(measure(peer, limit, [options.gguf], peer_work, 1).get("tokens_per_s", 0.0))
        for name, more in chosen:
            command = [sys.executable, str(HERE / "pi2rt_child.py"), options.pack, *arguments]
            before = iops()
            got = measure([*command, json.dumps({"memory": limit} | more)], limit, [options.pack], work, 1)
            if "failed" in got:
                raise SystemExit(f"{name}: {got['failed']}")
            runs[name].append(got | {"flash": (0.0, (before + iops()) / 2)})
    other = median(theirs)
    flash = median(run["flash"][1] for each in runs.values() for run in each)
    print(
        f"{Path(options.gguf).name} (synthetic), half of its {feed_forward / 1e9:.2f} GB of feed-forward weights on "
        f"flash: a memory of {limit / 1e6:.0f} MB for {total / 1e6:.0f} MB; {options.threads} threads, "
        f"{options.tokens} tokens, medians of {options.repeat}, alternating; memory {bandwidth / 1e9:.1f} GB/s, "
        f"flash {flash / 1e3:.0f},000 reads/s of 4 KiB at depth {DEPTH}\n\n"
        f"llama.cpp, mapped: {other:.3f} tokens/s\n\n"
        "| | tokens/s | over llama.cpp | ms per token: mean / P50 / P90 / P99 | misses: mean / P99 | reads: mean / P99 "
        "| waiting for flash | efficiency | peak |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, each in runs.items():
        print(row(name, each, other, limit, bandwidth))


if __name__ == "__main__":
    main()
