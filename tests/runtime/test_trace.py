from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi2rt._errors import RequestError
from pi2rt.runtime.trace import Trace


def written(trace: Trace, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the file says about itself, its events without metadata)."""
    path = folder / "trace.json"
    trace.write(path)
    whole = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(whole) == {"displayTimeUnit", "otherData", "traceEvents"}
    return whole["otherData"], [event for event in whole["traceEvents"] if event["ph"] != "M"]


def ns(trace: Trace, offset: int) -> int:
    return trace.origin_ns + offset


def test_span_instant_and_counter(tmp_path: Path) -> None:
    trace = Trace()
    track = trace.track("actors", "cpu")
    track.span("step", ns(trace, 1_500), ns(trace, 4_001), id=3, model="ä", ratio=float("nan"), n=np.int64(4))
    track.instant("stopped", ns(trace, 2_000))
    trace.counter("pages", ns(trace, 1_000), 7.5)
    about, events = written(trace, tmp_path)
    counter, span, instant = events
    assert span == {
        "ph": "X", "pid": 1, "tid": 1, "name": "step", "ts": 1.5, "dur": 2.501,
        "args": {"id": 3, "model": "ä", "ratio": "nan", "n": 4},
    }  # fmt: skip
    assert instant == {"ph": "i", "pid": 1, "tid": 1, "name": "stopped", "ts": 2.0, "s": "t"}
    assert counter == {"ph": "C", "pid": 2, "name": "pages", "ts": 1.0, "args": {"value": 7.5}}
    assert about["events"] == len(trace) == 3
    assert about["dropped_events"] == 0


def test_names_of_processes_and_threads(tmp_path: Path) -> None:
    trace = Trace()
    first = trace.track("actors", "cpu")
    assert trace.track("actors", "cpu") is first
    other = trace.track("engine", "requests")
    sibling = trace.track("actors", "cpu thread 0")
    assert first.process_id == sibling.process_id != other.process_id
    assert len({first.thread_id, sibling.thread_id, other.thread_id}) == 3
    path = tmp_path / "trace.json"
    trace.write(path)
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"]
        for event in json.loads(path.read_text())["traceEvents"]
    }
    assert names["process_name", first.process_id, 0] == {"name": "actors"}
    assert names["thread_name", other.process_id, other.thread_id] == {"name": "requests"}
    assert names["thread_sort_index", 1, sibling.thread_id] == {"sort_index": sibling.thread_id}


def test_flow_connects_two_spans(tmp_path: Path) -> None:
    trace = Trace()
    request, cpu = trace.track("engine", "request 1"), trace.track("actors", "cpu")
    for start in 0, 100_000:
        request.span("decode", ns(trace, start), ns(trace, start + 50_000))
        cpu.span("step", ns(trace, start + 1_000), ns(trace, start + 40_000))
        trace.flow("step", request, ns(trace, start + 500), cpu, ns(trace, start + 1_000))
    _, events = written(trace, tmp_path)
    starts = [event for event in events if event["ph"] == "s"]
    ends = [event for event in events if event["ph"] == "f"]
    assert [event["id"] for event in starts] == [event["id"] for event in ends]
    assert len({event["id"] for event in starts}) == 2
    for start, end in zip(starts, ends, strict=True):
        assert (start["tid"], end["tid"]) == (request.thread_id, cpu.thread_id)
        assert (start["name"], start["cat"]) == (end["name"], end["cat"])  # what a viewer matches them by
        assert start["ts"] <= end["ts"]
        assert end["bp"] == "e"


def test_events_come_by_time_and_the_enclosing_span_first(tmp_path: Path) -> None:
    trace = Trace()
    track = trace.track("actors", "cpu")
    track.span("later", ns(trace, 5_000), ns(trace, 6_000))
    track.span("inner", ns(trace, 0), ns(trace, 1_000))
    track.span("outer", ns(trace, 0), ns(trace, 9_000))
    _, events = written(trace, tmp_path)
    assert [event["name"] for event in events] == ["outer", "inner", "later"]


def test_native_spans(tmp_path: Path) -> None:
    trace = Trace()
    track = trace.track("actors", "cpu thread 0")
    starts = np.array([0, 10, 20], np.uint64) + np.uint64(trace.origin_ns)
    ends = starts + np.uint64(7)
    trace.extend_native(track, ["qkv", "ffn", "head"], starts, ends)
    trace.extend_native(
        track, ["qkv", "ffn"], starts + np.uint64(100), ends + np.uint64(100), np.array([1, 0, 1])
    )
    starts[:] = 0  # were copied
    _, events = written(trace, tmp_path)
    assert [event["name"] for event in events] == ["qkv", "ffn", "head", "ffn", "qkv", "ffn"]
    assert [event["ts"] for event in events] == [0.0, 0.01, 0.02, 0.1, 0.11, 0.12]
    assert {event["dur"] for event in events} == {0.007}


def test_native_arrays_must_agree() -> None:
    trace = Trace()
    track = trace.track("actors", "cpu")
    three, two = np.zeros(3, np.int64), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="2 names, 3 starts and 3 ends"):
        trace.extend_native(track, ["a", "b"], three, three)
    with pytest.raises(ValueError, match="3 starts and 2 ends"):
        trace.extend_native(track, ["a", "b", "c"], three, two)
    with pytest.raises(ValueError, match="2 indices, 3 starts"):
        trace.extend_native(track, ["a"], three, three, two)
    with pytest.raises(ValueError, match="indices 0 to 1 into a table of 1 names"):
        trace.extend_native(track, ["a"], two, two, np.array([0, 1]))
    with pytest.raises(ValueError, match="indices -1 to 0"):
        trace.extend_native(track, ["a"], two, two, np.array([0, -1]))
    assert len(trace) == 0


def test_memory_is_bounded_and_the_file_says_what_is_missing(tmp_path: Path) -> None:
    trace = Trace(max_events=10)
    track = trace.track("actors", "cpu")
    for i in range(7):
        track.span("step", ns(trace, i), ns(trace, i + 1))
    times = np.arange(5, dtype=np.int64)
    trace.extend_native(track, ["a"] * 5, times, times)  # two too many
    trace.extend_native(track, ["a"] * 5, times, times)
    track.instant("late", 0)
    trace.counter("late", 0, 1)
    trace.flow("late", track, 0, track, 1)
    about, events = written(trace, tmp_path)
    assert len(trace) == len(events) == 10
    assert about["dropped_events"] == trace.dropped == 2 + 5 + 1 + 1 + 2
    with pytest.raises(ValueError, match="max_events"):
        Trace(max_events=0)


def test_an_empty_trace_is_valid(tmp_path: Path) -> None:
    assert Trace()
    about, events = written(Trace(), tmp_path)
    assert events == []
    assert about["events"] == 0


def test_many_events(tmp_path: Path) -> None:
    trace = Trace()
    track = trace.track("actors", "cpu")
    for i in range(8192 + 5):  # more than one chunk
        track.span("step", ns(trace, i), ns(trace, i + 1))
    _, events = written(trace, tmp_path)
    assert len(events) == 8197


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("cannot be shown")

    path = tmp_path / "trace.json"
    path.write_text("old")
    trace = Trace()
    trace.track("actors", "cpu").instant("x", 0, arg=Unprintable())
    with pytest.raises(RuntimeError, match="cannot be shown"):
        trace.write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RequestError, match="cannot be written: its folder does not exist"):
        Trace().write(tmp_path / "nowhere" / "trace.json")


def test_clock_is_the_native_planes_clock() -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    origin = Trace().origin_ns
    assert before <= origin <= time.clock_gettime_ns(time.CLOCK_MONOTONIC)
