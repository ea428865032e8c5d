"""Where every millisecond went: events of both planes, written as a Chrome trace that ui.perfetto.dev opens.

Recording appends a tuple to a list and nothing else; formatting waits for ``write``. Code that may be traced
holds a ``Trace | None`` and asks ``if trace is not None``, so that an absent trace costs one comparison.

Format: "Trace Event Format", the Chromium project: complete events (X), instants (i), counters (C), flows (s,
f) and metadata (M). Times are ``time.perf_counter_ns`` everywhere.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pi2rt.host.output_file import OutputFile

Nanoseconds = npt.NDArray[np.int64]

# (phase, track, name, start, length, args); length doubles as the id of a flow, whose events have no length.
_Event: TypeAlias = tuple[str, "Track", str, int, int, Mapping[str, object] | None]
_Block: TypeAlias = tuple["Track", tuple[str, ...], npt.NDArray[np.intp] | None, Nanoseconds, Nanoseconds]

_CHUNK = 4096  # events formatted before they are written


class Track:
    """One row of the picture: a thread of a process. Made by ``Trace.track``.

    Spans of one track nest or follow each other; what overlaps (requests, say) goes to tracks of its own.
    """

    __slots__ = ("_trace", "process", "process_id", "thread", "thread_id")

    def __init__(self, trace: Trace, process: str, process_id: int, thread: str, thread_id: int) -> None:
        self._trace = trace
        self.process, self.process_id = process, process_id
        self.thread, self.thread_id = thread, thread_id

    def span(self, name: str, start_ns: int, end_ns: int, **args: object) -> None:
        """Something that took from ``start_ns`` to ``end_ns``."""
        self._trace._add(("X", self, name, start_ns, end_ns - start_ns, args))

    def instant(self, name: str, ns: int, **args: object) -> None:
        """Something that happened at ``ns``."""
        self._trace._add(("i", self, name, ns, 0, args))


class Trace:
    """Collects events in memory, ``max_events`` at most; what comes later is counted and dropped.

    Recording belongs to one thread (the Trio thread); native threads record into arrays of their own, which
    ``extend_native`` adds.
    """

    def __init__(self, max_events: int = 1_000_000) -> None:
        if max_events < 1:
            raise ValueError(f"max_events must be at least 1, not {max_events}")
        self.max_events = max_events
        self.origin_ns = time.perf_counter_ns()
        self._events: list[_Event] = []
        self._counters: list[tuple[str, str, int, float]] = []  # (process, name, ns, value)
        self._blocks: list[_Block] = []
        self._tracks: dict[tuple[str, str], Track] = {}
        self._processes: dict[str, int] = {}
        self._count = 0
        self._dropped = 0
        self._flows = 0

    def __len__(self) -> int:
        """Events held."""
        return self._count

    def __bool__(self) -> bool:
        """An empty trace is a trace: ``if trace`` means the same as ``if trace is not None``."""
        return True

    @property
    def dropped(self) -> int:
        """Events that found no room."""
        return self._dropped

    def track(self, process: str, thread: str) -> Track:
        """The track of that name; the same one each time it is asked for."""
        track = self._tracks.get((process, thread))
        if track is None:
            track = Track(self, process, self._process_id(process), thread, len(self._tracks) + 1)
            self._tracks[process, thread] = track
        return track

    def counter(self, name: str, ns: int, value: float, process: str = "pi2rt") -> None:
        """The value of a quantity from ``ns`` on, drawn as a curve."""
        if self._room(1):
            self._process_id(process)
            self._counters.append((process, name, ns, value))

    def flow(self, name: str, source: Track, source_ns: int, target: Track, target_ns: int) -> None:
        """An arrow from a span of ``source`` to a span of ``target``; each time lies within its span."""
        if self._room(2):
            self._flows += 1
            self._events.append(("s", source, name, source_ns, self._flows, None))
            self._events.append(("f", target, name, target_ns, self._flows, None))

    def extend_native(
        self,
        track: Track,
        names: Sequence[str],
        starts: npt.NDArray[np.integer[Any]],
        ends: npt.NDArray[np.integer[Any]],
        index: npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """Adds the spans that a native thread recorded.

        Args:
            track: the thread's track.
            names: a name for each span; or, where ``index`` is given, a table of names.
            starts, ends: nanoseconds of ``time.perf_counter_ns`` (Linux: CLOCK_MONOTONIC), each (spans,).
                Copied.
            index: (spans,), the span's name is ``names[index[i]]``.

        Raises:
            ValueError: the lengths differ, or an index is outside the table.
        """
        count = len(starts)
        if len(ends) != count or (len(names) if index is None else len(index)) != count:
            given = f"{len(names)} names" if index is None else f"{len(index)} indices"
            raise ValueError(f"{given}, {count} starts and {len(ends)} ends: the lengths must be equal")
        if index is not None and count and (index.min() < 0 or index.max() >= len(names)):
            raise ValueError(f"indices {index.min()} to {index.max()} into a table of {len(names)} names")
        kept = min(count, self.max_events - self._count)
        self._count += kept
        self._dropped += count - kept
        if not kept:
            return
        table = tuple(names[:kept]) if index is None else tuple(names)
        where = None if index is None else np.array(index[:kept], np.intp)
        self._blocks.append(
            (track, table, where, np.array(starts[:kept], np.int64), np.array(ends[:kept], np.int64))
        )

    def write(self, to: str | os.PathLike[str] | OutputFile) -> None:
        """Writes everything so far. A regular file holds either what it had or the whole trace, whatever happens.

        Blocks for about two seconds per million events.

        Raises:
            RequestError: ``to`` is a path that cannot be written to.
            OutputError: writing failed; of a regular file nothing is left behind.
        """
        with to if isinstance(to, OutputFile) else OutputFile(to) as file:
            for text in self._text():
                file.write(text.encode("ascii"))
            file.commit()

    def _text(self) -> Iterator[str]:
        yield f'{{"displayTimeUnit":"ms","otherData":{_json(self._about())},"traceEvents":[\n'
        separator = ""
        events = self._formatted()
        while chunk := list(itertools.islice(events, _CHUNK)):
            yield separator + ",\n".join(chunk)
            separator = ",\n"
        yield "\n]}\n"

    def _add(self, event: _Event) -> None:
        if self._count < self.max_events:
            self._count += 1
            self._events.append(event)
        else:
            self._dropped += 1

    def _room(self, count: int) -> bool:
        if self._count + count > self.max_events:
            self._dropped += count
            return False
        self._count += count
        return True

    def _process_id(self, process: str) -> int:
        return self._processes.setdefault(process, len(self._processes) + 1)

    def _about(self) -> dict[str, object]:
        return {
            "producer": "pi2rt",
            "clock": "perf_counter_ns",
            "origin_ns": self.origin_ns,
            "events": self._count,
            "dropped_events": self._dropped,
        }

    def _formatted(self) -> Iterator[str]:
        """Each event as JSON: metadata first, the others by time, an enclosing span before those within
        it."""
        for process, number in self._processes.items():
            yield _metadata("process_name", number, 0, name=process)
            yield _metadata("process_sort_index", number, 0, sort_index=number)
        for track in self._tracks.values():
            yield _metadata("thread_name", track.process_id, track.thread_id, name=track.thread)
            yield _metadata(
                "thread_sort_index", track.process_id, track.thread_id, sort_index=track.thread_id
            )
        for process, name, ns, value in self._counters:
            yield (
                f'{{"ph":"C","pid":{self._processes[process]},"name":{_json(name)},"ts":{self._time(ns)},'
                f'"args":{{"value":{_json(value)}}}}}'
            )
        events = [*self._events, *self._native_events()]
        events.sort(key=_order)
        for phase, track, name, start, length, args in events:
            text = (
                f'{{"ph":"{phase}","pid":{track.process_id},"tid":{track.thread_id},"name":{_json(name)},'
                f'"ts":{self._time(start)}'
            )
            if phase == "X":
                text += f',"dur":{_microseconds(length)}'
            elif phase == "i":
                text += ',"s":"t"'
            elif phase == "s":
                text += f',"cat":"flow","id":{length}'
            else:  # "f"; bp: the arrow ends at the span that encloses it, not at the next one
                text += f',"cat":"flow","id":{length},"bp":"e"'
            yield text + (f',"args":{_json(args)}}}' if args else "}")

    def _native_events(self) -> Iterator[_Event]:
        for track, names, index, starts, ends in self._blocks:
            which: Sequence[int] = range(len(starts)) if index is None else index.tolist()
            lengths: list[int] = (ends - starts).tolist()
            for i, start, length in zip(which, starts.tolist(), lengths, strict=True):
                yield "X", track, names[i], start, length, None

    def _time(self, ns: int) -> str:
        return _microseconds(ns - self.origin_ns)


def _order(event: _Event) -> tuple[int, int]:
    phase, _, _, start, length, _ = event
    return start, -length if phase == "X" else 0


def _microseconds(ns: int) -> str:
    """Exact decimals: a float of microseconds since boot would lose the nanoseconds."""
    whole, rest = divmod(abs(ns), 1000)
    return f"{'-' if ns < 0 else ''}{whole}.{rest:03d}"


def _metadata(kind: str, process_id: int, thread_id: int, **args: object) -> str:
    return f'{{"ph":"M","pid":{process_id},"tid":{thread_id},"name":"{kind}","args":{_json(args)}}}'


def _json(value: object) -> str:
    return json.dumps(_plain(value), separators=(",", ":"), default=str)


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity, and knows no numpy."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
