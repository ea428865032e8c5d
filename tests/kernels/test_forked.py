"""What is native must not be ended by a forked child, which has none of its threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import mmap, os, signal, sys
from pi2rt.cython_kernels.flash import reader as flash
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.gang import Gang

memory, gang = native.Memory(1 << 20), Gang([-1, -1])
reader = flash.Reader(sys.argv[1], sys.argv[2], depth=2)
view = memory.view()
view[:] = 7
pid = os.fork()
if not pid:
    signal.alarm(30)  # a join of a thread that is not there never ends
    if sys.argv[3] == "close":
        gang.close(), reader.close(), memory.close()
    del view, memory, gang, reader
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
into = mmap.mmap(-1, 4096)
reader.submit(0, into, "tag")
assert [(tag, error) for tag, error, _ in reader.reap()] == [("tag", 0)]
assert into[:] == b"x" * 4096 and view.min() == 7
gang.close()
reader.close()
"""


@pytest.mark.parametrize("how", ["close", "drop"])
@pytest.mark.parametrize("io", ["preadv", "auto"])
def test_a_child_leaves_it_alone(io: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 8192)
    run = subprocess.run(
        [
            sys.executable,
            "-P",
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            CODE,
            str(tmp_path / "file"),
            io,
            how,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
