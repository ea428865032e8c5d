"""Documents that make a package: their files are those of an example, and their commands work in an empty folder."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.docs.document_blocks import Block, blocks
from tests.support.fresh_environment import fresh_environment
from tests.support.real_model import smollm2
from tests.support.tiny_models import TinyModel, write_gguf

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PACKAGES = sorted(path.parent.name for path in EXAMPLES.glob("*/pyproject.toml"))
TUTORIALS = {"cluster-units.md": "numpy_cluster_unit", "executors.md": "numpy_executor"}
"""Documents, and the example that each of them makes."""

SHOWN = {
    "cluster-units.md": ("numpy: numpy_cluster_unit.unit:NumpyUnit", "generated: 8 tokens"),
    "executors.md": ("numpy: numpy_executor.executor:NumpyExecutor", "generated: 8 tokens"),
}
"""What the commands of each print."""
PASSED = re.compile(r"\d+ passed(, \d+ skipped)? in ")
"""Of pytest; what an executor says that it does not do is skipped."""

RELU = TinyModel(
    "llama", dim=256, hidden=2048, layers=2, heads=4, kv_heads=2, head_dim=64, config={"hidden_act": "drelu"}
)


def run(command: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
    return done.stdout


def files(document: str) -> dict[str, Block]:
    """Blocks that are files, by path."""
    return {block.reason: block for block in blocks(ROOT / "docs" / document) if block.note == "file"}


def sources(example: str) -> dict[str, str]:
    """The files of an example that are no output of a build, by path."""
    folder = EXAMPLES / example
    found = [path for path in folder.rglob("*") if path.suffix in (".py", ".toml", ".md")]
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in found
        if "build" not in path.relative_to(folder).parts
    }


@pytest.mark.parametrize(("document", "example"), TUTORIALS.items())
def test_the_files_of_a_tutorial_are_those_of_the_example(document: str, example: str) -> None:
    assert {path: block.text for path, block in files(document).items()} == sources(example)


@pytest.mark.slow
@pytest.mark.parametrize("document", TUTORIALS)
def test_a_tutorial_works_in_an_empty_folder(document: str, tmp_path: Path) -> None:
    smollm2()
    environment = fresh_environment(tmp_path / "environment")
    folder = tmp_path / "empty"
    folder.mkdir()
    write_gguf(folder / "relu.gguf", RELU, weight_type="Q4_0")
    shown = ""
    for block in blocks(ROOT / "docs" / document):
        if block.note == "file":
            path = folder / block.reason
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.language == "console" and block.note != "not run":
            for command in block.commands():
                shown += run(["bash", "-c", command.text], folder, environment)
    for part in SHOWN[document]:
        assert part in shown
    assert PASSED.search(shown)
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("example", PACKAGES)
def test_an_example_package_installs_and_passes_its_tests(example: str, tmp_path: Path) -> None:
    for path, text in sources(example).items():
        target = tmp_path / "package" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    environment = fresh_environment(tmp_path / "environment")
    run(["pip", "install", "--quiet", "./package"], tmp_path, environment)
    shutil.move(tmp_path / "package" / "tests", tmp_path / "tests")  # so that they test what is installed
    shown = run(["pytest", "-q", "tests"], tmp_path, environment)
    assert PASSED.search(shown)


def test_every_package_of_the_examples_has_a_tutorial() -> None:
    assert set(TUTORIALS.values()) == set(PACKAGES)
