"""Standard streams that are closed, full, stalled, or of an encoding that lacks the characters."""

from __future__ import annotations

import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pi2rt._errors import OutputError
from pi2rt.cli._streams import ENCODING_ERRORS, Interrupted, StandardStream, standard_streams
from tests.cli.conftest import COMMAND
from tests.support.tiny_models import TinyModel, write_gguf

REFERENCE = ("--executor", "reference")
CLOSED_OUTPUT = "pi2rt: error: standard output: cannot be written: Bad file descriptor\n"
FULL_OUTPUT = "pi2rt: error: standard output: cannot be written: No space left on device\n"


def shell(environment: dict[str, str], redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of a shell with this redirection; what is not redirected comes back."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirection}', "sh", *COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="session")
def commands(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """One of each, which succeeds and writes something to standard output."""
    folder = tmp_path_factory.mktemp("commands")
    text = folder / "text"
    text.write_text("it is so, " * 200)
    pack = folder / "tiny.pi2"
    short = write_gguf(folder / "short.gguf", TinyModel())
    subprocess.run([*COMMAND, "convert", model, str(pack)], check=True, capture_output=True)
    return {
        "--help": ("--help",),
        "--version": ("--version",),
        "run": ("run", model, "-p", "hi", "-n", "3", "--context", "64", *REFERENCE),
        "info": ("info",),
        "models": ("models",),
        "verify": ("verify", str(pack)),
        "convert": ("convert", str(short), str(folder / "short.pi2"), "--force"),
        "pull": ("pull", model),
        "perplexity": ("perplexity", model, str(text), "--chunk", "64", *REFERENCE),
    }


NAMES = ("--help", "--version", "run", "info", "models", "verify", "convert", "pull", "perplexity")


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_standard_output_is_an_error(
    environment: dict[str, str], commands: dict[str, tuple[str, ...]], name: str
) -> None:
    done = shell(environment, ">&-", *commands[name])
    assert (done.returncode, done.stderr) == (1, CLOSED_OUTPUT)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_standard_output_is_an_error(
    environment: dict[str, str], commands: dict[str, tuple[str, ...]], name: str
) -> None:
    done = shell(environment, ">/dev/full", *commands[name])
    assert (done.returncode, done.stderr) == (1, FULL_OUTPUT)


@pytest.mark.parametrize("redirection", ["<&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_needed_may_be_closed(
    environment: dict[str, str], commands: dict[str, tuple[str, ...]], name: str, redirection: str
) -> None:
    done = shell(environment, redirection, *commands[name])
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")


def test_everything_is_closed(environment: dict[str, str], commands: dict[str, tuple[str, ...]]) -> None:
    assert shell(environment, "<&- >&- 2>&-", *commands["run"]).returncode == 1


def test_mistakes_keep_their_status(environment: dict[str, str]) -> None:
    for redirection in ("2>&-", ">&-", "2>/dev/full"):
        assert shell(environment, redirection, "run").returncode == 2
        assert shell(environment, redirection, "run", "nothing.gguf", "-p", "x").returncode == 2


def test_a_prompt_on_a_closed_standard_input(environment: dict[str, str], model: str) -> None:
    done = shell(environment, "<&-", "run", model, *REFERENCE)
    assert (done.returncode, done.stderr) == (
        2,
        "pi2rt: error: cannot read standard input: Bad file descriptor\n",
    )


def test_no_model_file_is_taken_for_a_standard_stream(
    environment: dict[str, str], model: str, tmp_path: Path
) -> None:
    """Descriptors 0 to 2 are free at the beginning, and stay taken by nothing."""
    program = f"""
import os, sys
from pi2rt.cli import main, models
def look(options):
    print([os.readlink(f"/proc/self/fd/{{n}}") for n in (0, 1, 2)], file=open({str(tmp_path / "seen")!r}, "w"))
    return 0
models.main = look
sys.exit(main.main(["models"]))
"""
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-P", "-c", program], check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "seen").read_text() == f"{['/dev/null'] * 3}\n"


# -- stalled


class Stalled:
    """A command whose standard output or error is a pipe that nobody reads."""

    def __init__(self, environment: dict[str, str], which: str, *arguments: str) -> None:
        self.ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
        if which == "stderr":  # nothing goes there before the end: it is full from the beginning
            os.set_blocking(theirs, False)
            try:
                while os.write(theirs, bytes(4096)):
                    pass
            except BlockingIOError:
                os.set_blocking(theirs, True)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, which: theirs}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            env=environment,
            # A suite that runs behind nohup ignores it, its children would too, and pi2rt leaves it so.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
            **streams,
        )
        os.close(theirs)

    def wait_until(self, *calls: tuple[str, str]) -> None:
        """Until the main thread is inside one of these system calls, with this first argument."""
        path = Path(f"/proc/{self.process.pid}/syscall")
        while tuple(path.read_text().split()[:2]) not in calls:
            assert self.process.poll() is None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def stalled(environment: dict[str, str]) -> object:
    opened: list[Stalled] = []

    def start(which: str, *arguments: str) -> Stalled:
        opened.append(Stalled(environment, which, *arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.end()


Start = Callable[..., Stalled]
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/syscall", os.R_OK) or os.uname().machine not in ("x86_64", "aarch64"),
    reason="the system does not tell in which call a process is",
)
WRITE = "1" if os.uname().machine == "x86_64" else "64"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_ends_a_command_whose_output_nobody_reads(
    stalled: Start, model: str, number: int
) -> None:
    command = stalled("stdout", "run", model, "-p", "hi", "--context", "100000", "--ignore-eos", *REFERENCE)
    while not select.select([command.ours], [], [], 1)[0]:  # one page: something in it is all it takes
        assert command.process.poll() is None
    command.process.send_signal(number)
    assert command.process.wait(30) == 128 + number


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_a_command_whose_errors_nobody_reads(
    stalled: Start, model: str, number: int
) -> None:
    command = stalled("stderr", "run", model, "-p", "hi", "-n", "2", "--context", "64", *REFERENCE)
    assert command.process.stdout is not None
    assert command.process.stdout.readline()  # the answer
    command.wait_until((WRITE, "0x2"))  # what it took
    command.process.send_signal(number)
    assert command.process.wait(30) == 128 + number


@needs_proc
def test_a_blocked_print_of_a_plain_command_is_interrupted(stalled: Start, model: str) -> None:
    command = stalled("stderr", "run", "nothing.gguf", "-p", "hi")
    command.wait_until((WRITE, "0x2"))
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(30) == -signal.SIGTERM


# -- the stream by itself


@pytest.fixture
def full_pipe() -> object:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, bytes(4096))
    yield read, write
    os.close(read)
    os.close(write)


def test_what_is_interrupted_is_dropped_from_then_on(full_pipe: tuple[int, int]) -> None:
    read, write = full_pipe
    stream = StandardStream(write, "standard output")
    before = signal.signal(signal.SIGALRM, lambda number, frame: stream.interrupt())
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Interrupted):
            stream.write(b"never")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stream.write(b"neither") == 7
    assert os.read(read, 10_000) == bytes(4096)


