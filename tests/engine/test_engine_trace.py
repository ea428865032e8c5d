"""The picture of requests and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import numbers, opened
from tests.support.trace_events import assert_no_overlap, events_of, spans, within


# The beginning of the trace decides how its times look in the file. With some of these, the sum of a beginning and a
# length is not the number that is written for their end, if both are read as floats.
@pytest.mark.parametrize("shift_ns", [0, *(7**power for power in range(3, 9))])
async def test_requests_and_steps_are_spans(
    tokenizer: Tokenizer, autojump_clock: MockClock, tmp_path: Path, shift_ns: int
) -> None:
    trace = Trace()
    trace.origin_ns -= shift_ns
    async with opened(tokenizer, slots=2, seconds_per_step=0.01, trace=trace) as o:
        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(o.tokens, numbers(20, seed=i), 5 + i)
    events = events_of(trace, tmp_path)
    steps = spans(events, "step ")
    assert len(steps) == len(o.log.steps)
    assert sum(span["args"]["prefill_tokens"] for span in steps) == 60
    assert sum(span["args"]["decode_tokens"] for span in steps) == 4 + 5 + 6
    assert_no_overlap(steps)
    requests = spans(events, "request ")
    assert sorted((span["args"]["generated_tokens"]) for span in requests) == [5, 6, 7]
    assert_no_overlap(requests)
    phases = spans(events, "prefill", "decode")
    assert_no_overlap(phases)
    for request in requests:
        inner = [span for span in phases if within(span, request)]
        assert [span["name"] for span in inner] == ["prefill", "decode"]
        assert inner[0]["begin"] == request["begin"]
        assert inner[0]["end"] == inner[1]["begin"]
        assert inner[1]["end"] == request["end"]
