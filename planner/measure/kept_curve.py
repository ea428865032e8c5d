"""Measured curves, kept for the next time: one file for each device that holds models.

A device is known by the number that the system gives it and by its size, so that another disk under the same number is
not taken for it. A file that cannot be read, or of another version, is as good as none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pi2rt._errors import RequestError
from pi2rt.host.output_file import OutputFile
from pi2rt.planner.measure.read_curve import Io, ReadCurve

VERSION = 1


@dataclass(frozen=True, slots=True)
class KeptCurve:
    """``device``: see ``device_of``; ``date``: of the measurement, "2026-11-23"."""

    version: int
    device: str
    date: str
    curve: ReadCurve


def device_of(path: str | os.PathLike[str]) -> str:
    """The device that holds a file or folder, such as "254:0 536870912 sectors".

    Raises:
        OSError: there is no such file.
    """
    number = os.stat(path).st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    try:
        return f"{name} {int(Path(f'/sys/dev/block/{name}/size').read_text())} sectors"
    except (OSError, ValueError):  # not a block device: a network's or the memory's file system
        return name


def keep_curve(folder: Path, path: str | os.PathLike[str], curve: ReadCurve, date: str) -> Path:
    """Writes the curve of the device that holds ``path``, in one step; returns the file.

    Raises:
        RequestError, OutputError: it cannot be written.
        OSError: there is no such ``path``.
    """
    device = device_of(path)
    with place_for_curve(folder, path) as file:
        file.write(msgspec.json.encode(KeptCurve(VERSION, device, date, curve)))
        file.commit()
    return file.path


def place_for_curve(folder: Path, path: str | os.PathLike[str]) -> OutputFile:
    """Where the curve of the device that holds ``path`` will be written.

    Raises:
        RequestError: it cannot be written there.
        OSError: there is no such ``path``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be made: {error.strerror}") from error
    return OutputFile(_file(folder, device_of(path)))


def kept_curves(folder: Path) -> list[KeptCurve]:
    """All that can be read, in the order of their files' names."""
    try:
        files = sorted(folder.glob("*.json"))
    except OSError:  # the folder cannot be searched
        return []
    found = [_read(file) for file in files]
    return [kept for kept in found if kept is not None]


def kept_curve(folder: Path, path: str | os.PathLike[str], io: Io = "auto") -> KeptCurve | None:
    """The curve of the device that holds ``path``, measured with this backend; None: there is none."""
    try:
        device = device_of(path)
    except OSError:
        return None
    kept = _read(_file(folder, device))
    return kept if kept is not None and kept.device == device and io in ("auto", kept.curve.io) else None


def _read(file: Path) -> KeptCurve | None:
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=KeptCurve)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    points = kept.curve.points
    sound = all(point.read_bytes > 0 and point.depth > 0 and point.bytes_per_second >= 0 for point in points)
    patterns = {point.pattern for point in points}
    return kept if kept.version == VERSION and sound and patterns == {"random", "sequential"} else None


def _file(folder: Path, device: str) -> Path:
    return folder / f"{device.split()[0].replace(':', '-')}.json"
