"""From a curve to what is read at once, and curves that are kept."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt._errors import OutputError
from pi2rt.cython_kernels.flash.stream import MOST_DEPTH
from pi2rt.planner.measure.kept_curve import KeptCurve, device_of, keep_curve, kept_curve, kept_curves
from pi2rt.planner.measure.read_curve import DEPTHS, READ_BYTES, ReadCurve, measure_read_curve
from pi2rt.planner.read_choice import CLUSTER_BUFFER, ENOUGH, STREAM_BUFFER, choose_reads
from pi2rt.runtime.flash_reads import FlashReads


def device(latency: float, bandwidth: float, reads: float, file: Path) -> ReadCurve:
    """Of a simulated device that needs ``latency`` seconds for a read, and has ``reads`` per second and ``bandwidth``
    at most."""

    def measure(size: int, depth: int, seconds: float, pattern: str) -> float:
        return min(depth * size / latency, reads * size, bandwidth)

    return measure_read_curve(file, 1.0, io="preadv", measure=measure)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("curve") / "weights"
    with path.open("wb") as sparse:
        sparse.truncate(64 << 20)
    return path


@given(
    latency=st.floats(2e-6, 2e-3),
    bandwidth=st.floats(1e7, 2e10),
    reads=st.floats(1e3, 2e6),
    page=st.sampled_from([4096, 8192]),
)
@settings(max_examples=60, deadline=None)
def test_the_least_that_is_as_good_as_all(
    latency: float, bandwidth: float, reads: float, page: int, file: Path
) -> None:
    curve = device(latency, bandwidth, reads, file)
    chosen = choose_reads(curve, page)
    assert chosen.measured
    assert chosen.stream_bytes in READ_BYTES
    assert {chosen.stream_depth, chosen.neuron_depth, chosen.cluster_depth} <= set(DEPTHS)
    assert chosen.stream_bytes * chosen.stream_depth <= STREAM_BUFFER
    assert chosen.stream_depth <= MOST_DEPTH
    assert chosen.cluster_depth << 20 <= CLUSTER_BUFFER
    best = max(curve.bandwidth(page, depth) for depth in DEPTHS)
    assert curve.bandwidth(page, chosen.neuron_depth) >= ENOUGH * best
    for depth in DEPTHS:
        if depth < chosen.neuron_depth:
            assert curve.bandwidth(page, depth) < ENOUGH * best


def test_a_disk_of_many_reads_and_one_of_few(file: Path) -> None:
    phone = choose_reads(device(100e-6, 4e9, 1e6, file))
    slow = choose_reads(device(100e-6, 1e8, 10_000, file))
    assert (phone.neuron_depth, slow.neuron_depth) == (128, 1)
    assert slow.stream_depth * slow.stream_bytes < phone.stream_depth * phone.stream_bytes


def test_a_curve_is_kept_for_its_device(file: Path, tmp_path: Path) -> None:
    curve = device(1e-4, 1e9, 5e4, file)
    assert kept_curve(tmp_path, file) is None
    target = keep_curve(tmp_path, file, curve, "2026-11-23")
    kept = kept_curve(tmp_path, file)
    assert kept == KeptCurve(1, device_of(file), "2026-11-23", curve)
    assert kept_curves(tmp_path) == [kept]
    assert [each.name for each in tmp_path.iterdir()] == [target.name]
    assert kept_curve(tmp_path, file, "preadv") == kept
    assert kept_curve(tmp_path, file, "uring") is None  # another backend, another curve
    assert kept_curve(tmp_path, tmp_path / "absent") is None
    for other in (
        replace(kept, version=2),
        replace(kept, device="9:9"),
        replace(kept, curve=replace(curve, points=())),
    ):
        target.write_bytes(msgspec.json.encode(other))
        assert kept_curve(tmp_path, file) is None
    for damaged in b"", b"{}", b"\xff\xfe", msgspec.json.encode(kept)[:-9]:
        target.write_bytes(damaged)
        assert kept_curve(tmp_path, file) is None
        assert kept_curves(tmp_path) == []


def test_a_write_that_fails_leaves_what_was_there(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = device(1e-4, 1e9, 5e4, file)
    keep_curve(tmp_path, file, curve, "2026-11-22")

    def refuse(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        keep_curve(tmp_path, file, curve, "2026-11-23")
    kept = kept_curve(tmp_path, file)
    assert kept is not None
    assert kept.date == "2026-11-22"
    assert len(list(tmp_path.iterdir())) == 1


def test_defaults_say_that_they_are() -> None:
    assert not FlashReads().measured
