"""``pi2rt info`` and ``pi2rt models``."""

from __future__ import annotations

import json
import os
from mmap import PAGESIZE
from pathlib import Path

import pytest

from pi2rt import __version__
from pi2rt.cli.main import main
from pi2rt.cython_kernels.flash.files import probe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path))
    monkeypatch.delenv("PI2RT_KERNELS", raising=False)
    return tmp_path / "models"


def info(capfd: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["info", "--json"]) == 0
    found: dict[str, object] = json.loads(capfd.readouterr().out)
    return found


def test_info(capfd: pytest.CaptureFixture[str], cache: Path) -> None:
    found = info(capfd)
    assert found["version"] == __version__
    assert found["cache"] == str(cache.parent)
    memory, kernels, executors = found["memory"], found["kernels"], found["executors"]
    assert isinstance(memory, dict)
    assert 0 < memory["available"] <= memory["total"]
    assert memory["page"] == PAGESIZE
    assert memory["huge_page"] % PAGESIZE == 0
    permitted, why = probe()
    assert found["flash"] == {"io": "uring" if permitted else "preadv", "why": why, "measured": []}
    assert isinstance(executors, dict)
    assert {"cpu", "reference", "simulated"} <= executors.keys()
    assert not any("error" in executor for executor in executors.values())
    assert isinstance(kernels, dict)
    running = [variant["name"] for variant in kernels["variants"] if variant["runs_here"]]
    assert kernels["current"] == running[-1]  # the best is the last
    assert kernels["why"] == "the best of this build that this processor runs"

    assert main(["info"]) == 0
    text = capfd.readouterr().out
    assert f"kernels: {kernels['current']} (the best" in text
    for words in (
        "processor: ",
        "cores ",
        "memory: ",
        "flash: ",
        "  scalar: runs here\n",
        "  cpu: pi2rt.executors.cpu.executor",
    ):
        assert words in text


def test_what_was_measured_is_kept_and_shown(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pi2rt.cli.info.MEASURE_SECONDS", 0.5)
    model, small = tmp_path / "model", tmp_path / "small"
    with model.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    small.write_bytes(bytes(4096))
    assert main(["info", "--measure", str(model)]) == 0
    shown = capfd.readouterr()
    assert "pi2rt: measured " in shown.err
    assert "MB/s by reads at once" in shown.out
    [measured] = info(capfd)["flash"]["measured"]  # type: ignore[index]
    assert measured["reads"]["measured"]
    assert measured["device"].split()[0] == "{}:{}".format(*divmod_device(model))
    assert all(point["bytes_per_second"] > 0 for point in measured["points"])
    assert f"{measured['reads']['neuron_depth']} at once" in shown.out
    for path, message in (small, "has 4096 bytes: too few"), (tmp_path / "absent", "No such file"):
        assert main(["info", "--measure", str(path)]) == 2
        assert message in capfd.readouterr().err


def divmod_device(path: Path) -> tuple[int, int]:
    number = path.stat().st_dev
    return os.major(number), os.minor(number)


def test_info_says_why_other_kernels_run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PI2RT_KERNELS", "scalar")
    kernels = info(capfd)["kernels"]
    assert isinstance(kernels, dict)
    assert (kernels["current"], kernels["why"]) == ("scalar", "PI2RT_KERNELS=scalar asks for it")
    monkeypatch.setenv("PI2RT_KERNELS", "abacus")
    assert main(["info"]) == 0
    assert "kernels: no kernel variant 'abacus' in this build; it has: scalar" in capfd.readouterr().out


def test_models(capfd: pytest.CaptureFixture[str], cache: Path) -> None:
    assert main(["models"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "NAME     FILE                             SIZE      WHERE",
        "smollm2  SmolLM2-135M-Instruct.Q4_1.gguf  93.8 MiB  not fetched yet; 'pi2rt pull smollm2'",
    ]
    hub = cache / "hf" / "org" / "repo"
    hub.mkdir(parents=True)
    (hub / "m.gguf").write_bytes(bytes(2048))
    (cache / "other.gguf").write_bytes(b"x")
    (cache / ".other.gguf.lock").touch()
    assert main(["models"]) == 0
    rows = [line.split()[:4] for line in capfd.readouterr().out.splitlines()[1:]]
    assert [str(cache / "other.gguf"), "other.gguf", "1", "bytes"] in rows
    assert ["hf:org/repo/m.gguf", "m.gguf", "2.0", "KiB"] in rows
    assert main(["models", "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert {"name": "hf:org/repo/m.gguf", "path": str(hub / "m.gguf"), "size": 2048} in lines
