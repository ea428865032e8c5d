"""Packs that pi2rt makes by itself, of models that do not fit into the memory given: kept until the model changes.

The pack of a model is ``packs/NAME.PLACE.STATE.pi2`` in the cache directory. PLACE stands for where the model
lies, STATE for what its files are (names, sizes, times of change, inodes): when a file of the model was replaced
or written to, the pack is made anew, and the old one removed. Nothing but whole packs is ever given such a name; one
that was damaged since (its length or header is wrong) is made anew too."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import trio

from pi2rt import catalogue
from pi2rt._errors import ConversionError, ModelFormatError, ModelNotFoundError
from pi2rt.catalogue import download
from pi2rt.catalogue.download import PullProgress
from pi2rt.formats import open_model_file
from pi2rt.formats.pack import PackFile
from pi2rt.formats.pack_header import VERSION
from pi2rt.planner.pack.convert import convert, source_stamps

_log = logging.getLogger(__name__)

_DIGITS = 12  # of PLACE and STATE
_LONGEST_NAME = 160  # bytes; a file's name has 255 at most


def packs_directory() -> Path:
    return catalogue.cache_directory() / "packs"


async def ensure_pack(model: str | os.PathLike[str], on_progress: PullProgress | None = None) -> Path:
    """The pack of a model: the one that was made before, if the model has not changed, or a new one. A pack that is
    damaged is made again, with a warning in the log. Cancelling it leaves nothing behind.

    Args:
        model: as for ``open_runtime``; a pack is its own.
        on_progress: ``on_progress(stage, done, total)`` in bytes; stage is "waiting" (another process makes it) or
            "converting".

    Raises:
        ModelNotFoundError, ModelFormatError, UnsupportedModelError: the model cannot be read or converted.
        ConversionError: the disk is full or cannot be written to, or the model changed meanwhile.
    """
    path = catalogue.resolve(model)
    target = await trio.to_thread.run_sync(_pack_path, path)
    if target is None:
        return path
    report = on_progress or _ignore
    if await trio.to_thread.run_sync(_damage, target) is None:
        return target
    async with AsyncExitStack() as stack:
        try:
            lock = download.exclusive(
                target.with_name(_family(target).rstrip(".")), partial(report, "waiting", 0, 0)
            )
            await stack.enter_async_context(lock)
            damage = await trio.to_thread.run_sync(_damage, target)
            if damage is None:  # whoever held the lock has made it
                return target
            if damage:
                _log.warning("%s; the pack is made again", damage)
            _remove_others(target)  # first: there may be no room for both
        except OSError as error:
            problem = error.strerror or error
            raise ConversionError(f"{target.parent}: cannot be written to: {problem}; {_HINT}") from error
        await trio.to_thread.run_sync(_make, path, target, report)
    return target


_HINT = "PI2RT_CACHE may name another directory for it"


def _make(path: Path, target: Path, report: PullProgress) -> None:
    """On a worker thread, while its caller holds the lock."""

    def progress(done: int, total: int) -> None:
        trio.from_thread.check_cancelled()
        trio.from_thread.run_sync(report, "converting", done, total)

    try:
        convert(path, target, progress=progress)
    except ConversionError as error:
        raise ConversionError(f"{error}; {_HINT}") from error


def _damage(target: Path) -> str | None:
    """What is wrong with a pack; "" where there is none, None where nothing is. Only its length and header are looked
    at."""
    try:
        with PackFile(target):
            return None
    except ModelNotFoundError as error:
        return str(error) if os.path.lexists(target) else ""
    except ModelFormatError as error:
        return str(error)


def _remove_others(target: Path) -> None:
    """Packs of what the model was before, damaged ones, and what killed processes have left of them."""
    family = _family(target)
    for found in target.parent.iterdir():
        if found.name.removeprefix(".").startswith(family) and found.name.endswith((".pi2", ".pi2.part")):
            found.unlink(missing_ok=True)


def _pack_path(path: Path) -> Path | None:
    """Where the pack of a model is, or will be; None where the model is one."""
    with open_model_file(path) as file:
        if isinstance(file, PackFile):
            return None
        place = os.fsencode(path.resolve())
        state = repr((VERSION, source_stamps(file))).encode()
    stem = (os.fsencode(path.resolve().name)[:_LONGEST_NAME]).decode(errors="replace").replace("\ufffd", "_")
    return packs_directory() / f"{stem}.{_digest(place)}.{_digest(state)}.pi2"


def _family(target: Path) -> str:
    """What the packs of one model, past and present, have in common."""
    return target.name[: -len(".pi2") - _DIGITS]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGITS // 2).hexdigest()


def _ignore(stage: str, done: int, total: int) -> None: ...
