"""A new virtual environment that sees what is installed in this one, to install packages into."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

_COMMANDS = ("pi2rt", "pytest")


def fresh_environment(folder: Path) -> dict[str, str]:
    """Makes one in ``folder``, and returns the variables with which commands use it. ``pi2rt`` and ``pytest`` are
    commands in it."""
    venv.create(folder, with_pip=True)
    scripts = folder / "bin"
    site = subprocess.run(
        [scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # by site.addsitedir, so that editable installs are found too
    ours = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in ours)
    (Path(site) / "outer.pth").write_text(lines)
    for name in _COMMANDS:
        script = scripts / name
        script.write_text(f'#!/bin/sh\nexec "{scripts}/python" -m {name} "$@"\n')
        script.chmod(0o755)
    path = f"{scripts}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": str(folder), "COLUMNS": "120"}
