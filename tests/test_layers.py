"""Imports go down. Layers and what they may import are in ``MAY_IMPORT``; a new layer is added there."""

from __future__ import annotations

import ast
import re
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
    "cython_kernels": "pi2rt.cython_kernels",
}

CODE = frozenset({".py", ".pyx", ".pxd"})

IN_ORDER = (
    "errors",
    "host",
    "cython_kernels.kernels",
    "cython_kernels.flash",
    "formats",
    "tokenizer",
    "models",
    "memory",
    "catalogue",
    "runtime",
    "cython_kernels.plane",
)
"""Each may import those before it, except as ``NARROWER`` says."""

NARROWER: dict[str, frozenset[str]] = {
    "cython_kernels.flash": frozenset({"errors", "host"}),
    "formats": frozenset({"errors", "host"}),
    "tokenizer": frozenset({"errors", "host", "formats"}),
    "models": frozenset({"errors", "host", "formats"}),
    "memory": frozenset({"errors", "host", "formats", "models", "cython_kernels.kernels"}),
    "catalogue": frozenset({"errors", "host", "formats"}),
    "runtime": frozenset({"errors", "host", "formats", "models", "memory"}),
    "cython_kernels.plane": frozenset(
        {"errors", "host", "cython_kernels.kernels", "cython_kernels.flash", "runtime"}
    ),
}

BELOW = frozenset(IN_ORDER) - {"catalogue"}
MAY_IMPORT: dict[str, frozenset[str]] = {
    layer: NARROWER.get(layer, frozenset(IN_ORDER[:at])) for at, layer in enumerate(IN_ORDER)
} | {
    "engine": frozenset({"errors", "host", "tokenizer", "memory", "runtime"}),
    "executors": BELOW - {"tokenizer"},
    "planner": BELOW - {"tokenizer"},
    "opening": frozenset(IN_ORDER) | {"engine", "planner"},
    "api": frozenset(IN_ORDER) | {"engine", "planner", "opening"},
    "tools": frozenset(IN_ORDER) | {"engine", "executors", "planner", "opening", "api"},
    "cli": frozenset(IN_ORDER) | {"engine", "executors", "planner", "opening", "api", "tools"},
    "testing": frozenset(IN_ORDER) | {"executors"},
    "plugins": frozenset(IN_ORDER) | {"engine", "executors", "planner", "opening", "api"},
}


def layer_of(module: str) -> str:
    """The layer that a module of pi2rt belongs to."""
    parts = module.split(".")
    if parts[1:] == ["cython_kernels"]:  # empty
        return "errors"
    if parts[1:2] == ["cython_kernels"]:
        return ".".join(parts[1:3])
    if parts[1:2] == ["_errors"]:
        return "errors"
    if parts[1:2] == ["__main__"]:  # the command line, where its script is not on the path
        return "cli"
    if len(parts) > 1 and parts[1] in MAY_IMPORT:
        return parts[1]
    return "api"  # names of pi2rt itself


def modules() -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in CODE):
            names = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(name for name in names if name != "__init__"))), path


def as_python(source: str) -> str:
    """What a Cython module imports and cimports, each on the line where it was."""
    statement = re.compile(r"\s*(from [\w.]+ c?import [\w*, ]+|c?import [\w.]+( as \w+)?)$")
    return "\n".join(
        line.strip().replace("cimport ", "import ") if statement.match(line) else ""
        for line in source.split("\n")
    )


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
    source = path.read_text()
    if path.suffix != ".py":
        source = as_python(source)
    assert offences(source, module, path.name == "__init__.py") == []


def test_every_folder_is_a_known_layer() -> None:
    folders = {path.name for path in (ROOT / "pi2rt").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(MAY_IMPORT), f"add {folders - set(MAY_IMPORT)} to MAY_IMPORT"


def test_the_root_holds_no_more_than_names_and_errors() -> None:
    assert {path.name for path in (ROOT / "pi2rt").glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "_errors.py",
    }


def test_imports_of_cython_are_found() -> None:
    source = (
        "from libc.stdint cimport int8_t\nfrom pi2rt.cython_kernels.plane.gang cimport Gang\n\n"
        "cdef f():\n    from pi2rt.runtime.step import Step, Slice\n"
    )
    assert list(imported(as_python(source), "pi2rt.cython_kernels.flash.x", False)) == [
        (2, "pi2rt.cython_kernels.plane.gang.Gang"),
        (5, "pi2rt.runtime.step.Step"),
        (5, "pi2rt.runtime.step.Slice"),
    ]


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
        ("pi2rt.runtime.actor", "from pi2rt.executors.simulated.executor import SimulatedExecutor"),
        ("pi2rt.runtime.actor", "from pi2rt import executors"),
        ("pi2rt.runtime.actor", "from ..executors import cpu"),
        ("pi2rt.memory.page_pool", "from pi2rt.runtime.step import PAGE_TOKENS"),
        ("pi2rt.memory.page_pool", "from pi2rt.runtime.actor import Actor"),
        ("pi2rt.engine.engine", "import pi2rt.cython_kernels.kernels.native"),
        ("pi2rt.cython_kernels.flash.reader", "from pi2rt.runtime.step import Step"),
        ("pi2rt.engine.engine", "if TYPE_CHECKING:\n    from pi2rt import open_runtime"),
        ("pi2rt.executors.cpu.executor", "from pi2rt.engine import Engine"),
        ("pi2rt.planner.placement", "from pi2rt.cli import main"),
        ("pi2rt.api.runtime", "from pi2rt.cli import main"),
        ("pi2rt.api.runtime", "from pi2rt.plugins.huggingface import fetch"),
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
        ("pi2rt.executors.cpu.executor", "from pi2rt.cython_kernels.kernels.native import read_bandwidth"),
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
