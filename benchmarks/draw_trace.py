"""Draws a part of a trace as a picture: one row a track, one box a span.

    pi2rt run smollm2 -p "Why is the sky blue?" --max-tokens 32 --trace trace.json
    python benchmarks/draw_trace.py trace.json docs/trace.png --steps 2

Shows the last steps of the trace; ui.perfetto.dev shows all of it, with zoom. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "qkv": "#4e79a7",
    "attention": "#f28e2b",
    "out": "#76b7b2",
    "ffn": "#59a14f",
    "down": "#edc948",
    "head": "#b07aa1",
    "embed": "#ff9da7",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=2, help="how many of the last steps to show")
    options = parser.parse_args()
    events: list[dict[str, Any]] = json.loads(options.trace.read_text())["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    names = {
        (e["pid"], e["tid"]): f"{processes[e['pid']]}: {e['args']['name']}"
        for e in events
        if e["name"] == "thread_name"
    }
    spans = [e for e in events if e["ph"] == "X"]
    heads = sorted(e["ts"] + e["dur"] for e in spans if e["name"] == "head")
    threads = len({(e["pid"], e["tid"]) for e in spans if e["name"] == "head"})
    ends = heads[threads - 1 :: threads]
    begin, end = ends[-options.steps - 2], ends[-2]
    shown = [e for e in spans if e["ts"] + e["dur"] > begin and e["ts"] < end]
    rows = sorted({(e["pid"], e["tid"]) for e in shown}, key=lambda row: names[row])
    figure, axes = plt.subplots(figsize=(12, 0.55 * len(rows) + 1.2))
    for event in shown:
        kind = event["name"].split()[-1]
        left, right = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
        axes.barh(
            rows.index((event["pid"], event["tid"])),
            (right - left) / 1000,
            left=(left - begin) / 1000,
            height=0.8,
            color=COLOURS.get(kind, "#bab0ac"),
            linewidth=0,
        )
    axes.set_yticks(range(len(rows)), [names[row] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(
        handles,
        list(COLOURS),
        ncols=len(COLOURS),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
    figure.tight_layout()
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
