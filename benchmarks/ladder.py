"""The ladder of PowerInfer-2 on a ReLU model with half its feed-forward weights on flash, against llama.cpp's mmap.

    python benchmarks/make_model.py bamboo-7b b7.gguf && pi2rt convert b7.gguf b7.pi2
    python benchmarks/ladder.py b7.gguf --pack b7.pi2 --peer /path/to/python-with-llama-cpp-python
    python benchmarks/ladder.py b7.gguf --pack b7.pi2 --prefill 512

Every rung, and llama.cpp, runs alone in a memory cgroup of the same size, page cache included: all weights but half
of the feed-forward ones, and ``--beside`` for KV cache, activations and the interpreter. Files start uncached; engines
take turns, ``--repeat`` times. Tokens are drawn at temperature 1, for a greedy text soon repeats itself and its
neurons. Needs root. Prints a Markdown table. Packs that are not given are made in ``--work``, and removed at the end.

Rungs: no bundles (a pack without them: matrices that do not fit are read whole for each token), bundles (neurons are
read for each token, gates known, reading and computing in turn), with the cache, with reading overlapped matrix by
matrix, and cluster by cluster with a look ahead (docs/design.md). ``efficiency``: of the law of docs/design.md
(``planner/laws.py``), bytes computed with over memory bandwidth, or what was missing at the rate that flash gives
at that size and depth, whichever is longer; flash is measured before and after each run, for it is shared with others.
Misses and reads are pages of neurons for each token; what was read in vain is no miss.

With ``--prefill``: so many tokens of prompt with half of all weights on flash, and with all of them in memory, each in
a group of what that takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from offload import HERE, measure

from pi2rt.cython_kernels.flash.reader import measure as measure_flash
from pi2rt.formats import open_model_file
from pi2rt.host.topology import read_topology
from pi2rt.models import describe, iterate_tensors
from pi2rt.planner.laws import STREAM_DEPTH, STREAM_READ_BYTES, DecodeUse, Rates, bound_s
from pi2rt.planner.measure.device_profile import measure_device
from pi2rt.planner.pack.convert import convert
from pi2rt.planner.placement import default_placement
from pi2rt.runtime.flash_reads import FlashReads

PAGE = 4096
NEURON_DEPTH = FlashReads().neuron_depth


@dataclass(frozen=True, slots=True)
class Rung:
    """``bundles``: of the pack; ``options``: of ``open_runtime``."""

    name: str
    bundles: bool
    options: dict[str, Any]


RUNGS = (
    Rung("no bundles", False, {}),
    Rung("bundles", True, {"cache": "off", "pipeline": "none"}),
    Rung("+ cache", True, {"pipeline": "none"}),
    Rung("+ matrix pipeline", True, {"pipeline": "matrix"}),
    Rung("+ cluster pipeline", True, {"pipeline": "cluster"}),
)


COLUMNS = (
    "| tokens/s | over llama.cpp | ms per token: mean / P50 / P90 / P99 | misses: mean / P99 | reads: mean / P99 "
    "| from flash | waiting for flash | efficiency | peak |",
    "|---" * 9 + "|",
)
"""Of what ``row`` gives behind the name: the heads, and the line below."""


def feed_forward_bytes(path: str) -> tuple[int, int]:
    """(bytes of all weights, of those the feed-forward ones), as a GGUF file has them."""
    with open_model_file(path) as file:
        model = describe(file)
        names = {
            linear.weight
            for block in model.feed_forwards()
            for linear in (block.gate, block.up, block.down)
            if linear is not None
        }
        total = sum(file.tensors[name].nbytes for name, _ in iterate_tensors(model))
        return total, sum(file.tensors[name].nbytes for name in names)


def flash_rates(pack: str, seconds: float = 0.5) -> tuple[float, float]:
    """(bytes/s of large reads in order, reads/s of pages of neurons, 0 where the pack has none): flash as it is now."""
    with open_model_file(pack) as file:
        page = max((each.page_bytes for each in file.bundles.values()), default=0)
    reads = measure_flash(pack, page, NEURON_DEPTH, seconds) / page if page else 0.0
    return measure_flash(pack, STREAM_READ_BYTES, STREAM_DEPTH, seconds, "auto", "sequential"), reads


@contextmanager
def packs(options: argparse.Namespace, wanted: set[bool]) -> Iterator[dict[bool, str]]:
    """The packs of a GGUF file by whether they have bundles: those that were given, the others made for this run."""
    found = {True: options.pack, False: options.dense_pack}
    with TemporaryDirectory(prefix="pi2rt-ladder-", dir=options.work) as folder:
        for bundles in wanted:
            if found[bundles] is None:
                found[bundles] = str(Path(folder, f"{'neurons' if bundles else 'dense'}.pi2"))
                print(f"converting {options.gguf} to {found[bundles]}", file=sys.stderr, flush=True)
                convert(options.gguf, found[bundles], bundles="relu" if bundles else "off")
        yield found


def row(name: str, runs: list[dict[str, Any]], theirs: float, limit: int, bandwidth: float) -> str:
    def middle(key: str) -> float:
        return median(run.get(key, 0.0) for run in runs)

    def used(key: str) -> float:
        return median(run["use"][key] for run in runs)

    token_s = middle("mean_ms") / 1e3
    bound = median(bound_s(DecodeUse(**run["use"]), Rates(bandwidth, *run["flash"])) for run in runs)
    latency = " / ".join(f"{middle(key):.0f}" for key in ("mean_ms", "p50_ms", "p90_ms", "p99_ms"))
    neurons = used("reads_mean") > 0
    cells = (
        name,
        f"{1 / token_s:.2f}",
        f"{1 / token_s / theirs:.1f}" if theirs else "",
        latency,
        f"{used('misses_mean'):.0f} / {used('misses_p99'):.0f} ({used('miss_share'):.1%})" if neurons else "",
        f"{used('reads_mean'):.0f} / {used('reads_p99'):.0f}" if neurons else "",
        f"{middle('flash_bytes') / 1e6:.0f} MB",
        f"{middle('flash_wait'):.0%}",
        f"{bound / token_s:.2f}",
        f"{max(run['peak'] for run in runs) / limit:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def child(pack: str, options: argparse.Namespace, more: dict[str, Any]) -> list[str]:
    context = max(options.context, (options.prefill or 0) + 2)
    arguments = [str(options.threads), str(context), "1", json.dumps(more)]
    return [sys.executable, str(HERE / "pi2rt_child.py"), pack, *arguments]


def decode(options: argparse.Namespace) -> None:
    total, feed_forward = feed_forward_bytes(options.gguf)
    limit = (total - feed_forward // 2 + (options.beside << 20)) // PAGE * PAGE
    bandwidth = measure_device(default_placement(read_topology())).read_bandwidth
    work = {
        "what": "decode",
        "context": 16,
        "tokens": options.tokens,
        "sampling": {"temperature": 1.0},
    }
    peer_work = work | {"tokens": options.peer_tokens}
    chosen = [RUNGS[number] for number in options.rungs]
    runs: dict[str, list[dict[str, Any]]] = {rung.name: [] for rung in chosen}
    theirs = []
    with packs(options, {rung.bundles for rung in chosen}) as pack_of:
        for _ in range(options.repeat):
            peer = [options.peer, str(HERE / "llama_cpp_child.py"), options.gguf]
            peer += [str(options.threads), str(options.context), "1", "mapped"]
            theirs.append(measure(peer, limit, [options.gguf], peer_work, 1).get("tokens_per_s", 0.0))
            for rung in chosen:
                pack = pack_of[rung.bundles]
                before = flash_rates(pack)
                got = measure(child(pack, options, {"memory": limit} | rung.options), limit, [pack], work, 1)
                if "failed" in got:
                    raise SystemExit(f"{rung.name}: {got['failed']}")
                both = zip(before, flash_rates(pack), strict=True)
                runs[rung.name].append(got | {"flash": tuple((a + b) / 2 for a, b in both)})
    other = median(theirs)
    stream, reads = (
        max(median(run["flash"][kind] for run in each) for each in runs.values()) for kind in (0, 1)
    )
    print(
        f"{Path(options.gguf).name}, half of its {feed_forward / 1e9:.2f} GB of feed-forward weights on "
        f"flash: a memory of {limit / 1e6:.0f} MB for {total / 1e6:.0f} MB; {options.threads} threads, "
        f"{options.tokens} tokens, medians of {options.repeat}, alternating; memory {bandwidth / 1e9:.1f} GB/s, "
        f"flash {stream / 1e9:.2f} GB/s in order, {reads / 1e3:.0f},000 reads/s of neurons at depth {NEURON_DEPTH}\n\n"
        f"llama.cpp, mapped: {f'{other:.3f} tokens/s' if other else 'did not run'}\n\n"
        f"| {COLUMNS[0]}\n|---{COLUMNS[1]}"
    )
    for name, each in runs.items():
        print(row(name, each, other, limit, bandwidth))


def prefill(options: argparse.Namespace) -> None:
    total, _ = feed_forward_bytes(options.gguf)
    beside = options.beside << 20
    limits = {
        "half on flash": (total // 2 + beside) // PAGE * PAGE,
        "in memory": (total + beside + total // 20) // PAGE * PAGE,  # packs are a little larger
    }
    work = {"what": "prefill", "tokens": options.prefill}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in limits}
    with packs(options, {True}) as pack_of:
        for _ in range(options.repeat):
            for name, limit in limits.items():
                command = child(pack_of[True], options, {"memory": limit})
                got = measure(command, limit, [pack_of[True]], work, 1)
                if "failed" in got:
                    raise SystemExit(f"{name}: {got['failed']}")
                runs[name].append(got)
    half, whole = ([run["tokens_per_s"] for run in each] for each in runs.values())
    ratio = median(a / b for a, b in zip(half, whole, strict=True))
    print(
        f"{Path(options.gguf).name}, {total / 1e6:.0f} MB, {options.threads} threads, prefill of {options.prefill} "
        f"tokens, medians of {options.repeat}, alternating; half on flash over in memory: {ratio:.2f}\n\n"
        "| | memory | tokens/s | from flash | waiting for flash | peak |\n|---|---|---|---|---|---|"
    )
    for name, each in runs.items():
        cells = (
            name,
            f"{limits[name] / 1e6:.0f} MB",
            f"{median(run['tokens_per_s'] for run in each):.1f}",
            f"{median(run.get('flash_bytes_all', 0) for run in each) / 1e6:.0f} MB",
            f"{median(run.get('flash_wait', 0) for run in each):.0%}",
            f"{max(run['peak'] for run in each) / limits[name]:.3f}",
        )
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf")
    parser.add_argument("--pack", help="of the model, with bundles (default: made for this run)")
    parser.add_argument("--dense-pack", help="of the model, without bundles (default: made for this run)")
    parser.add_argument("--work", help="a folder for packs that are made (default: the temporary one)")
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
    parser.add_argument(
        "--prefill", type=int, metavar="N", help="measure prefill of N tokens, half on flash and in memory"
    )
    options = parser.parse_args()
    if any(not 0 <= number < len(RUNGS) for number in options.rungs):
        parser.error(f"--rungs: numbers from 0 to {len(RUNGS) - 1}")
    (prefill if options.prefill else decode)(options)


if __name__ == "__main__":
    main()
