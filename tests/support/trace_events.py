"""The events of a written trace, with exact times.

A trace has microseconds with three decimals. As floats of double precision, the end of a span (``ts + dur``) and the
beginning of the next one, which touches it, differ in the last bit for one pair of eight. So times are read as
integers of nanoseconds.
"""

from __future__ import annotations

import json
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from pi2rt.runtime.trace import Trace

Event: TypeAlias = dict[str, Any]
"""As in the file, and ``begin``; of spans also ``end`` and ``track`` (the name of its thread). Integers, in
nanoseconds since the trace began."""


def read_events(path: Path) -> list[Event]:
    """The events of a trace file, in its order."""
    events: list[Event] = json.loads(path.read_text(), parse_float=Decimal)["traceEvents"]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for event in events:
        if "ts" in event:
            event["begin"] = _nanoseconds(event["ts"])
        if event["ph"] == "X":
            event["end"] = event["begin"] + _nanoseconds(event["dur"])
            event["track"] = tracks[event["pid"], event["tid"]]
    return events


def events_of(trace: Trace, folder: Path) -> list[Event]:
    """The events of a trace, written to ``folder`` and read again."""
    trace.write(folder / "trace.json")
    return read_events(folder / "trace.json")


def spans(events: list[Event], *prefixes: str) -> list[Event]:
    """The spans whose names begin with one of ``prefixes``; all of them where none is given."""
    return [e for e in events if e["ph"] == "X" and e["name"].startswith(prefixes or ("",))]


def assert_no_overlap(events: list[Event]) -> None:
    """The spans of each track follow each other; they may touch."""
    for track in {(e["pid"], e["tid"]) for e in events}:
        mine = sorted((e["begin"], e["end"]) for e in events if (e["pid"], e["tid"]) == track)
        assert all(a[1] <= b[0] for a, b in pairwise(mine)), track


def within(inner: Event, outer: Event) -> bool:
    """Whether a span lies in another one of its track."""
    same = (inner["pid"], inner["tid"]) == (outer["pid"], outer["tid"])
    return bool(same and outer["begin"] <= inner["begin"] and inner["end"] <= outer["end"])


def _nanoseconds(microseconds: Decimal | int) -> int:
    exact = microseconds * 1000
    assert exact == int(exact), f"{microseconds} has more than three decimals"
    return int(exact)
