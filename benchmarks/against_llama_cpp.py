"""pi2rt against llama.cpp on one file: both loaded once, asked in turn, medians of the ratios.

    python benchmarks/against_llama_cpp.py MODEL.gguf --peer /path/to/python-with-llama-cpp-python

The baseline's Python may be another environment; build llama-cpp-python there from source, natively. Prints a Markdown
table. llama.cpp is timed for evaluation alone; pi2rt for everything a user waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent


class Child:
    def __init__(self, python: str, script: str, *arguments: object) -> None:
        command = [python, str(HERE / script), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args!r} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--peer", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="rows to run: decode prefill long batch")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill row")
    parser.add_argument("--activations", choices=("int16", "mixed", "int8"), default="mixed", help="of pi2rt")
    options = parser.parse_args()
    rows: dict[str, tuple[str, dict[str, Any]]] = {
        "decode": ("decode 128 tokens after 64", {"what": "decode", "context": 64, "tokens": 128}),
        "prefill": (f"prefill of {options.prefill}", {"what": "prefill", "tokens": options.prefill}),
        "long": ("decode 32 tokens after 4096", {"what": "decode", "context": 4096, "tokens": 32}),
        "batch": (
            "decode 8 sequences, 64 tokens after 64",
            {"what": "decode", "context": 64, "tokens": 64, "sequences": 8},
        ),
    }
    chosen = {key: row for key, row in rows.items() if options.only is None or key in options.only}
    context = 4352 if "long" in chosen else 2048
    more = json.dumps({"activations": options.activations})
    ours = Child(sys.executable, "pi2rt_child.py", options.model, options.threads, context, 8, more)
    peer = Child(options.peer, "llama_cpp_child.py", options.model, options.threads, context, 8)
    print(
        f"{Path(options.model).name}, {options.threads} threads, {options.activations} activations, "
        f"medians of {options.repeat}, alternating; "
        f"pi2rt {ours.start['version']}, llama-cpp-python {peer.start['version']}\n"
    )
    print(
        "| work | pi2rt tokens/s | llama.cpp tokens/s | ratio | outside kernels |\n|---|---|---|---|---|",
        flush=True,
    )
    gains: dict[str, list[tuple[float, ...]]] = {}
    last: dict[str, Any] = {}
    for key, (label, command) in chosen.items():
        ours.ask(command)  # first touches of memory
        peer.ask(command)
        mine, theirs, outside = [], [], []
        for _ in range(options.repeat):
            last = ours.ask(command)
            mine.append(last["tokens_per_s"])
            outside.append(last.get("outside_kernels", float("nan")))
            theirs.append(peer.ask(command)["tokens_per_s"])
            if key in ("long", "batch"):  # against one short sequence, asked beside it: the machine drifts
                base = rows["decode"][1]
                gains.setdefault(key, []).append(
                    tuple(
                        here / child.ask(base)["tokens_per_s"]
                        for child, here in ((ours, mine[-1]), (peer, theirs[-1]))
                    )
                )
        ratio = median(a / b for a, b in zip(mine, theirs, strict=True))
        share = f"{median(outside):.1%}" if command["what"] == "decode" else ""
        print(f"| {label} | {median(mine):.1f} | {median(theirs):.1f} | {ratio:.2f} | {share} |", flush=True)
    for key, label in ("long", "4096 of context over 64"), ("batch", "8 sequences over one"):
        if key in gains:
            ours_gain, peer_gain = (median(pair[i] for pair in gains[key]) for i in range(2))
            print(f"| {label} | {ours_gain:.2f} | {peer_gain:.2f} | {ours_gain / peer_gain:.2f} | |")
    size = os.path.getsize(options.model)
    peak = last.get("peak_rss", 0)
    print(
        f"\nload {ours.start['load_s']:.2f} s (llama.cpp {peer.start['load_s']:.2f} s, mapped); "
        f"peak memory {peak / 1e6:.0f} MB, "
        f"{peak / size:.2f} of the file's {size / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
