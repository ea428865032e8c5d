"""The shared library that all Cython modules link (``cython_kernels/meson.build``)."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libpi2rt_plane.so"
MODULES = sorted(
    f"pi2rt.cython_kernels.{path.parent.name}.{path.stem}" for path in ROOT.glob("cython_kernels/*/*.pyx")
)

pytestmark = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="nm and readelf (binutils) are not installed"
)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(path: Path, which: str) -> set[str]:
    """Dynamic ones of pi2rt; ``which``: "--defined-only" or "--undefined-only"."""
    names = {line.split()[-1] for line in output("nm", "-D", which, path).splitlines()}
    return {name for name in names if name.startswith("pi2_")}


@pytest.fixture(scope="module")
def modules() -> list[Path]:
    files = [importlib.import_module(name).__file__ for name in MODULES]
    return [Path(file) for file in files if file is not None]


@pytest.fixture(scope="module")
def library(modules: list[Path]) -> Path:
    """As the loader has found it: the modules are imported, and there is one."""
    maps = Path("/proc/self/maps").read_text()
    (path,) = set(re.findall(rf"/.*/{re.escape(LIBRARY)}$", maps, re.MULTILINE))
    return Path(path)


def test_it_exports_what_the_modules_call(modules: list[Path], library: Path) -> None:
    called = {name for module in modules for name in symbols(module, "--undefined-only")}
    assert symbols(library, "--defined-only") == called
    assert "pi2_program_prepare" in called


def test_no_module_has_native_code_of_its_own(modules: list[Path]) -> None:
    assert len(modules) == len(MODULES)
    for module in modules:
        links = f"[{LIBRARY}]" in output("readelf", "-d", module)
        assert links == bool(symbols(module, "--undefined-only"))
        assert symbols(module, "--defined-only") == set()


def test_modules_find_it_wherever_the_package_lies(modules: list[Path], library: Path) -> None:
    for module in [*modules, library]:
        for places in re.findall(r"R(?:UN)?PATH\).*\[(.*)\]", output("readelf", "-d", module)):
            assert all(place.startswith("$ORIGIN") for place in places.split(":")), (module, places)
    assert all(f"{module.parent}/".startswith(f"{library.parent}/") for module in modules)
