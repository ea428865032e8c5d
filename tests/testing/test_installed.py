"""What the suite needs: pytest where it is used, and nothing else that pi2rt does not need itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUITE = """
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.testing import StepExecutorConformance, Tolerance


class TestReference(StepExecutorConformance):
    models = ("llama",)
    tolerance = Tolerance(reference=1e-4, repeat=1e-4)

    def make_executor(self):
        return ReferenceExecutor()
"""
FOR_TESTS_ONLY = ("gguf", "hypothesis", "safetensors", "pytest_trio")


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_nothing_else_imports_it(tmp_path: Path) -> None:
    script = (
        "import sys, pi2rt, pi2rt.api.runtime, pi2rt.cli.main; "
        "print([name for name in ('pytest', 'pi2rt.testing') if name in sys.modules])"
    )
    assert run([sys.executable, "-c", script], tmp_path) == "[]\n"


def test_it_runs_without_plug_ins_and_packages_of_our_own_tests(tmp_path: Path) -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in FOR_TESTS_ONLY)
    (tmp_path / "conftest.py").write_text(f"import sys\n{blocked}")
    (tmp_path / "test_reference.py").write_text(SUITE)
    plugins = [word for name in ("trio", "anyio", "hypothesispytest") for word in ("-p", f"no:{name}")]
    few = ["-k", "progress or chunks or top_k or logits_of_a_prompt"]
    shown = run([sys.executable, "-m", "pytest", "-q", "-W", "error", *plugins, *few], tmp_path)
    assert "4 passed" in shown
