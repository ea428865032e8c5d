"""Plans from anybody: read as they are, or refused with the field that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt._errors import ModelNotFoundError, RequestError
from pi2rt.formats.plan import MOST_BYTES, VERSION, Plan, parse_plan, plan_text, read_plan
from pi2rt.runtime.graph import graph_of
from pi2rt.tools.graph_svg import graph_svg

DOCUMENT: dict[str, Any] = {
    "version": VERSION,
    "model": {"architecture": "llama", "name": "m", "tensors": 3, "nbytes": 10, "fingerprint": "0123456789abcdef"},
    "cores": [0, 1],
    "choices": {
        "context": 128, "max_sequences": 2, "memory": 1000, "cache": None, "kv_type": "f16", "activations": "mixed",
        "exact_floats": False, "sparsity": "exact", "kernels": None, "io": "auto", "read_deadline": 30.0,
        "pipeline": "cluster", "two_phase": False, "executor_options": {"npu": {"device": "GPU", "batches": 2}},
    },
    "units": [{"name": "big", "cores": [0]}, {"name": "little", "cores": [1]}, {"name": "npu", "cores": []}],
    "lanes": [
        {"name": "big", "executor": "cpu", "role": "decode", "units": ["big", "little"], "max_tokens": 64,
         "in_flight": 8, "mixed_chunk": 16, "least_tokens": 0},
        {"name": "npu", "executor": "npu", "role": "prefill", "units": ["npu"], "max_tokens": 512, "in_flight": 2,
         "mixed_chunk": 0, "least_tokens": 64},
    ],
    "placements": {"a": "streamed", "b": "by row", "c": "paged"},
    "segments": {"process": 1, "lanes": 8, "resident": 2, "ring": 3, "experts": 4, "neurons": 5, "kv": 6,
                 "activations": 7, "unit": 9},
    "reads": {"stream_bytes": 1048576, "stream_depth": 32, "neuron_depth": 128, "cluster_depth": 8, "neuron_gap": 0,
              "measured": False},
    "kv_pages": 4,
    "window_pages": 3,
    "predictions": [{"what": "memory", "unit": "bytes", "low": 0, "high": 45.0, "basis": "the sum"}],
    "cluster_unit": {"name": "dsp", "unit": "vendor", "clusters": {"d": [0, 3], "e": [1]}},
}  # fmt: skip


def parsed(document: object) -> Plan:
    return parse_plan(json.dumps(document).encode())


def changed(**changes: Any) -> dict[str, Any]:
    return {**DOCUMENT, **changes}


def test_a_plan_is_written_as_it_was_read() -> None:
    plan = parsed(DOCUMENT)
    assert json.loads(plan_text(plan)) == DOCUMENT
    assert plan_text(parse_plan(plan_text(plan).encode())) == plan_text(plan)
    assert plan.segments.total == 45


def test_a_plan_from_before_there_were_windowed_bytes_is_read() -> None:
    older = {name: value for name, value in DOCUMENT.items() if name != "window_pages"}
    assert parsed(older).window_pages == 0  # all pages have memory for them, as then


def first(document: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    return {**document, part: [{**document[part][0], **changes}, *document[part][1:]]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (changed(version=VERSION + 1), f"version {VERSION + 1} is not {VERSION}, this pi2rt's"),
        ([], "Expected `object`, got `array`"),
        ({}, "missing required field `version`"),
        (changed(more=1), "unknown field `more`"),
        (changed(kv_pages=0), "`$.kv_pages`"),
        (changed(window_pages=5), "window_pages=5: more than kv_pages=4"),
        (changed(window_pages=-1), "`$.window_pages`"),
        (changed(kv_pages=1, window_pages=1), "kv_pages=1: fewer than a context of 128 tokens needs"),
        (changed(placements={"a": "elsewhere"}), "`$.placements[...]`"),
        (changed(model={**DOCUMENT["model"], "fingerprint": "x"}), "`$.model.fingerprint`"),
        (changed(segments={**DOCUMENT["segments"], "kv": -1}), "`$.segments.kv`"),
        (changed(units=[]), "`$.units`"),
        (first(DOCUMENT, "units", name="npu"), "units: 'npu' is there twice"),
        (first(DOCUMENT, "units", cores=[1]), "cores of units: 1 is there twice"),
        (first(DOCUMENT, "lanes", units=["big"]), "unit 'little' is in no lane"),
        (
            first(DOCUMENT, "lanes", units=["big", "huge"]),
            "lane 'big' has unit 'huge', which is not among the units",
        ),
        (
            first(DOCUMENT, "lanes", role="prefill"),
            "lanes have the roles prefill, prefill: the first one decodes",
        ),
        (
            first(DOCUMENT, "lanes", max_tokens=1),
            "max_tokens=1 of the lane that decodes: at least max_sequences=2",
        ),
        (first(DOCUMENT, "lanes", mixed_chunk=0), "mixed_chunk of the lane that decodes: at least 1"),
        (changed(lanes=DOCUMENT["lanes"][:1]), "unit 'npu' is in no lane"),
        (
            changed(lanes=[DOCUMENT["lanes"][0], {**DOCUMENT["lanes"][1], "least_tokens": 0}]),
            "least_tokens of lane 'npu': at least 1",
        ),
        (changed(reads={**DOCUMENT["reads"], "neuron_gap": 5}), "`$.reads.neuron_gap`"),
        (
            changed(cluster_unit={**DOCUMENT["cluster_unit"], "name": "npu"}),
            "cluster_unit: the name 'npu' is that",
        ),
        (changed(cluster_unit={**DOCUMENT["cluster_unit"], "clusters": {}}), "`$.cluster_unit.clusters`"),
        (
            changed(cluster_unit={**DOCUMENT["cluster_unit"], "clusters": {"d": [1, 0]}}),
            "clusters of 'd': [1, 0] do",
        ),
    ],
)
def test_what_is_wrong_is_named(document: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared
        parsed(document)
    assert message in str(caught.value)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="missing"):
        read_plan(tmp_path / "missing")
    (tmp_path / "text").write_bytes(b"\xff\xfe{")
    with pytest.raises(RequestError, match=r"^plan "):
        read_plan(tmp_path / "text")
    (tmp_path / "deep").write_bytes(b"[" * 100_000)
    with pytest.raises(RequestError, match=r"^plan "):
        read_plan(tmp_path / "deep")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(RequestError, match="larger than"):
        read_plan(tmp_path / "large")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=3), st.builds(dict), st.just("big"), st.builds(lambda: [["big"]]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_changed_documents_are_plans_or_refused(data: st.DataObject) -> None:
    """Never another error; what is read can be drawn and written."""
    document = json.loads(json.dumps(DOCUMENT))
    for _ in range(data.draw(st.integers(1, 3))):
        at: Any = document
        for _ in range(data.draw(st.integers(0, 3))):
            keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
            inner = [key for key in keys if isinstance(at[key], dict | list)]
            if not inner:
                break
            at = at[data.draw(st.sampled_from(inner))]
        keys = [*at, "more"] if isinstance(at, dict) else list(range(len(at)))
        if keys:
            at[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    try:
        plan = parsed(document)
    except ValueError:
        return
    assert parse_plan(plan_text(plan).encode()) == plan
    assert graph_svg(graph_of(plan)).startswith("<svg ")
