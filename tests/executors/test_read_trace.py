"""Reads of neurons in a trace: everything that was read is drawn, once, and nothing overlaps on a track."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.flash.neuron_cache import RECORD
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.flash.read_trace import PAUSE_NS, SAMPLE_NS, ReadTrace
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.trace import Trace
from tests.executors.test_sparse import TOKENS, cache_sizes, one_by_one
from tests.support.running import all_logits, opened
from tests.support.tiny_models import TinyModel, write_gguf
from tests.support.trace_events import Event, assert_no_overlap, events_of, within


def batches(events: list[Event]) -> list[Event]:
    return [e for e in events if e["ph"] == "X" and e["name"].endswith("neurons")]


def records(rows: list[tuple[int, int, int, int, int]]) -> npt.NDArray[np.void]:
    return np.array(rows, RECORD)


def test_a_pause_ends_a_batch_and_what_is_foreseen_has_a_lane(tmp_path: Path) -> None:
    trace = Trace()
    start = trace.origin_ns
    reads = [(0, 10_000, 0, 1, 0), (5_000, 9_000, 0, 2, 0), (5_000, 40_000, 1, 3, 3),
             (10_000 + PAUSE_NS, 200_000, 0, 1, 0), (400_000, 500_000, 0, 1, 0)]  # fmt: skip
    moved = [(start + begin, start + end, *rest) for begin, end, *rest in reads]
    ReadTrace(trace, "flash", ("layer 3", "layer 5")).draw(records(moved), start + 10**9)
    found = [
        (
            e["track"],
            e["name"],
            e["begin"],
            e["end"] - e["begin"],
            e["args"]["reads"],
            e["args"]["pages"],
            e["args"]["foreseen"],
        )
        for e in batches(events_of(trace, tmp_path))
    ]
    assert sorted(found) == [
        ("neurons", "layer 3 neurons", 0, 200_000, 3, 4, 0),
        ("neurons", "layer 3 neurons", 400_000, 100_000, 1, 1, 0),
        ("neurons ahead", "layer 5 neurons", 5_000, 35_000, 1, 3, 3),
    ]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_however_reads_come_in_parts_all_are_drawn(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The curve ends where nothing is in flight, and is never higher than the truth by more than its rounding."""
    trace = Trace()
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.integers(1, 60))
    begins = trace.origin_ns + rng.integers(0, 30 * SAMPLE_NS, count)
    ends = begins + rng.integers(1, 5 * SAMPLE_NS, count)
    foreseen = rng.integers(0, 2, count)
    reads = records(
        list(
            zip(
                begins.tolist(),
                ends.tolist(),
                rng.integers(0, 3, count).tolist(),
                [1] * count,
                foreseen.tolist(),
                strict=True,
            )
        )
    )
    reads = reads[np.argsort(reads["end"])]
    draw = ReadTrace(trace, "flash", ("a", "b", "c"))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    for first, last in pairwise([0, *cuts, count]):
        now = int(reads["end"][last - 1]) if last else trace.origin_ns
        rest = reads[last:]
        unfinished = rest["begin"][rest["begin"] <= now]
        draw.draw(reads[first:last], min([now, *unfinished.tolist()]))
    draw.draw(reads[:0], int(ends.max()) + 2 * SAMPLE_NS)
    events = events_of(trace, tmp_path_factory.mktemp("trace"))
    drawn = batches(events)
    assert sum(e["args"]["reads"] for e in drawn) == count
    assert sum(e["args"]["foreseen"] for e in drawn) == foreseen.sum()
    assert_no_overlap(drawn)
    curve = [(e["begin"], e["args"]["value"]) for e in events if e["ph"] == "C"]
    assert curve[-1][1] == 0
    most = max(int(((begins <= at) & (ends > at)).sum()) for at in begins.tolist())
    assert most <= max(value for _, value in curve) < most + 4


@pytest.mark.parametrize("pipeline", ["cluster", "none"])
async def test_a_traced_model_shows_each_read_and_each_wait(tmp_path: Path, pipeline: str) -> None:
    model = TinyModel("llama", seed=1, dim=256, hidden=1216, layers=3, heads=4, kv_heads=2, head_dim=64,
                      config={"hidden_act": "drelu"})  # fmt: skip
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="Q4_0"), tmp_path / "m.pi2")
    size, cluster, _ = cache_sizes(tmp_path / "m.pi2")
    given = {"exact_floats": False, "neuron_bytes": 2 * cluster * size, "pipeline": pipeline, "cores": (0, 0)}
    async with opened(CpuExecutor(), tmp_path / "m.pi2", **given) as executor:
        expected = await one_by_one(executor, TOKENS)
    trace = Trace()
    async with opened(CpuExecutor(), tmp_path / "m.pi2", trace=trace, **given) as executor:
        before = executor.statistics().flash
        np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
        await all_logits(executor, TOKENS)
        after = executor.statistics().flash
    events = events_of(trace, tmp_path)
    drawn = batches(events)
    assert {e["name"] for e in drawn} == {f"layer {layer} neurons" for layer in range(3)}
    reads = sum(e["args"]["reads"] for e in drawn)
    read, read_bytes = (getattr(after, name) - getattr(before, name) for name in ("page_reads", "bytes"))
    assert read > 0
    assert reads >= read  # those that were in flight at the end came later
    assert sum(e["args"]["pages"] for e in drawn) * size >= read_bytes
    assert_no_overlap(drawn)
    waits = [e for e in events if e["ph"] == "X" and e["name"] == "wait"]
    blocks = [e for e in events if e["ph"] == "X" and e["name"].endswith("ffn")]
    assert waits
    for wait in waits:
        assert any(within(wait, block) for block in blocks)


async def test_without_a_trace_no_read_is_recorded(tmp_path: Path) -> None:
    model = TinyModel("llama", seed=1, dim=256, hidden=1216, layers=1, heads=4, kv_heads=2, head_dim=64,
                      config={"hidden_act": "drelu"})  # fmt: skip
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="Q4_0"), tmp_path / "m.pi2")
    async with opened(CpuExecutor(), tmp_path / "m.pi2", exact_floats=False) as executor:
        await all_logits(executor, TOKENS)
        assert isinstance(executor, CpuExecutor)
        assert executor._program is not None
        activations = executor._program.activation_bytes
    async with opened(CpuExecutor(), tmp_path / "m.pi2", exact_floats=False, trace=Trace()) as executor:
        assert isinstance(executor, CpuExecutor)
        assert executor._program is not None
        assert executor._program.activation_bytes > activations
