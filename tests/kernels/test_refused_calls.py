"""System calls that a sandbox refuses, whatever it does to their callers: pi2rt goes another way, and says why."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pi2rt.planner.pack.convert import convert
from tests.kernels import refused
from tests.support.tiny_models import TinyModel, write_gguf

DEADLY = tuple(refused.ACTIONS)
URING = tuple(refused.URING)
BY_SECCOMP = "io_uring: refused by seccomp (SIGSYS)"
BY_ERROR = "io_uring: not permitted by this system (EPERM)"
ACTIONS = (*DEADLY, str(errno.EPERM))
ABSENT = {"trap": BY_SECCOMP, str(errno.ENOSYS): "io_uring: not in this kernel, or older than 5.11 (ENOSYS)"}


def run(action: str, calls: tuple[str, ...], *module: str) -> subprocess.CompletedProcess[str]:
    command = refused.command(action, calls, *module)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "Skipped" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    return done


@pytest.mark.parametrize(
    ("action", "calls"),
    [*(("trap", (call,)) for call in refused.URING), *((action, URING) for action in DEADLY)],
)
def test_info_says_that_seccomp_refuses_io_uring(action: str, calls: tuple[str, ...]) -> None:
    done = run(action, calls, "pi2rt", "info", "--json")
    assert done.returncode == 0, done.stderr
    flash = json.loads(done.stdout)["flash"]
    assert (flash["io"], flash["why"]) == ("preadv", BY_SECCOMP)


@pytest.mark.parametrize(
    ("action", "calls"),
    [*(("trap", (call,)) for call in refused.OPTIONAL), *((action, refused.OPTIONAL) for action in ACTIONS)],
)
def test_reading_goes_on_without_any_of_them(tmp_path: Path, action: str, calls: tuple[str, ...]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 64)
    done = run(action, calls, "tests.kernels.read_a_file", str(path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("action", ACTIONS)
def test_io_uring_that_was_asked_for_is_refused_with_the_reason(tmp_path: Path, action: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(8192))
    done = run(action, URING, "tests.kernels.read_a_file", str(path), "uring")
    assert done.returncode == 1
    assert (BY_SECCOMP if action in DEADLY else BY_ERROR) in done.stderr.splitlines()[-1]


def test_nobody_is_told_to_try_where_no_child_can_be_started() -> None:
    done = run(
        "trap",
        ("io_uring_setup",),
        "tests.kernels.refused",
        str(errno.EAGAIN),
        "clone",
        "pi2rt",
        "info",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    why = json.loads(done.stdout)["flash"]["why"]
    assert why == "io_uring: not tried, seccomp may refuse it, and no child process could be started (EAGAIN)"


def test_a_model_answers_the_same_without_all_of_them(tmp_path: Path) -> None:
    model = TinyModel("llama", seed=1, dim=256, hidden=1216, layers=2, heads=4, kv_heads=2, head_dim=64)
    pack = tmp_path / "m.pi2"
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="Q4_0"), pack)
    arguments = ("run", str(pack), "--raw", "--context", "64", "--temperature", "0", "-n", "8", "-p", "Once")
    expected = subprocess.run(
        [sys.executable, "-P", "-m", "pi2rt", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    calls = tuple(call for call in refused.OPTIONAL if call != "preadv2")  # which Python's os.preadv makes
    for action, more in ("trap", ()), (str(errno.EPERM), ("sched_getaffinity",)):
        done = run(action, calls + more, "pi2rt", *arguments)
        assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("action", ABSENT)
def test_the_tests_of_the_flash_reader_are_skipped_with_the_reason(action: str) -> None:
    """Where io_uring is absent, whether with an error or with a signal, none of them fails."""
    quick = ("-p", "no:cacheprovider", "-k", "not any_bytes and not many_reads")
    tests = str(Path(__file__).parent / "test_flash.py")
    done = run(action, URING, "pytest", "-q", "-rs", *quick, tests)
    assert done.returncode == 0, done.stdout
    assert ABSENT[action] in done.stdout
