"""Parsing, help, and what errors look like."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from pi2rt._errors import ModelNotFoundError
from pi2rt.cli import main as command_line
from pi2rt.cli import models
from pi2rt.cli.main import main


def test_the_script_is_this_function() -> None:
    (script,) = entry_points(group="console_scripts", name="pi2rt")
    assert script.load() is main


def test_help_imports_nothing_heavy() -> None:
    heavy = {"numpy", "trio", "rich", "jinja2", "tokenizers", "msgspec", "importlib.metadata"}
    program = f"""
import sys
from pi2rt.cli.main import main
try:
    main(["run", "--help"])
except SystemExit as end:
    assert end.code == 0
print(sorted({heavy!r} & sys.modules.keys()), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_help_is_quick() -> None:
    # Processor time, the least of three: the machine may be busy with other things.
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-P", "-m", "pi2rt", "--help"], capture_output=True, check=True)
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(times) < 0.4


ERRORS = [
    ([], 2, "the following arguments are required: COMMAND"),
    (["walk"], 2, "invalid choice: 'walk'"),
    (["run"], 2, "the following arguments are required: MODEL"),
    (["run", "absent.gguf", "-p", "x"], 2, "'absent.gguf': no such file, and no model of that name"),
    (["run", "smollm3", "-p", "x"], 2, "known names: smollm2"),
    (["run", "ftp:a/b", "-p", "x"], 2, "no source for 'ftp'; known schemes: hf:"),
    (["run", "{model}", "-p", ""], 2, "the prompt is empty"),
    (["run", "{model}", "-p", "x", "-f", "y"], 2, "not allowed with argument -p/--prompt"),
    (["run", "{model}", "-f", "absent.txt"], 2, "cannot read absent.txt: No such file or directory"),
    (["run", "{model}", "-f", "{binary}"], 2, "binary is not UTF-8: byte 0xff at offset 2"),
    (["run", "{model}", "-p", "a\udcffb"], 2, "the prompt is not UTF-8: byte 0xff at offset 1"),
    (["run", "{model}", "-p", "x", "--raw", "--system", "y"], 2, "--system has no place without"),
    (["run", "{model}", "-p", "x", "--logprobs", "2"], 2, "--logprobs shows only with --json-lines"),
    (["run", "{model}", "-p", "x", "--temperature", "-1"], 2, "temperature=-1.0: a number from 0 to 100"),
    (["run", "{model}", "-p", "x", "--temperature", "hot"], 2, "invalid float value: 'hot'"),
    (["run", "{model}", "-p", "x", "--top-p", "0"], 2, "top_p=0.0: a number above 0"),
    (["run", "{model}", "-p", "x", "-n", "0"], 2, "max_tokens=0: an integer from 1"),
    (["run", "{model}", "-p", "x", "--logit-bias", "a=b"], 2, "'a=b' is not ID=NUMBER"),
    (["run", "{model}", "-p", "x", "--logit-bias", "9999=1"], 2, "token id 9999 is outside the vocabulary"),
    (["run", "{model}", "-p", "x", "--context", "none"], 2, "'none' is not an integer of at least 1"),
    (["run", "{model}", "-p", "x", "--context", "4"], 2, "exceeds the context of 4 tokens"),
    (["run", "{model}", "-p", "x", "--threads", "0"], 2, "'0' is not an integer of at least 1"),
    (["run", "{model}", "-p", "x", "--threads", "99999"], 2, "threads=99999"),
    (["run", "{model}", "-p", "x", "--kv", "f7"], 2, "invalid choice: 'f7'"),
    (["run", "{model}", "-p", "x", "--cores", "big"], 2, "cores 'big': write NAME=CORES"),
    (["run", "{model}", "-p", "x", "--cores", "big=99999"], 2, "cannot use core 99999"),
    (["run", "{model}", "-p", "x", "--executor", "npu"], 2, "no executor 'npu'; available: "),
    (
        ["run", "{model}", "-p", "x", "--executor", "cpu", "--kernels", "abacus"],
        2,
        "no kernel variant 'abacus'",
    ),
    (["run", "{model}", "-p", "x", "--trace", "absent/t.json"], 2, "its folder does not exist"),
    (["run", "{bare}", "-p", "x", "--system", "y"], 2, "the model has no chat template"),
    (["run", "{cut}", "-p", "x"], 2, "cut.gguf: "),
    (["run", "{binary}", "-p", "x"], 2, "binary: "),
    (["pull"], 2, "the following arguments are required: NAME"),
    (["pull", "absent.gguf"], 2, "'absent.gguf': no such file, and no model of that name"),
    (["pull", "hf:only/two"], 2, "must be hf:ORG/REPO/FILE"),
    (["bench", "{model}", "--repeat", "0"], 2, "'0' is not an integer of at least 1"),
    (["perplexity", "{model}", "absent.txt"], 2, "cannot read absent.txt: No such file or directory"),
    (["perplexity", "{model}", "{binary}"], 2, "binary is not UTF-8"),
    (["perplexity", "{model}", "{text}", "--chunk", "3"], 2, "--chunk 3: at least 4 tokens are needed"),
    (["perplexity", "{model}", "{text}"], 2, "fewer than one chunk of 512"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors_are_one_line(
    arguments: list[str],
    status: int,
    message: str,
    model: str,
    bare_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path))
    files = {"model": model, "bare": bare_model}
    for name, content in {
        "binary": b"ab\xff",
        "text": b"too short",
        "cut.gguf": Path(model).read_bytes()[:5000],
    }.items():
        (tmp_path / name).write_bytes(content)
        files[name.partition(".")[0]] = name
    arguments = [argument.format(**files) if "{" in argument else argument for argument in arguments]
    if arguments[:1] in (["run"], ["bench"], ["perplexity"]) and "--executor" not in arguments:
        arguments += ["--executor", "reference"]
    try:
        found = main(arguments)
    except SystemExit as end:  # argparse
        found = int(str(end.code))
    output, errors = capfd.readouterr()
    assert (found, output) == (status, "")
    assert errors.startswith("pi2rt: error: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero; run with --debug for the traceback"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines; run with --debug for the traceback"),
        (
            ExceptionGroup(
                "all", [ValueError("x"), ExceptionGroup("more", [ModelNotFoundError("no model")])]
            ),
            2,
            "no model",
        ),
    ],
)
def test_unexpected_errors_are_one_line_too(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    line: str,
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(models, "main", fail)
    assert command_line.main(["models"]) == status
    assert capfd.readouterr() == ("", f"pi2rt: error: {line}\n")
    for arguments in (["--debug", "models"], ["models", "--debug"]):
        with pytest.raises(type(error)):
            command_line.main(arguments)
