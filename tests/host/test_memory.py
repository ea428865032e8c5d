from __future__ import annotations

import resource
from pathlib import Path

import pytest

from pi2rt.host.memory import available_memory, peak_rss_bytes

from .fake_system import write_tree

MIB = 1 << 20
MEMINFO = f"MemTotal:  {8 << 20} kB\nMemFree:  {1 << 20} kB\nMemAvailable:  {4 << 20} kB"


def available(tmp_path: Path, cgroup: str, groups: dict[str, object], meminfo: str = MEMINFO) -> int:
    """In MiB."""
    write_tree(tmp_path / "proc", {"self/cgroup": cgroup, "meminfo": meminfo})
    write_tree(tmp_path / "sys" / "fs" / "cgroup", groups)
    return available_memory(tmp_path / "sys", tmp_path / "proc") // MIB


def test_without_groups(tmp_path: Path) -> None:
    assert available(tmp_path, "0::/", {}) == 4096


def test_old_kernel(tmp_path: Path) -> None:
    assert available(tmp_path, "0::/", {}, "MemTotal: 1048576 kB\nMemFree: 204800 kB") == 200


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"memory.max": "max", "memory.current": 100 * MIB}, 4096),
        ({"memory.max": 600 * MIB, "memory.current": 100 * MIB}, 500),
        ({"memory.max": 600 * MIB, "memory.high": 300 * MIB, "memory.current": 100 * MIB}, 200),
        (
            {
                "memory.max": 600 * MIB,
                "memory.current": 500 * MIB,
                "memory.stat": f"anon 1\ninactive_file {450 * MIB}\nodd line",
            },
            550,
        ),
        ({"memory.max": 600 * MIB, "memory.current": 700 * MIB}, 0),
        ({"memory.max": 600 * MIB}, 4096),
        ({"memory.max": 10 << 40, "memory.current": 0}, 4096),
    ],
)
def test_version_2(tmp_path: Path, groups: dict[str, object], expected: int) -> None:
    inner = {f"user/job/{name}": value for name, value in groups.items()}
    assert available(tmp_path, "0::/user/job", inner) == expected


def test_every_level_counts(tmp_path: Path) -> None:
    groups = {
        "a/memory.max": 300 * MIB,
        "a/memory.current": 200 * MIB,
        "a/b/memory.max": 500 * MIB,
        "a/b/memory.current": 10 * MIB,
    }
    assert available(tmp_path, "0::/a/b", groups) == 100


@pytest.mark.parametrize("path", ["/job", "/not/visible"])
def test_version_1(tmp_path: Path, path: str) -> None:
    top = "memory/job/" if path == "/job" else "memory/"
    groups = {
        top + "memory.limit_in_bytes": 600 * MIB,
        top + "memory.usage_in_bytes": 400 * MIB,
        top + "memory.stat": f"cache 5\ntotal_inactive_file {100 * MIB}",
    }
    assert available(tmp_path, f"7:cpu:/x\n4:memory:{path}\n0::/", groups) == 300


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    groups = {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 5 * MIB}
    assert available(tmp_path, "4:memory:/", groups) == 4096


def test_this_machine() -> None:
    assert 0 < available_memory() < 1 << 50


def test_without_procfs(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_rss_bytes(tmp_path) >= peak  # in KiB or in bytes


def test_peak_rss(tmp_path: Path) -> None:
    write_tree(tmp_path, {"self/status": "Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t 1024 kB"})
    assert peak_rss_bytes(tmp_path) == 2 * MIB


def test_own_peak_grows_with_use() -> None:
    block = bytearray(peak_rss_bytes() + 8 * MIB)
    for i in range(0, len(block), 4096):
        block[i] = 1
    assert peak_rss_bytes() >= len(block)
