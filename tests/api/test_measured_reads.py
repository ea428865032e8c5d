"""A curve that was measured and kept decides how much is read at once."""

from __future__ import annotations

from pathlib import Path

import pytest

import pi2rt
from pi2rt import catalogue
from pi2rt.planner.measure.kept_curve import keep_curve
from pi2rt.planner.measure.read_curve import ReadCurve, ReadPoint
from pi2rt.planner.pack.convert import convert
from tests.support.tiny_models import TinyModel, write_gguf

CURVE = ReadCurve(
    "preadv",
    True,
    1 << 30,
    (
        ReadPoint("random", 4096, 3, 1e9),
        ReadPoint("random", 4096, 5, 1.1e9),
        ReadPoint("sequential", 8192, 2, 1e9),
    ),
)


async def test_a_kept_curve_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyModel("llama", dim=64, hidden=1216, layers=2, heads=2, kv_heads=1, head_dim=32,
                      config={"hidden_act": "drelu"})  # fmt: skip
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="Q4_0"), tmp_path / "m.pi2")
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path / "cache"))
    found, texts = [], []
    for io in ("uring", "preadv", "auto"):
        for _ in range(2):
            async with pi2rt.open_runtime(tmp_path / "m.pi2", context=128, memory="2G", io=io) as runtime:
                texts.append((await runtime.generate("Once", max_tokens=8, ignore_eos=True)).tokens)
                flash = runtime.statistics().actors[0].executor.flash
            assert flash is not None
            assert flash.neurons is not None
            found.append((flash.measured, flash.neurons.reads_at_once))
            keep_curve(catalogue.curves_directory(), tmp_path / "m.pi2", CURVE, "2026-11-23")
    default, measured = (False, 128), (True, 5)
    assert found == [default, default, measured, measured, measured, measured]
    assert len(set(texts)) == 1
