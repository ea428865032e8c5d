"""Pages of memory: of this system, and of kernels whose pages are larger, imitated in processes of their own."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.flash import neuron_cache, stream
from pi2rt.cython_kernels.flash import reader as flash
from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import pack_header, row_blocks
from tests.support import large_pages
from tests.support.real_model import smollm2

ROOT = Path(__file__).parent.parent.parent
PAGE = native.page_bytes()

DISCARD = """
import numpy as np
from pi2rt.cython_kernels.kernels import native
page = native.page_bytes()
memory = native.Memory(8 * page)
assert memory.address % page == 0
for begin in range(0, 3 * page, 4096):
    for size in (0, 4096, page - 4096, page, page + 4096, 3 * page + 8192):
        memory.view()[:] = 7
        memory.discard(begin, size)
        first, last = -(-begin // page) * page, (begin + size) // page * page
        gone = np.zeros(8 * page, bool)
        gone[first:last] = True
        assert ((memory.view() == 0) == gone).all(), (begin, size)
print(page)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_pages.build(tmp_path_factory.mktemp("pages"))


def run(command: list[str], environment: dict[str, str], timeout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )


def test_sizes_are_those_of_the_system() -> None:
    assert os.sysconf("SC_PAGESIZE") == PAGE
    huge = native.huge_page_bytes()
    told = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    assert huge == (int(told.read_text()) if told.exists() else PAGE // 8 * PAGE)


def test_a_sector_is_one_number() -> None:
    sectors = {flash.SECTOR, stream.SECTOR, neuron_cache.PAGE, row_blocks.SECTOR, pack_header.ALIGNMENT}
    assert sectors == {4096}


@settings(max_examples=200, deadline=None)
@given(begin=st.integers(0, 4 * PAGE), size=st.integers(0, 4 * PAGE))
def test_only_whole_pages_of_the_range_are_given_back(begin: int, size: int) -> None:
    memory = native.Memory(8 * PAGE)
    memory.view()[:] = 7
    memory.discard(begin, size)
    gone = np.zeros(8 * PAGE, bool)
    gone[-(-begin // PAGE) * PAGE : (begin + size) // PAGE * PAGE] = True
    np.testing.assert_array_equal(memory.view() == 0, gone)
    memory.close()


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, PAGE + 1), (PAGE, 1), (2**62, 2**62)])
def test_ranges_outside_are_refused(offset: int, size: int) -> None:
    memory = native.Memory(PAGE)
    with pytest.raises(ValueError, match=f"{size} bytes from byte {offset} on are not in {PAGE} bytes"):
        memory.discard(offset, size)


@pytest.mark.parametrize("page_bytes", large_pages.SIZES)
def test_only_whole_pages_are_given_back_where_they_are_larger(library: Path, page_bytes: int) -> None:
    done = run(["-c", DISCARD], large_pages.environment(library, page_bytes), 60)
    assert (done.returncode, done.stdout) == (0, f"{page_bytes}\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page_bytes", large_pages.SIZES)
@pytest.mark.parametrize(
    "tests",
    [
        "tests/kernels/test_flash.py",
        "tests/executors/test_streaming.py",
        "tests/api/test_resize.py",
        "tests/api/test_windows.py",
    ],
)
def test_the_tests_that_give_memory_back_pass_where_pages_are_larger(
    library: Path, page_bytes: int, tests: str
) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    done = run(command, large_pages.environment(library, page_bytes), 900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


@pytest.mark.slow
def test_a_model_that_does_not_fit_answers_the_same_where_pages_are_larger(
    library: Path, tmp_path: Path
) -> None:
    pack = str(tmp_path / "smollm2.pi2")
    converted = run(["-m", "pi2rt", "convert", str(smollm2()), pack], dict(os.environ), 300)
    assert converted.returncode == 0, converted.stderr
    asked = ["-m", "pi2rt", "run", pack, "--memory", "190M", "--context", "512", "--temperature", "0"]
    asked += ["--max-tokens", "24", "-p", "Write one sentence about the sea."]
    expected = run(asked, dict(os.environ), 300)
    assert expected.returncode == 0, expected.stderr
    assert len(expected.stdout) > 50
    for page_bytes in large_pages.SIZES:
        done = run(asked, large_pages.environment(library, page_bytes), 300)
        assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr


# -- fork


def mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def flags(address: int) -> list[str]:
    """Of the mapping that has this address (proc_pid_smaps(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []


def test_a_forked_child_has_no_part_of_it() -> None:
    with mmap.mmap(-1, PAGE) as probe:
        probe.madvise(mmap.MADV_DONTFORK)
        kept = "dc" in flags(np.frombuffer(probe, np.uint8).ctypes.data)
    if not kept:
        pytest.skip("MADV_DONTFORK has no effect here (an emulator of user programs)")
    memory = native.Memory(4 * PAGE)
    memory.view()[:] = 5
    address = memory.address
    assert mapped(address)
    assert "dc" in flags(address)  # not copied on fork
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert not mapped(address)
            assert memory.address == 0
            for use in (memory.view, lambda: memory.discard(0, PAGE)):
                with pytest.raises(ValueError, match=r"closed|are not in"):
                    use()
            # what comes to lie there is somebody else's, and stays
            other = np.full(64 << 20, 3, np.uint8)
            assert memory.abandon()
            memory.close()
            assert (other == 3).all()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert (memory.view() == 5).all()
    memory.close()
    assert not mapped(address)
