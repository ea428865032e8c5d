"""Draws a part of a trace as a picture: one row a track, one box a span, one area a counter.

    pi2rt run smollm2 -p "Why is the sky blue?" --max-tokens 32 --trace trace.json
    python benchmarks/draw_trace.py trace.json docs/trace.png --steps 2

    pi2rt run b7.pi2 --memory 2576M -p "Once upon a time" --raw --max-tokens 10 --temperature 1 --trace trace.json
    python benchmarks/draw_trace.py trace.json docs/decode-step.png --steps 1 --only cpu flash --layers 15 17

Shows a few steps of the trace, and below them, with ``--layers``, a few layers of the last one; ui.perfetto.dev shows
all of it, with zoom. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "qkv": "#4e79a7",
    "attention": "#f28e2b",
    "out": "#76b7b2",
    "ffn": "#59a14f",
    "down": "#edc948",
    "head": "#b07aa1",
    "embed": "#ff9da7",
    "neurons": "#9c755f",
    "wait": "#e15759",
}
"""By the last word of a span's name."""

OTHER = "#bab0ac"

Event: TypeAlias = dict[str, Any]
Row: TypeAlias = tuple[int, int | str]
"""(process, thread) of spans; (process, name) of a counter."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What is shown. ``names``: of each row, in order from the top."""

    spans: Sequence[Event]
    counters: Sequence[Event]
    names: dict[Row, str]

    @staticmethod
    def of(events: Sequence[Event], processes_shown: Sequence[str]) -> Picture:
        processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        shown = [pid for pid, name in processes.items() if not processes_shown or name in processes_shown]
        threads: list[tuple[str, Row]] = [
            (f"{processes[e['pid']]}: {e['args']['name']}", (e["pid"], e["tid"]))
            for e in events
            if e["name"] == "thread_name" and e["pid"] in shown
        ]
        counters = [e for e in events if e["ph"] == "C" and e["pid"] in shown]
        curves: list[tuple[str, Row]] = [
            (f"{processes[pid]}: {name}", (pid, name))
            for pid, name in sorted({(e["pid"], e["name"]) for e in counters})
        ]
        spans = [e for e in events if e["ph"] == "X" and e["pid"] in shown]
        names = {row: name for name, row in [*sorted(threads), *curves]}
        return Picture(spans, counters, names)

    def between(self, begin: float, end: float) -> Picture:
        spans = [e for e in self.spans if e["ts"] + e["dur"] > begin and e["ts"] < end]
        used = {(e["pid"], e["tid"]) for e in spans} | {(e["pid"], e["name"]) for e in self.counters}
        return Picture(spans, self.counters, {row: name for row, name in self.names.items() if row in used})

    def draw(self, axes: Axes, begin: float, end: float) -> None:
        rows = list(self.names)
        for event in sorted(self.spans, key=lambda event: -event["dur"]):  # what is within another lies on it
            kind = event["name"].split()[-1]
            left, right = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
            axes.barh(
                rows.index((event["pid"], event["tid"])),
                (right - left) / 1000,
                left=(left - begin) / 1000,
                height=0.8,
                color=COLOURS.get(kind, OTHER),
                linewidth=0,
            )
        for number, row in enumerate(rows):
            curve = [e for e in self.counters if (e["pid"], e["name"]) == row]
            if not curve:
                continue
            most = max(e["args"]["value"] for e in curve) or 1
            before = [e["args"]["value"] for e in curve if e["ts"] <= begin]
            inside = [(e["ts"], e["args"]["value"]) for e in curve if begin < e["ts"] < end]
            points = [(begin, before[-1] if before else 0), *inside]
            points.append((end, points[-1][1]))
            base = number + 0.4
            axes.fill_between(
                [(at - begin) / 1000 for at, _ in points],
                base,
                [base - 0.8 * value / most for _, value in points],
                step="post",
                color=COLOURS["neurons"],
                linewidth=0,
            )
        labels = [
            f"{name} (of {max(e['args']['value'] for e in self.counters if (e['pid'], e['name']) == row):.0f})"
            if isinstance(row[1], str)
            else name
            for row, name in self.names.items()
        ]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_xlim(0, (end - begin) / 1000)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("milliseconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--steps", type=int, default=2, help="how many steps to show (default: 2)")
    parser.add_argument("--last", type=int, help="the last one to show, from 1 (default: the last but one)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="processes to show (default: all)"
    )
    parser.add_argument(
        "--layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="of the last step, once more below"
    )
    options = parser.parse_args()
    events: list[Event] = json.loads(options.trace.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    heads = sorted(e["ts"] + e["dur"] for e in spans if e["name"] == "head")
    threads = len({(e["pid"], e["tid"]) for e in spans if e["name"] == "head"})
    ends = heads[threads - 1 :: threads]
    last = len(ends) - 2 if options.last is None else options.last - 1
    if not last - options.steps >= 0 or last >= len(ends):
        parser.error(f"{options.trace} has {len(ends)} steps; of the first one the beginning is not known")
    windows = [(ends[last - options.steps], ends[last])]
    if options.layers:
        top, bottom = (f"layer {number} " for number in options.layers)
        step = [
            e for e in spans if ends[last - 1] <= e["ts"] < ends[last] and not e["name"].endswith("neurons")
        ]
        starts = [e["ts"] for e in step if e["name"].startswith(top)]
        stops = [e["ts"] + e["dur"] for e in step if e["name"].startswith(bottom)]
        if not starts or not stops:
            parser.error(f"the last step has no layers {options.layers[0]} to {options.layers[1]}")
        windows.append((min(starts), max(stops)))
    whole = Picture.of(events, options.only)
    pictures = [whole.between(*window) for window in windows]
    heights = [0.5 * len(picture.names) + 0.6 for picture in pictures]
    figure, panels = plt.subplots(
        len(windows), squeeze=False, figsize=(12, sum(heights) + 0.6), gridspec_kw={"height_ratios": heights}
    )
    for axes, picture, window in zip(panels[:, 0], pictures, windows, strict=True):
        picture.draw(axes, *window)
    kinds = {e["name"].split()[-1] for picture in pictures for e in picture.spans}
    shown = {kind: colour for kind, colour in COLOURS.items() if kind in kinds}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in shown.values()]
    panels[0, 0].legend(
        handles, list(shown), ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
    )
    figure.tight_layout()
    figure.savefig(options.picture, dpi=100)


if __name__ == "__main__":
    main()
