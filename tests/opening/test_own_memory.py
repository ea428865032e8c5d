"""What counts as the process's own part of a memory budget."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref

import pytest

from pi2rt.opening import own_memory
from pi2rt.opening.own_memory import OWN_MEMORY, OWN_MEMORY_LOADED, TOKEN_BYTES, OwnMemory
from tests.runtime.actor_bench import MODEL

MIB = 1 << 20
COMING = TOKEN_BYTES * MODEL.vocab_size


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Its last number is what is resident."""
    values = [50 * MIB]
    monkeypatch.setattr(own_memory, "rss_bytes", lambda: values[-1])
    return values


def test_growth_is_kept_free_once(resident: list[int]) -> None:
    own = OwnMemory()
    assert own.before_tokenizer(MODEL) == 50 * MIB + COMING + OWN_MEMORY
    resident.append(70 * MIB)
    assert own.with_tokenizer(MODEL) == 70 * MIB + OWN_MEMORY
    resident.append(72 * MIB)  # it was refused, and is opened again
    assert own.with_tokenizer(MODEL) == 72 * MIB + OWN_MEMORY_LOADED
    own.has_grown()
    assert own.with_tokenizer(MODEL) == 72 * MIB


def test_what_the_host_holds_counts(resident: list[int]) -> None:
    own = OwnMemory()
    first = own.with_tokenizer(MODEL)
    assert own.before_tokenizer(MODEL) == first  # free heap memory is used again
    resident.append(500 * MIB)
    assert own.before_tokenizer(MODEL) == 500 * MIB + COMING + OWN_MEMORY_LOADED
    assert own.with_tokenizer(MODEL) == 500 * MIB + OWN_MEMORY_LOADED


def test_garbage_does_not_count() -> None:
    class Node:
        me: Node

    node = Node()
    node.me = node
    dead = weakref.ref(node)
    gc.disable()
    try:
        del node
        assert dead() is not None
        OwnMemory().give_up_unused()
        assert dead() is None
    finally:
        gc.enable()


HEAP = """
import ctypes, os, re, sys, threading
from pathlib import Path
from pi2rt.opening.own_memory import OwnMemory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
own = OwnMemory()


def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


def use():  # a thread has a heap of its own, whose end malloc_trim does not give back
    libc.free(libc.malloc(16 << 20))  # from now on glibc would keep 32 MiB there
    blocks = [libc.malloc(100_000) for _ in range(160)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks:
        libc.free(block)
    done.set()
    end.wait()


own.give_up_unused()
before, done, end = rss(), threading.Event(), threading.Event()
thread = threading.Thread(target=use)
thread.start()
done.wait()
own.give_up_unused()
print(rss() - before)
end.set()
"""


def test_threads_give_their_heaps_back() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("heaps of threads, as glibc has them")
    done = subprocess.run([sys.executable, "-P", "-c", HEAP], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * 1024
