"""What the ladder makes of its runs. The runs themselves need root and a quiet machine."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from ladder import RUNGS, flash_rates, packs, row
from pi2rt_child import each_token

from pi2rt.formats.pack import PackFile
from pi2rt.planner.laws import DecodeUse
from pi2rt.runtime.executor_statistics import StepUse
from pi2rt.runtime.step import NeuronUse
from tests.support.tiny_models import TinyModel, write_gguf


def test_a_rung_is_a_row() -> None:
    use = [
        StepUse(
            1, 5, 10_000_000, 0, NeuronUse(4096, 100, missed, 0, missed * 4096, 2 * missed, missed * 8192)
        )
        for missed in (10, 20, 30)
    ]
    run = {
        **each_token([0.0, 0.1, 0.2, 0.5]),
        "use": asdict(DecodeUse.of(use)),
        "flash": (0.0, 200.0),
        "flash_bytes": 160_000,
        "flash_wait": 0.25,
        "peak": 900,
    }
    cells = [cell.strip() for cell in row("cache", [run], 2.0, 1000, 1e9).strip("|").split("|")]
    assert cells == [
        "cache", "6.00", "3.0", "167 / 100 / 300 / 300", "20 / 30 (20.0%)", "40 / 60", "0 MB", "25%", "0.60", "0.900"
    ]  # fmt: skip


def test_packs_that_are_missing_are_made_for_the_time(tmp_path: Path) -> None:
    shape = TinyModel(config={"hidden_act": "relu"})
    source = write_gguf(tmp_path / "m.gguf", shape, weight_type="Q4_0")
    work = tmp_path / "work"
    work.mkdir()
    options = argparse.Namespace(gguf=str(source), pack=None, dense_pack=None, work=work)
    with packs(options, {rung.bundles for rung in RUNGS}) as found:
        for bundles, path in found.items():
            with PackFile(Path(path)) as file:
                assert bool(file.bundles) is bundles
        assert list(Path(work).iterdir())
    assert os.listdir(work) == []
    options.dense_pack = "mine"
    with packs(options, {False}) as found:
        assert found[False] == "mine"


def test_flash_is_measured_as_it_is_used(tmp_path: Path) -> None:
    shape = TinyModel("llama", seed=1, dim=512, hidden=2048, layers=2, heads=8, kv_heads=2, head_dim=64,
                      config={"hidden_act": "drelu"})  # fmt: skip
    source = write_gguf(tmp_path / "m.gguf", shape, weight_type="Q4_0")
    options = argparse.Namespace(gguf=str(source), pack=None, dense_pack=None, work=tmp_path)
    with packs(options, {True, False}) as found:
        stream, reads = flash_rates(found[True], 0.02)
        assert stream > 0
        assert reads > 0
        assert flash_rates(found[False], 0.02)[1] == 0


def test_without_two_tokens_there_is_no_latency() -> None:
    assert each_token([1.0]) == {}
    assert each_token([1.0, 1.5])["p99_ms"] == pytest.approx(500)
