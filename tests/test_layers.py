"""Imports go down. Layers and what they may import are in ``MAY_IMPORT``; a new layer is added there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folders as they are imported: pi2rt/ itself, and the top-level folders that install as subpackages of pi2rt.
FOLDERS = {
    "pi2rt": "pi2rt",
    "executors": "pi2rt.executors",
    "planner": "pi2rt.planner",
    "plugins": "pi2rt.plugins",
}

LOWER = frozenset({"errors", "formats", "tokenizer", "models", "memory", "runtime"})
BESIDE = frozenset({"cython_kernels", "executors", "planner"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "cython_kernels": frozenset({"errors"}),
    "formats": frozenset({"errors"}),
    "tokenizer": frozenset({"errors", "formats"}),
    "models": frozenset({"errors", "formats"}),
    "memory": LOWER - {"memory", "runtime"},
    "runtime": LOWER - {"runtime"},
    "engine": LOWER,
    "executors": LOWER | {"cython_kernels"},
    "planner": LOWER | {"cython_kernels"},
    "api": LOWER | BESIDE | {"engine"},
    "cli": LOWER | BESIDE | {"engine", "api"},
    "plugins": LOWER | BESIDE | {"engine", "api"},
}
FOLDERS_OF_LAYERS = frozenset(MAY_IMPORT) - {"errors", "api"}  # the API layer is the modules of pi2rt itself


LOWEST = (["_errors"], ["_limits"], ["_output_file"], ["_read_errors"])
"""Modules of pi2rt itself that everything may import."""


def layer_of(module: str) -> str:
    """The layer that a module of pi2rt belongs to."""
    parts = module.split(".")
    if parts[1:2] in LOWEST:
        return "errors"
    if parts[1:2] == ["__main__"]:  # the command line, where its script is not on the path
        return "cli"
    if len(parts) > 1 and parts[1] in FOLDERS_OF_LAYERS:
        return parts[1]
    return "api"


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(name for name in names if name != "__init__"))), path
    for path in sorted((ROOT / "cython_kernels").rglob("*.py")):
        yield f"pi2rt.cython_kernels.{path.stem}", path


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, name) of everything of pi2rt that a module imports, wherever in it. A name that may be a module
    or something in one is given as the longest form."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                (node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "pi2rt"
            )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            if base.split(".")[0] == "pi2rt":
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def offences(source: str, module: str, is_package: bool = False) -> list[str]:
    layer = layer_of(module)
    found = []
    for line, name in imported(source, module, is_package):
        target = layer_of(name)
        if name == "pi2rt.__version__":  # known before anything else of pi2rt is imported
            continue
        if target != layer and target not in MAY_IMPORT[layer]:
            found.append(f"line {line}: {module} ({layer}) imports {name} ({target})")
    return found


@pytest.mark.parametrize(("module", "path"), [pytest.param(*found, id=found[0]) for found in modules()])
def test_imports_go_down(module: str, path: Path) -> None:
    assert offences(path.read_text(), module, path.name == "__init__.py") == []


def test_every_folder_is_a_known_layer() -> None:
    folders = {path.name for path in (ROOT / "pi2rt").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= FOLDERS_OF_LAYERS, f"add {folders - FOLDERS_OF_LAYERS} to MAY_IMPORT"


def test_no_import_goes_both_ways() -> None:
    for layer, below in MAY_IMPORT.items():
        assert layer not in below
        for other in below:
            assert layer not in MAY_IMPORT[other], f"{layer} and {other}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pi2rt.formats.gguf", "from pi2rt.models import ModelDescription"),
        ("pi2rt.tokenizer.bpe", "import pi2rt.memory.page_pool"),
        ("pi2rt.models.llama", "def f():\n    from pi2rt.runtime.actor import Actor"),
        ("pi2rt.runtime.actor", "from pi2rt.executors.simulated import SimulatedExecutor"),
        ("pi2rt.runtime.actor", "from pi2rt import executors"),
        ("pi2rt.runtime.actor", "from ..executors import cpu"),
        ("pi2rt.memory.page_pool", "from pi2rt.runtime.step import PAGE_TOKENS"),
        ("pi2rt.memory.page_pool", "from pi2rt.runtime.actor import Actor"),
        ("pi2rt.engine.engine", "import pi2rt.cython_kernels.native"),
        ("pi2rt.engine.engine", "if TYPE_CHECKING:\n    from pi2rt import open_runtime"),
        ("pi2rt.executors.cpu", "from pi2rt.engine import Engine"),
        ("pi2rt.planner.placement", "from pi2rt.cli import main"),
        ("pi2rt.open_runtime", "from pi2rt.cli import main"),
        ("pi2rt.open_runtime", "from pi2rt.plugins.huggingface import fetch"),
        ("pi2rt._errors", "import pi2rt.formats"),
    ],
)
def test_the_test_finds(module: str, source: str) -> None:
    (offence,) = offences(source, module)
    assert offence.startswith("line ")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "pi2rt.runtime.actor",
            "from pi2rt.runtime.step import Step\nfrom pi2rt._errors import InternalError",
        ),
        ("pi2rt.runtime.actor", "from .step import Step\nimport trio, numpy.typing"),
        ("pi2rt.cli.main", "from pi2rt import __version__, open_runtime\nfrom pi2rt.engine import engine"),
        ("pi2rt.executors.cpu", "from pi2rt.cython_kernels.native import read_bandwidth"),
        ("pi2rt.formats.gguf", "from pi2rt import __version__"),
    ],
)
def test_the_test_allows(module: str, source: str) -> None:
    assert offences(source, module) == []


def test_relative_imports_are_resolved() -> None:
    assert list(imported("from .a import b\nfrom .. import c", "pi2rt.engine.x", False)) == [
        (1, "pi2rt.engine.a.b"),
        (2, "pi2rt.c"),
    ]
    assert list(imported("from .a import b", "pi2rt.engine", True)) == [(1, "pi2rt.engine.a.b")]
