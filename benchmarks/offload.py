"""Models larger than their memory: pi2rt on a pack against llama.cpp's mmap on the GGUF, in the same memory cgroup.

    pi2rt convert MODEL.gguf MODEL.pi2
    python benchmarks/offload.py MODEL.gguf MODEL.pi2 --budgets 0.9 0.6 --peer /path/to/python-with-llama-cpp-python

Each engine runs alone in a group of that share of the GGUF's size, page cache included, starting with the file
uncached; they take turns. Needs root. llama.cpp keeps its weights in the mapped file, for the copies it would make
of them do not fit. Prints a Markdown table. ``efficiency`` is the bound over what a token took; the bound is the law
of docs/design.md: bytes in memory over memory bandwidth, or bytes read over flash bandwidth, whichever is longer,
both measured before (``planner/laws.py``). Above 1: what is read again and again comes faster than the
whole file did, from caches below this machine."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from memory_group import forget, memory_group

from pi2rt.cython_kernels.flash.reader import measure as measure_flash
from pi2rt.host.topology import read_topology
from pi2rt.planner.laws import STREAM_DEPTH, STREAM_READ_BYTES, DecodeUse, Rates, bound_s
from pi2rt.planner.measure.device_profile import measure_device
from pi2rt.planner.placement import default_placement

HERE = Path(__file__).parent


def measure(
    command: list[str], limit: int, files: list[str], work: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Runs a child in a group of ``limit`` bytes: first one warming round, then ``rounds``; the
    warming one counts where there are no others. Where tokens are drawn, each round draws others: a cache may
    hold all that a text needs which it has seen just before."""
    forget(*files)
    with memory_group(limit) as group:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=group.enter
        )
        assert process.stdin is not None
        assert process.stdout is not None
        answers = []
        start = process.stdout.readline()
        for number in range(rounds + 1):
            if not start:
                break
            if "sampling" in work:
                work = work | {"sampling": work["sampling"] | {"seed": number}}
            process.stdin.write(json.dumps(work) + "\n")
            process.stdin.flush()
            if not (line := process.stdout.readline()):
                break
            answers.append(json.loads(line))
        process.stdin.close()
        status = process.wait()
        peak = group.peak()
    if len(answers) <= rounds:
        return {"failed": f"ended with status {status}", "peak": peak}
    last = answers[-1]
    return {**last, "tokens_per_s": median(a["tokens_per_s"] for a in answers[1:] or answers), "peak": peak}


def neuron_reads_per_s(pack: str, run: dict[str, Any]) -> float:
    """That flash gives, as a run of pi2rt read neurons."""
    return measure_flash(pack, run["page_bytes"], run["depth"], 1.0) / run["page_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf")
    parser.add_argument("pack")
    parser.add_argument("--peer", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.9, 0.6], help="shares of the GGUF's size"
    )
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="measurements in each run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--io", default="auto")
    options = parser.parse_args()
    size = os.path.getsize(options.gguf)
    work = {"what": "decode", "context": 16, "tokens": options.tokens}
    memory_bandwidth = measure_device(default_placement(read_topology())).read_bandwidth
    flash_bandwidth = measure_flash(
        options.pack, STREAM_READ_BYTES, STREAM_DEPTH, 3.0, options.io, "sequential"
    )
    print(
        f"{Path(options.gguf).name}, {size / 1e6:.0f} MB, {options.threads} threads, "
        f"decode of {options.tokens} tokens, medians of {options.repeat} runs, alternating, cold page cache; "
        f"memory {memory_bandwidth / 1e9:.1f} GB/s, flash {flash_bandwidth / 1e9:.2f} GB/s\n\n"
        "| memory | pi2rt tokens/s | llama.cpp tokens/s | ratio | read per token | waiting for flash | efficiency "
        "| peak |\n"
        "|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for share in options.budgets:
        limit = int(size * share) // 4096 * 4096
        mine, theirs, last = [], [], {}
        for _ in range(options.repeat):
            arguments = [str(options.threads), str(options.context), "1"]
            more = json.dumps({"memory": limit, "io": options.io})
            ours = [sys.executable, str(HERE / "pi2rt_child.py"), options.pack, *arguments, more]
            peer = [
                options.peer,
                str(HERE / "llama_cpp_child.py"),
                options.gguf,
                *arguments,
                "mapped",
            ]
            last = measure(ours, limit, [options.pack], work, options.rounds)
            other = measure(peer, limit, [options.gguf], work, options.rounds)
            if "failed" in last:
                break
            mine.append(last["tokens_per_s"])
            theirs.append(other.get("tokens_per_s", 0.0))
        if not mine:
            print(f"| {share:.0%} | {last['failed']} | | | | | | |", flush=True)
            continue
        ratio = (
            f"{median(a / b for a, b in zip(mine, theirs, strict=True)):.1f}"
            if all(theirs)
            else "llama.cpp failed"
        )
        token_s = 1 / median(mine)
        use = DecodeUse(**last["use"])
        rates = Rates(memory_bandwidth, flash_bandwidth)
        if use.reads_mean:
            rates = replace(rates, flash_reads=neuron_reads_per_s(options.pack, last))
        bound = bound_s(use, rates)
        print(
            f"| {share:.0%} = {limit / 1e6:.0f} MB | {median(mine):.2f} | {median(theirs):.2f} | {ratio} | "
            f"{last['flash_bytes'] / 1e6:.0f} MB | {last['flash_wait']:.0%} | {bound / token_s:.2f} | "
            f"{last['peak'] / limit:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
