"""The documents' blocks, run as a reader would run them: in order, in one folder for each document, with the real
model under the names that the document uses for a model of the reader's own, and a tiny one with ReLU."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pi2rt.cli.main import _parser
from tests.docs.document_blocks import Block, Command, blocks
from tests.support.real_model import smollm2
from tests.support.tiny_models import TinyModel, write_gguf

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])
BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
RUNNABLE = [block for block in BLOCKS if block.language in ("python", "console") and block.note != "file"]
OWN_MODELS = ("model.gguf", "big.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf")
"""What documents call a model file that the reader has."""
RELU_MODEL = "relu.gguf"
"""What they call one with ReLU feed-forward blocks."""
RELU = TinyModel(
    "llama", seed=1, dim=256, hidden=1024, layers=2, heads=4, kv_heads=2, head_dim=64, config={"hidden_act": "drelu"}
)  # fmt: skip

_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_NUMBER = re.compile(r"\d+(\.\d+)?( (ms|s|bytes|[KMG]iB)\b)?")


def documents(*, slow: bool) -> list[Path]:
    """Those with a block to run. All blocks of a document are run in the slow tests if one of them is slow, since each
    may need what the ones before it have made. Those that write files are tutorials, which have tests of their own."""
    tutorials = {block.document for block in BLOCKS if block.note == "file"}
    return [
        document
        for document in DOCUMENTS
        if document not in tutorials
        and (runs := [block for block in RUNNABLE if block.document == document and block.note != "not run"])
        and slow == any(block.note == "slow" for block in runs)
    ]


@pytest.mark.parametrize("document", documents(slow=False), ids=lambda path: path.name)
def test_the_blocks_of_a_document_run(document: Path, tmp_path: Path) -> None:
    run_document(document, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("document", documents(slow=True), ids=lambda path: path.name)
def test_the_blocks_of_a_long_document_run(document: Path, tmp_path: Path) -> None:
    run_document(document, tmp_path)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    smollm2()
    done = run([sys.executable, str(example)], tmp_path)
    assert len(done.split()) > 20


def test_documents_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "design.md", "performance.md"} <= {
        path.name for path in DOCUMENTS
    }
    assert len(RUNNABLE) > 15


@pytest.mark.parametrize("block", [block for block in RUNNABLE if block.note == "not run"], ids=str)
def test_what_is_not_run_names_what_there_is(block: Block) -> None:
    """Commands that take too long are parsed: subcommands and options, benchmarks and their options, test files."""
    if block.language == "python":
        compile(block.text, str(block), "exec")
        return
    for command in block.commands():
        for part in command.text.split(" && "):
            words = [word for word in shlex.split(part, comments=True) if not _ASSIGNMENT.match(word)]
            check_words(words)


def check_words(words: list[str]) -> None:
    program, *rest = words
    if program == "pi2rt":
        _parser().parse_args(rest)
    elif rest and rest[0].startswith("benchmarks/"):
        assert program in ("python", "peer/bin/python")
        script = (ROOT / rest[0]).read_text()
        for option in rest[1:]:
            if option.startswith("--"):
                assert f'"{option}"' in script or f'"{option}"' in helpers(script), (words, option)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    else:
        assert program in (".", "pip", "python3", "peer/bin/pip"), words


def helpers(script: str) -> str:
    """The text of the modules beside a benchmark that it imports."""
    names = re.findall(r"^from (\w+) import", script, re.MULTILINE)
    paths = [ROOT / "benchmarks" / f"{name}.py" for name in names]
    return "".join(path.read_text() for path in paths if path.is_file())


def run_document(document: Path, folder: Path) -> None:
    model = smollm2()
    for name in OWN_MODELS:
        (folder / name).symlink_to(model)
    write_gguf(folder / RELU_MODEL, RELU, weight_type="Q4_0")
    shutil.copy(ROOT / "tests" / "golden" / "text.txt", folder / "text.txt")
    for name in ("benchmarks", "docs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for block in RUNNABLE:
        if block.document != document or block.note == "not run":
            continue
        if block.language == "python":
            run([sys.executable, "-W", "error", "-c", block.text], folder)
            continue
        for command in block.commands():
            shown = run(["bash", "-c", command.text], folder)
            assert_like(command, shown, block)


def run(command: list[str], folder: Path) -> str:
    """Output and errors of a command that must succeed. Its cache is in the folder, but for the model."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "120"}
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


def assert_like(command: Command, shown: str, block: Block) -> None:
    """What the document shows is what the command prints: the same words, and numbers where it has numbers. A last line
    of dots stands for more."""
    if command.output:
        expected, printed = words_of(command.output), words_of(shown)
        if expected[-1] == "...":
            expected.pop()
            printed = printed[: len(expected)]
        assert expected == printed, f"{block}: {command.text}"


def words_of(text: str) -> list[str]:
    return _NUMBER.sub("#", text).split()


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name
)
def test_lines_have_120_columns(path: Path) -> None:
    """But for code blocks: commands are one line each, and so is what they print."""
    long, code = [], False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code ^= line.startswith("```")
        if len(line) > 120 and not code:
            long.append(number)
    assert long == []
