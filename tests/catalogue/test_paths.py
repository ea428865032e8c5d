"""Names, homes and caches that cannot be looked up: told as such, and never in the way of a model given as a path."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pi2rt import catalogue
from pi2rt._errors import ModelNotFoundError
from pi2rt.formats import open_model_file
from pi2rt.planner.measure.kept_curve import kept_curves
from tests.support.limited import run_limited
from tests.support.tiny_models import TinyModel, write_gguf

LONG = "n" * 300


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LONG, f"'{LONG}': cannot be opened: File name too long"),
        (f"./{LONG}", "cannot be opened: File name too long"),
        (Path(LONG), "cannot be opened: File name too long"),
        (f"/tmp/{'x/' * 3000}m.gguf", "cannot be opened: File name too long"),
        (f"hf:org/repo/{LONG}.gguf", "a name in it is longer than 200 bytes"),
        ("hf:org/repo/a\0b.gguf", "must be names separated by '/'"),
        ("a\0b.gguf", r"'a\\x00b.gguf': cannot be opened: embedded null byte"),
        ("/a\0b.gguf", "embedded null byte"),
        ("~nobody-at-all/m.gguf", "'~nobody-at-all/m.gguf': no user 'nobody-at-all' is known"),
        ("/nothing/m.gguf", "'/nothing/m.gguf': no such file"),
        (Path("nothing.gguf"), "'nothing.gguf': no such file"),
        ("loop", "'loop': cannot be opened: Too many levels of symbolic links"),
    ],
    ids=lambda value: str(value)[:12].replace("\0", ""),
)
def test_a_model_that_cannot_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | Path, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(ModelNotFoundError) as error:
        catalogue.resolve(model)
    assert message.replace("\\\\", "\\") in str(error.value)
    with pytest.raises(ModelNotFoundError):
        open_model_file(model if isinstance(model, Path) else Path(model))


def test_a_file_whose_name_begins_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~nobody-at-all").touch()
    assert catalogue.resolve("~nobody-at-all") == Path("~nobody-at-all")


def test_a_path_asks_no_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PI2RT_CATALOGUE", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    model = write_gguf(tmp_path / "m.gguf", TinyModel())
    for given in (str(model), "./m.gguf", f"../{tmp_path.name}/m.gguf", model):
        assert not catalogue.is_fetchable(given)
        assert catalogue.resolve(given).samefile(model)
    with pytest.raises(ModelNotFoundError, match="PI2RT_CATALOGUE="):
        catalogue.resolve("m.gguf")  # may be a name of it


@pytest.fixture
def model() -> Iterator[Path]:
    """Where any user may read it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield write_gguf(folder / "tiny.gguf", TinyModel())
    shutil.rmtree(folder)


def commands(cache: Path, then: str) -> str:
    """A program that runs commands with a cache, does something, becomes a stranger, and runs them and more again."""
    return f"""
from pi2rt.cli.main import main
os.environ["PI2RT_CACHE"] = {str(cache)!r}
commands = [
    ["run", sys.argv[1], "-p", "hi", "-n", "2", "--raw", "--context", "64", "--executor", "reference"],
    ["info"],
    ["models"],
]
for command in commands:
    main(command)  # everything is imported
{then}
become_stranger()
sys.stderr.write("begin\\n")
print([main(command) for command in (*commands, ["run", "smollm2", "-p", "x"], ["pull", "smollm2"])])
"""


def test_without_a_home_directory(model: Path, tmp_path: Path) -> None:
    homeless = "for name in ('HOME', 'PI2RT_CACHE', 'XDG_CACHE_HOME'): os.environ.pop(name, None)"
    done = run_limited(commands(tmp_path, homeless), model)
    errors = done.stderr.partition("begin\n")[2]
    assert done.stdout.endswith("[0, 0, 0, 2, 2]\n"), done.stderr
    why = "there is no cache directory: HOME is not set, and user 54321 has no entry in the password database; set HOME"
    assert errors.count(f"pi2rt: error: {why} or PI2RT_CACHE\n") == 2
    assert f"cache: none: {why}" in done.stdout


def test_with_a_cache_that_may_not_be_searched(model: Path) -> None:
    cache = model.parent / "cache"
    (cache / "models").mkdir(parents=True)
    (cache / "flash").mkdir()
    done = run_limited(commands(cache, f"os.chmod({str(cache)!r}, 0o700)"), model)
    errors = done.stderr.partition("begin\n")[2]
    assert done.stdout.endswith("[0, 0, 0, 2, 2]\n"), done.stderr
    assert (
        errors.count("cannot be looked up in the cache directory: Permission denied: a directory on its way")
        == 2
    )
    assert errors.count("PI2RT_CACHE may name another one") == 2


def test_a_folder_of_curves_that_cannot_be_searched(model: Path) -> None:
    folder = model.parent / "flash"
    folder.mkdir(mode=0o700)
    program = """
from pi2rt.planner.measure.kept_curve import kept_curves
from pathlib import Path
become_stranger()
print(kept_curves(Path(sys.argv[1])))
"""
    assert run_limited(program, folder).stdout == "[]\n"
    assert kept_curves(folder) == []


def test_a_directory_of_a_model_that_may_not_be_searched(model: Path) -> None:
    folder = model.parent / "hidden"
    folder.mkdir(mode=0o700)
    program = """
from pi2rt import ModelNotFoundError, catalogue, formats
import pi2rt.formats.gguf, pi2rt.formats.huggingface, pi2rt.formats.pack
become_stranger()
for look in (catalogue.resolve, formats.open_model_file):
    try:
        look(sys.argv[1])
    except ModelNotFoundError as error:
        print(error)
"""
    lines = run_limited(program, folder / "m.gguf").stdout.splitlines()
    assert len(lines) == 2
    assert all("m.gguf" in line and "cannot be opened: Permission denied" in line for line in lines)


def test_names_of_files_in_the_cache_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path))
    models = tmp_path / "models"
    models.mkdir()
    (models / "dangling.gguf").symlink_to("nothing")
    (models / "there.gguf").write_bytes(b"x")
    assert [(each.path.name, each.size) for each in catalogue.installed()] == [("there.gguf", 1)]
    assert os.listdir(models)
