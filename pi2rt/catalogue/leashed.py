"""``python -m pi2rt.catalogue.leashed MODULE ARGUMENTS...``: runs a module in a process that ends when its parent
does.

The parent holds the other end of standard input and writes nothing. However it dies, the kernel closes that
end, the read here returns, and no orphan goes on downloading into a directory that the next pull is about to
remove.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _follow_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_follow_parent, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
