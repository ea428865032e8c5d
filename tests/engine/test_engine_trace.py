"""The picture of requests and steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import numbers, opened


async def test_requests_and_steps_are_spans(
    tokenizer: Tokenizer, autojump_clock: MockClock, tmp_path: Path
) -> None:
    trace = Trace()
    async with opened(tokenizer, slots=2, seconds_per_step=0.01, trace=trace) as o:
        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(o.tokens, numbers(20, seed=i), 5 + i)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans: list[dict[str, Any]] = [event for event in events if event["ph"] == "X"]
    steps = [span for span in spans if span["name"].startswith("step ")]
    assert len(steps) == len(o.log.steps)
    assert sum(span["args"]["prefill_tokens"] for span in steps) == 60
    assert sum(span["args"]["decode_tokens"] for span in steps) == 4 + 5 + 6
    requests = [span for span in spans if span["name"].startswith("request ")]
    assert sorted((span["args"]["generated_tokens"]) for span in requests) == [5, 6, 7]
    for request in requests:
        inner = [
            span
            for span in spans
            if span["tid"] == request["tid"]
            and span["name"] in ("prefill", "decode")
            and request["ts"] <= span["ts"] < request["ts"] + request["dur"]
        ]
        assert [span["name"] for span in inner] == ["prefill", "decode"]
        assert abs(sum(span["dur"] for span in inner) - request["dur"]) < 0.01
    for tid in {request["tid"] for request in requests}:
        ends = 0.0
        for span in requests:
            if span["tid"] == tid:
                assert span["ts"] >= ends - 0.01  # one after the other
                ends = span["ts"] + span["dur"]
