"""A forked child is told that an engine belongs to its parent; the parent notices nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pi2rt
from pi2rt.planner.pack.convert import convert
from tests.support.tiny_models import TinyModel, write_gguf

REFUSED = "ClosedError: this engine belongs to another process (PID {}); open one in this process"
HARMLESS = {"close", "drain", "with", "close stream", "leave stream"}


def forked(*arguments: object) -> list[dict[str, Any]]:
    """What the processes of ``forking.py`` print, the parent last. None of them may hang or fail."""
    run = subprocess.run(
        [
            sys.executable,
            "-P",
            "-W",
            "ignore::DeprecationWarning",
            str(Path(__file__).with_name("forking.py")),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    found: list[dict[str, Any]] = [json.loads(line) for line in run.stdout.splitlines()]
    return found


def refused(seen: dict[str, str], parent: dict[str, Any]) -> None:
    for name, said in seen.items():
        assert said == ("no error, but None" if name in HARMLESS else REFUSED.format(parent["pid"])), name


def test_a_child_that_leaves_by_the_interpreters_exit(tiny: Path) -> None:
    seen, own, parent = forked("exit", tiny)
    refused(seen, parent)
    assert own["tokens"] == parent["tokens"]
    assert (parent["status"], parent["went_on"], parent["subprocess"]) == (0, True, "7")


def test_a_process_of_multiprocessing(tiny: Path) -> None:
    seen, apart, own, parent = forked("multiprocessing", tiny)
    refused(seen, parent)
    refused(apart, parent)
    assert own["tokens"] == parent["tokens"]
    assert (parent["status"], parent["went_on"]) == (0, True)


def test_a_child_of_a_trio_task(tiny: Path) -> None:
    seen, parent = forked("trio", tiny)
    refused(seen, parent)
    assert (parent["status"], parent["went_on"]) == (0, True)


def test_a_child_of_an_engine_whose_model_has_windows(tmp_path: Path) -> None:
    """The child has nothing of the windowed area either."""
    config = {"sliding_window": 16, "sliding_window_pattern": 3}
    model = TinyModel("gemma3_text", layers=4, context=512, config=config)
    seen, own, parent = forked("exit", write_gguf(tmp_path / "m.gguf", model))
    refused(seen, parent)
    assert own["tokens"] == parent["tokens"]
    assert (parent["status"], parent["went_on"]) == (0, True)


async def test_a_child_of_an_engine_that_reads_from_flash(tmp_path: Path) -> None:
    """Its readers have threads, and a ring that the child shares."""
    model = TinyModel(context=512, dim=256, hidden=1024, layers=12, heads=4, kv_heads=4, head_dim=64)
    pack = tmp_path / "m.pi2"
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="F32"), pack)
    with pytest.raises(pi2rt.MemoryBudgetError) as error:
        async with pi2rt.open_runtime(pack, context=128, memory=1):
            pass
    least = re.search(r"least is (\d+) MiB", str(error.value))
    assert least is not None
    memory = f"{int(least[1]) + 40}M"  # the child's own engine needs the parent's copied heap beside it
    seen, own, parent = forked("exit", pack, memory)
    refused(seen, parent)
    assert own["tokens"] == parent["tokens"]
    assert (parent["status"], parent["went_on"]) == (0, True)
