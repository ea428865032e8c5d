"""``--memory`` too small for a model that is no pack: the command that helps, and ``--convert``."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Run
from tests.support.real_model import smollm2

PROMPT = ("-p", "Why is the sky blue?", "-n", "12", "--context", "256")


INTERRUPTED = """
import os, sys
from pi2rt.opening import pack_cache
from pi2rt.cli.main import main

convert, number = pack_cache.convert, int(sys.argv[1])

def interrupted(path, target, progress):
    sent = []
    def report(done, total):
        if done > total // 2 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        progress(done, total)
    convert(path, target, progress=report)

pack_cache.convert = interrupted
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The real model, as a file of our own."""
    return Path(shutil.copy(smollm2(), tmp_path / "a model.gguf"))


@pytest.fixture
def packs(environment: dict[str, str]) -> Path:
    return Path(environment["PI2RT_CACHE"]) / "packs"


def start(
    environment: dict[str, str], *arguments: str, largest_file: int | None = None
) -> subprocess.Popen[str]:
    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def run(
    environment: dict[str, str], *arguments: str, largest_file: int | None = None
) -> tuple[int, str, str]:
    return finish(start(environment, *arguments, largest_file=largest_file))


def left(packs: Path) -> list[str]:
    return [name for name in os.listdir(packs) if not name.endswith(".lock")]


@pytest.fixture(scope="module")
def enough() -> str:
    """A memory that is too small for the model, and not for its pack."""
    status, _, errors = run(dict(os.environ), "run", str(smollm2()), *PROMPT, "--memory", "20M")
    assert status == 2
    found = re.search(r"the least is (\d+) MiB.*as a pack the model would need (\d+) MiB", errors)
    assert found is not None
    least, packed = map(int, found.groups())
    assert packed < least - 40
    return f"{packed + 20}M"


def test_the_message_names_the_command(
    environment: dict[str, str], source: Path, enough: str, tmp_path: Path
) -> None:
    status, output, errors = run(environment, "run", str(source), *PROMPT, "--memory", enough)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    (command,) = re.findall(
        r"; '(pi2rt convert .*) writes one, --convert makes and keeps one by itself;", errors
    )
    arguments = shlex.split(command.removesuffix("'"))
    assert arguments == ["pi2rt", "convert", str(source), "a model.pi2"]
    subprocess.run(
        [sys.executable, "-P", "-m", "pi2rt", *arguments[1:]],
        env=environment,
        cwd=tmp_path,
        check=True,
        timeout=60,
    )
    assert run(environment, "run", str(tmp_path / "a model.pi2"), *PROMPT, "--memory", enough)[0] == 0


def test_convert_makes_it_once(environment: dict[str, str], source: Path, enough: str, packs: Path) -> None:
    expected = run(environment, "run", str(source), *PROMPT)
    assert not packs.exists()
    given = ("run", str(source), *PROMPT, "--memory", enough, "--convert")
    status, output, errors = run(environment, *given)
    assert (status, output) == (0, expected[1])
    (pack,) = left(packs)
    assert errors.splitlines()[0] == (
        f"pi2rt: {source} does not fit into the memory; converting it to a pack in {packs}"
    )
    assert errors.splitlines()[1] == f"pi2rt: running the pack {packs / pack} (93.4 MiB)"
    before = (packs / pack).stat().st_mtime_ns
    status, output, errors = run(environment, *given)
    assert (status, output) == (0, expected[1])
    assert errors.splitlines()[0] == f"pi2rt: running the pack {packs / pack} (93.4 MiB)"
    assert (packs / pack).stat().st_mtime_ns == before
    os.truncate(packs / pack, 1 << 20)
    status, output, errors = run(environment, *given)
    assert (status, output) == (0, expected[1])
    assert f"pi2rt: warning: {packs / pack}: file length: is 1048576" in errors
    assert "; the pack is made again\n" in errors
    assert left(packs) == [pack]
    os.utime(source, ns=(5, 5))
    status, output, errors = run(environment, *given)
    assert (status, output) == (0, expected[1])
    assert "converting it to a pack" in errors
    assert len(left(packs)) == 1
    assert left(packs) != [pack]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_it_leaves_no_pack(
    environment: dict[str, str], source: Path, enough: str, packs: Path, number: signal.Signals
) -> None:
    given = ("run", str(source), *PROMPT, "--memory", enough, "--convert")
    # It sends the signal to itself in the middle: somebody who watches may come too late.
    status, output, errors = finish(
        subprocess.Popen(
            [sys.executable, "-P", "-c", INTERRUPTED, str(int(number)), *given],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    assert output == ""
    assert "running the pack" not in errors
    assert list(packs.glob("*.pi2")) == []
    if number == signal.SIGKILL:
        assert status == -number
    else:
        assert (status, left(packs)) == (128 + number, [])
    assert run(environment, *given)[0] == 0  # what is left is no hindrance
    assert [name for name in left(packs) if name.startswith(".")] == []


def test_a_full_disk(environment: dict[str, str], source: Path, enough: str, packs: Path) -> None:
    given = ("run", str(source), *PROMPT, "--memory", enough, "--convert")
    status, output, errors = run(environment, *given, largest_file=10 << 20)
    assert (status, output) == (1, "")
    assert re.search(r"error: .*packs/.*\.pi2: .*; PI2RT_CACHE may name another directory for it\n$", errors)
    assert left(packs) == []


def test_a_memory_that_is_too_small_even_for_a_pack_converts_nothing(
    environment: dict[str, str], source: Path, packs: Path
) -> None:
    status, _, errors = run(environment, "run", str(source), *PROMPT, "--memory", "40M", "--convert")
    assert (status, errors.count("\n")) == (2, 1)
    assert "as a pack the model would need" in errors
    assert "pi2rt convert" not in errors
    assert not packs.exists()


def test_bench_and_perplexity_convert_too(
    environment: dict[str, str], source: Path, packs: Path, tmp_path: Path, enough: str
) -> None:
    options = ("--memory", enough, "--convert")
    given = ("bench", str(source), "--prefill", "16", "--decode", "4", "--repeat", "1", "--json", *options)
    status, output, _ = run(environment, *given)
    assert status == 0
    assert '"streamed_bytes_per_token": 0' not in output  # of the pack, what was streamed
    text = tmp_path / "text"
    text.write_text("The sky is blue. " * 40)
    assert run(environment, "perplexity", str(source), str(text), "--chunk", "64", *options)[0] == 0
    assert len(left(packs)) == 1


def test_it_accepts_what_a_process_does_that_begins_with_the_pack(
    environment: dict[str, str], source: Path, tmp_path: Path
) -> None:
    """The model that was refused before, and its conversion, leave nothing that counts."""
    pack = tmp_path / "s.pi2"
    assert run(environment, "convert", str(source), str(pack))[0] == 0
    status, _, errors = run(environment, "run", str(pack), *PROMPT, "--memory", "110M")
    assert status == 2
    found = re.search(r"the least is (\d+) MiB", errors)
    assert found is not None
    least = f"{int(found[1]) + 1}M"  # from one process to the next, resident pages differ
    expected = run(environment, "run", str(pack), *PROMPT, "--memory", least)
    assert expected[0] == 0
    converted = run(environment, "run", str(source), *PROMPT, "--memory", least, "--convert")
    assert converted[:2] == expected[:2]


def test_without_a_memory_it_is_refused(pi2rt: Run, model: str) -> None:
    done = pi2rt("run", model, "-p", "Hi", "--convert")
    assert (done.status, done.output) == (2, "")
    assert "--convert is for a model that does not fit into --memory SIZE" in done.errors