def test_an_interrupt_that_finds_room_changes_nothing(full_pipe: tuple[int, int]) -> None:
    read, write = full_pipe
    os.read(read, 4096)
    stream = StandardStream(write, "standard output")
    stream.interrupt()
    stream.write(b"said")
    assert os.read(read, 10) == b"said"


def test_an_error_is_told_once(tmp_path: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        stream = StandardStream(full.fileno(), "standard output")
        with pytest.raises(OutputError, match="standard output: cannot be written: No space left"):
            stream.write(b"x")
        assert stream.write(b"x") == 1
        assert StandardStream(full.fileno(), None).write(b"x") == 1  # standard error


def test_a_reader_that_has_gone() -> None:
    read, write = os.pipe()
    os.close(read)
    stream = StandardStream(write, "standard output")
    with pytest.raises(BrokenPipeError):
        stream.write(b"x")
    assert stream.write(b"x") == 1
    os.close(write)


def test_a_pipe_that_was_made_not_to_block_is_waited_for(full_pipe: tuple[int, int]) -> None:
    import threading

    read, write = full_pipe
    os.set_blocking(write, False)
    got: list[bytes] = []

    def drain() -> None:
        while sum(map(len, got)) < 4096 + 100_000:
            got.append(os.read(read, 10_000))

    reader = threading.Thread(target=drain)
    reader.start()
    assert StandardStream(write, "standard output").write(bytes(100_000)) == 100_000
    reader.join()


def test_streams_of_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with standard_streams():
        assert (sys.stdout, sys.stderr) == before
    assert (sys.stdout, sys.stderr) == before


# -- encodings


@pytest.mark.parametrize(
    ("text", "encoding", "written"),
    [
        ("é日a", "ascii", b"??a"),
        ("é日a", "latin-1", b"\xe9?a"),
        ("é日a", "utf-8", "é日a".encode()),
        (os.fsdecode(b"\xff\xe9.gguf"), "utf-8", b"\xff\xe9.gguf"),
        (os.fsdecode(b"\xff\xe9.gguf"), "ascii", b"\xff\xe9.gguf"),
        ("\ud800", "utf-8", b"?"),
    ],
)
def test_characters_that_an_encoding_lacks(text: str, encoding: str, written: bytes) -> None:
    with standard_streams():  # registers how
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding, errors=ENCODING_ERRORS)
        stream.write(text)
        stream.flush()
    assert raw.getvalue() == written


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-8"},
        {"PYTHONIOENCODING": "UTF8"},
    ],
)
def test_json_lines_lose_nothing(environment: dict[str, str], tmp_path: Path, locale: dict[str, str]) -> None:
    """A model that says what was said to it would do; this one says bytes, which become U+FFFD."""
    model = write_gguf(tmp_path / "m.gguf", TinyModel())
    arguments = (
        "run",
        str(model),
        "-p",
        "hé",
        "--raw",
        "-n",
        "12",
        "--json-lines",
        "--ignore-eos",
        *REFERENCE,
    )
    whole = shell(environment, "", *arguments)
    done = shell({**environment, "PYTHONUTF8": "0", **locale}, "", *arguments)
    assert done.returncode == whole.returncode == 0, done.stderr

    def texts(output: str) -> list[str]:
        return [json.loads(line).get("text", "") for line in output.splitlines()]

    assert texts(done.stdout) == texts(whole.stdout)
    assert not "".join(texts(whole.stdout)).isascii()
    if "ascii" in locale.values() or "LC_ALL" in locale or "latin-1" in locale.values():
        assert done.stdout.isascii()


def test_plain_output_in_ascii(environment: dict[str, str], tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "é日.gguf", TinyModel())
    ascii_only = {**environment, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = shell(ascii_only, "", "pull", str(model))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/??.gguf\n")
