"""A device that does not answer: steps fail in time, and closing ends. Reads are made to hang in a process of its own,
by a library that is loaded before the C library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pi2rt.planner.pack.convert import convert
from tests.support.tiny_models import TinyModel, write_gguf

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, for reads that hang")

SIZES = {"dim": 256, "hidden": 1216, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64}
MODELS = {
    "stream": TinyModel("llama", seed=1, **SIZES),  # type: ignore[arg-type]
    "neurons": TinyModel("llama", seed=2, config={"hidden_act": "drelu"}, **SIZES),  # type: ignore[arg-type]
    "experts": TinyModel("mixtral", seed=3, **SIZES),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hang") / "hang.so"
    assert COMPILER is not None
    source = str(HERE / "hanging_preadv.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", str(path), source, "-ldl"], check=True)
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_a_read_that_hangs_fails_the_step_and_closing_ends(kind: str, library: Path, tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "m.gguf", MODELS[kind], weight_type="Q4_0"), tmp_path / "m.pi2")
    environment = os.environ | {"LD_PRELOAD": str(library), "HANG": str(tmp_path / "hang")}
    # the checkout last: what is installed is tested
    start = f"import sys, runpy; sys.path.append({str(HERE.parent.parent)!r}); "
    start += "runpy.run_module('tests.executors.hang_and_recover', run_name='__main__')"
    command = [sys.executable, "-P", "-c", start, kind, str(tmp_path / "m.pi2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["worked", "hung", "hung", "recovered", "hung", "closed"]
