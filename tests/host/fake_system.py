"""Little trees that look like /sys and /proc."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_tree(root: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def write_cpus(sys: Path, count: int, **files: Mapping[int, object]) -> None:
    """``cpu_capacity={0: 1024, ...}``: files of each core; "/" of a name is written "__"."""
    cpus = sys / "devices" / "system" / "cpu"
    write_tree(cpus, {"online": f"0-{count - 1}"})
    for core in range(count):
        (cpus / f"cpu{core}").mkdir(parents=True)
    for name, values in files.items():
        write_tree(cpus, {f"cpu{core}/{name.replace('__', '/')}": value for core, value in values.items()})
