"""``pi2rt run`` as a process: prompts, output, signals, and a chat at a terminal."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, Done, Run

REFERENCE = ("--executor", "reference")
ENDLESS = (*REFERENCE, "--ignore-eos", "--context", "50000")
CLOSING = re.compile(
    r"^\[prompt: (\d+) tokens, [\d.]+ tokens/s; generated: (\d+) tokens( \(the limit\))?, [\d.]+ tokens/s; "
    r"first token: [\d.]+ m?s; peak memory: [\d.]+ [MG]iB\]$"
)


def test_the_same_answer_however_the_prompt_comes(
    pi2rt: Run, model: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Grüße\n")
    more = ("-n", "8", *REFERENCE)
    answers = [
        pi2rt("run", model, "-p", "Grüße", *more),
        pi2rt("run", model, "-f", str(file), *more),
        pi2rt("run", model, *more, stdin=file.read_bytes()),
    ]
    process = start(environment, "run", model, "-p", "Grüße", *more)
    output, errors = process.communicate(timeout=60)
    answers.append(Done(process.returncode, output.decode(), errors.decode()))
    for answer in answers:
        assert answer.status == 0
        assert answer.output == answers[0].output
        closing = CLOSING.match(answer.errors)
        assert closing is not None, answer.errors
        assert closing.groups() == ("22", "8", " (the limit)")
    assert answers[0].output.endswith("\n")
    assert len(answers[0].output) > 2


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--kv", "q8"),
        ("--activations", "int8"),
        ("--activations", "mixed"),
        ("--kernels", "scalar"),
        ("--threads", "1"),
    ],
)
def test_the_default_executor_with_its_options(pi2rt: Run, model: str, options: tuple[str, ...]) -> None:
    done = pi2rt("run", model, "-p", "Hi", "-n", "4", *options)
    assert done.status == 0
    assert CLOSING.match(done.errors)


def test_two_classes_of_cores(pi2rt: Run, model: str) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("two classes of cores need two cores")
    arguments = ("run", model, "-p", "Hi", "-n", "4")
    done = pi2rt(*arguments, "--cores", f"big={cores[0]}", f"little={cores[1]}")
    assert (done.status, done.output) == (0, pi2rt(*arguments).output)


def test_json_lines_have_the_same_text(pi2rt: Run, model: str) -> None:
    arguments = ("run", model, "-p", "Hello", "-n", "6", "--temperature", "1", "--seed", "7", *REFERENCE)
    text = pi2rt(*arguments).output
    lines = pi2rt(*arguments, "--json-lines", "--logprobs", "2").output.splitlines()
    chunks = [json.loads(line) for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) + "\n" == text
    assert [len(chunk["top_logprobs"]) for chunk in chunks] == [2] * 6
    assert [chunk.get("finish_reason") for chunk in chunks] == [None] * 5 + ["length"]
    assert [chunk.get("finish_detail") for chunk in chunks] == [None] * 5 + ["length"]
    assert chunks[-1]["timing"]["generated_tokens"] == 6
    assert chunks[-1]["timing"]["decode_tokens_per_s"] > 0


def test_system_raw_and_stop_change_what_they_say(pi2rt: Run, model: str) -> None:
    def prompt_tokens(*more: str) -> int:
        closing = CLOSING.match(pi2rt("run", model, "-p", "Hi", "-n", "1", *REFERENCE, *more).errors)
        assert closing is not None
        return int(closing[1])

    plain = prompt_tokens()
    assert prompt_tokens("--raw") == 3  # BOS, H, i
    assert prompt_tokens("--system", "Be kind") > plain
    first = pi2rt("run", model, "-p", "Hi", "-n", "9", *REFERENCE).output
    stop = first[3:5]
    stopped = pi2rt("run", model, "-p", "Hi", "-n", "9", "--stop", stop, *REFERENCE).output
    assert stopped == first.partition(stop)[0] + "\n"


def test_control_tokens_in_a_prompt_are_text_unless_asked_for(pi2rt: Run, model: str) -> None:
    def prompt_tokens(*more: str) -> int:
        closing = CLOSING.match(pi2rt("run", model, "-p", "Hi<|bos|>", "-n", "1", *REFERENCE, *more).errors)
        assert closing is not None
        return int(closing[1])

    assert prompt_tokens() - prompt_tokens("--content-control-tokens") > 1
    assert prompt_tokens("--raw") == 4  # BOS, H, i, BOS
    done = pi2rt("run", model, "-p", "Hi", "--raw", "--content-control-tokens", *REFERENCE)
    assert done.status != 0
    assert "--content-control-tokens is about messages" in done.errors


def test_a_model_without_template_continues_the_prompt(pi2rt: Run, bare_model: str) -> None:
    done = pi2rt("run", bare_model, "-p", "Hi", "-n", "2", *REFERENCE)
    raw = pi2rt("run", bare_model, "-p", "Hi", "-n", "2", "--raw", *REFERENCE)
    assert done.status == raw.status == 0
    assert done.output == raw.output
    assert done.errors.startswith(
        "pi2rt: the model has no chat template; its text goes on from the prompt\n[prompt"
    )
    assert raw.errors.startswith("[prompt: 3 tokens")


def test_a_trace_is_written(pi2rt: Run, model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = pi2rt("run", model, "-p", "Hi", "-n", "3", "--trace", str(trace), *REFERENCE)
    assert done.status == 0
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"request 1", "prefill", "decode"} <= names


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="there is no /dev/full")
def test_a_trace_to_a_device_leaves_it_in_place(pi2rt: Run, model: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/full")
    done = pi2rt("run", model, "-p", "Hi", "-n", "3", "--trace", str(tmp_path / "link"), *REFERENCE)
    assert done.status == 1
    error = f"pi2rt: error: {tmp_path / 'link'}: cannot be written: No space left on device\n"
    assert done.errors.endswith(error)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert pi2rt("run", model, "-p", "Hi", "-n", "3", "--trace", "/dev/null", *REFERENCE).status == 0


def test_a_trace_that_cannot_be_written_is_refused_before_the_model_is_looked_for(
    pi2rt: Run, tmp_path: Path
) -> None:
    done = pi2rt("run", "nothing.gguf", "-p", "Hi", "--trace", str(tmp_path), *REFERENCE)
    assert (done.status, done.output) == (2, "")
    assert (
        done.errors == f"pi2rt: error: {tmp_path}: cannot be written: it is a directory; name a file in it\n"
    )


def test_a_reader_that_leaves_is_no_error(model: str, environment: dict[str, str]) -> None:
    process = start(environment, "run", model, "-p", "Hi", *ENDLESS)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.read() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once(model: str, environment: dict[str, str], number: int) -> None:
    process = start(environment, "run", model, "-p", "Hi", *ENDLESS)
    assert process.stdout is not None
    first = process.stdout.read(1)
    sent = time.monotonic()
    process.send_signal(number)
    rest, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10  # 50,000 tokens take minutes
    assert process.returncode == 128 + number, errors
    assert (first + rest).endswith(b"\n")  # the shell's prompt begins a line
    assert errors == b""


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


class Terminal:
    """The command line with a terminal of its own, on which Ctrl-C and Ctrl-D are what they are."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self._ours, theirs = os.openpty()
        # login_tty makes the terminal the controlling one: only then does it turn Ctrl-C into a signal.
        enter = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", enter, *COMMAND, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def read_until(self, end: str) -> str:
        """What is shown up to ``end``, with plain newlines."""
        shown = b""
        while not shown or not shown.replace(b"\r\n", b"\n").endswith(end.encode()):
            ready, _, _ = select.select([self._ours], [], [], 60)
            assert ready, f"only {shown!r} was shown"
            shown += os.read(self._ours, 1)
        return shown.replace(b"\r\n", b"\n").decode(errors="replace").removesuffix(end)

    def ask(self, line: str) -> str:
        """The answer to a line."""
        self.type(f"{line}\n")
        assert self.read_until("\n") == line  # the echo
        return self.read_until("\n> ")

    def wait_until_it_waits(self) -> None:
        """CPython forgets a Ctrl-C that comes after the echo and before readline waits for the next key."""
        status = Path(f"/proc/{self.process.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "S":
            pass

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(environment: dict[str, str], model: str) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(environment, "run", model, *arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_chat_has_a_history_until_it_is_reset(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("-n", "6", *REFERENCE)
    assert "Ctrl-D leaves" in chat.read_until("\n> ")
    first = chat.ask("hello")
    second = chat.ask("hello")
    assert first != second  # it depends on what was said before
    chat.type("/reset\n")
    chat.read_until("\n> ")
    assert chat.ask("hello") == first
    assert "Ctrl-D leaves" in chat.ask("/what")
    chat.type("/exit\n")
    assert chat.process.wait(60) == 0


def test_control_keys_in_a_chat(terminal: Callable[..., Terminal]) -> None:
    chat = terminal(*ENDLESS)
    chat.read_until("\n> ")
    chat.type("go on\n")
    chat.read_until("go on\n")
    chat.read_until("")  # the answer has begun
    chat.type("\x03")
    chat.read_until("\n> ")  # stopped, and here is the next prompt
    chat.type("half a line")
    chat.read_until("half a line")
    chat.wait_until_it_waits()
    chat.type("\x03")
    chat.read_until("\n> ")  # the line is dropped
    assert "Ctrl-D leaves" in chat.ask("/help")  # and nothing of it is left
    chat.type("\x04")
    assert chat.process.wait(60) == 0


def test_a_chat_goes_on_after_a_full_context(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("--context", "32", "-n", "4", *REFERENCE)
    chat.read_until("\n> ")
    assert "exceeds the context of 32 tokens" in chat.ask("one more question that is too long")
    assert "exceeds" not in chat.ask("hi")
    chat.type("/exit\n")
    assert chat.process.wait(60) == 0


def test_a_terminal_shows_the_load(terminal: Callable[..., Terminal], environment: dict[str, str]) -> None:
    environment["TERM"] = "xterm"
    one = terminal("-p", "Hi", "-n", "2", *REFERENCE)
    shown = one.read_until("]\n")
    assert "loading" in shown
    assert one.process.wait(60) == 0
