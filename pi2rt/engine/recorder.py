"""Requests, their token masks, and steps in the trace."""

from __future__ import annotations

import time

from pi2rt.engine.lane import Lane
from pi2rt.engine.scheduler import Flight
from pi2rt.engine.sequence import Sequence
from pi2rt.runtime.step import StepResult
from pi2rt.runtime.trace import Trace


class Recorder:
    """Steps on a track for each lane; requests on one for each slot, so that the spans of a track follow each other."""

    __slots__ = ("_trace",)

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def step(self, lane: Lane, flight: Flight, result: StepResult) -> None:
        """A step of a lane has returned."""
        decoding = 0
        for sequence, slice_ in zip(flight.members, flight.step.slices, strict=True):
            decoding += not len(slice_.tokens)
            sequence.stamp(result.started_ns, result.finished_ns, sampled=slice_.sample)
        track = self._trace.track("engine", f"steps of {lane.actor.name}" if lane.number else "steps")
        track.span(
            f"step {flight.step.id}",
            result.started_ns,
            result.finished_ns,
            sequences=len(flight.members),
            decode_tokens=decoding,
            prefill_tokens=flight.step.tokens - decoding,
            stopped=result.stopped,
        )

    def request(self, sequence: Sequence) -> None:
        """A sequence gives its slot back. What never ran has no span."""
        if not sequence.started_ns:
            return
        track = self._trace.track("requests", f"slot {sequence.slot}")
        start, first, last = sequence.started_ns, sequence.first_ns, sequence.last_ns
        track.span(
            f"request {sequence.id}",
            start,
            last,
            prompt_tokens=sequence.prompt,
            generated_tokens=len(sequence.known) - sequence.prompt,
            again=sequence.again,
        )
        track.span("prefill", start, first or last)
        if first and last > first:
            track.span("decode", first, last)

    def mask(self, sequence: Sequence, started_ns: int) -> None:
        """A token mask was made, or its call ended otherwise. On a track for each request, which has one at a time."""
        track = self._trace.track("token masks", f"request {sequence.id}")
        generated = len(sequence.known) - sequence.prompt
        track.span("token mask", started_ns, time.perf_counter_ns(), generated_tokens=generated)
