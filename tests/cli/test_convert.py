"""``pi2rt convert`` and ``pi2rt verify``, and ``pi2rt run`` on what they made."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pi2rt.formats.pack import PackFile
from tests.cli.conftest import COMMAND, Run
from tests.support.real_model import smollm2
from tests.support.sparse_model import poke, sparse_model
from tests.support.tiny_models import TinyModel, write_gguf, write_huggingface


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return tmp_path / "packs" / "tiny.pi2"


@pytest.fixture(autouse=True)
def _folder(pack: Path) -> None:
    pack.parent.mkdir()


def test_convert_verify_and_run(pi2rt: Run, model: str, pack: Path) -> None:
    done = pi2rt("convert", model, str(pack))
    assert (done.status, done.errors) == (0, "")
    assert done.output == f"{pack}: {pack.stat().st_size / 1024:.1f} KiB\n"
    assert os.listdir(pack.parent) == ["tiny.pi2"]
    done = pi2rt("verify", str(pack))
    assert (done.status, done.output, done.errors) == (0, f"{pack}: whole\n", "")
    for executor in ("cpu", "reference"):
        options = ("-p", "Grüße", "-n", "24", "--executor", executor)
        answers = [pi2rt("run", path, *options) for path in (model, str(pack))]
        assert [answer.status for answer in answers] == [0, 0]
        assert answers[0].output == answers[1].output


def test_bundles_can_be_left_out(pi2rt: Run, tmp_path: Path, pack: Path) -> None:
    relu = TinyModel(config={"hidden_act": "relu"})
    source = write_gguf(tmp_path / "relu.gguf", relu, weight_type="Q4_0")
    for options, blocks in (((), relu.layers), (("--bundles", "off"), 0)):
        assert pi2rt("convert", str(source), str(pack), "--force", *options).status == 0
        with PackFile(pack) as file:
            assert len(file.bundles) == blocks
        assert pi2rt("verify", str(pack)).output == f"{pack}: whole\n"
    answers = [pi2rt("run", str(path), "-p", "Hi", "-n", "8", "--ignore-eos") for path in (source, pack)]
    assert [answer.status for answer in answers] == [0, 0]
    assert answers[0].output == answers[1].output


def test_a_directory(pi2rt: Run, tmp_path: Path, pack: Path) -> None:
    source = write_huggingface(tmp_path / "source", TinyModel("gemma3_text"))
    (source / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert pi2rt("convert", str(source), str(pack)).status == 0
    options = ("-p", "Hello", "-n", "12", "--ignore-eos")
    answers = [pi2rt("run", str(path), *options) for path in (source, pack)]
    assert [answer.status for answer in answers] == [0, 0]
    assert answers[0].output == answers[1].output
    assert answers[0].errors.split(",")[0] == answers[1].errors.split(",")[0]  # as many prompt tokens


def test_a_pack_is_replaced_only_when_asked(pi2rt: Run, model: str, pack: Path) -> None:
    pack.write_text("mine")
    done = pi2rt("convert", model, str(pack))
    assert (done.status, pack.read_text()) == (2, "mine")
    assert done.errors == (
        f"pi2rt: error: {pack} is there already; remove it, or ask for it to be overwritten (--force)\n"
    )
    assert pi2rt("convert", model, str(pack), "--force").status == 0
    assert pi2rt("verify", str(pack)).status == 0


def test_each_broken_tensor_is_a_line(pi2rt: Run, model: str, pack: Path) -> None:
    pi2rt("convert", model, str(pack))
    with PackFile(pack) as file:
        broken = [file.tensors[name] for name in ("token_embd.weight", "blk.1.attn_norm.weight")]
    for info in broken:
        poke(pack, info.offset + 7, b"\xff")
    done = pi2rt("verify", str(pack))
    assert done.status == 1
    assert done.output.splitlines() == [
        f"{pack}: {info.name}: its checksum does not match" for info in broken
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "nobody", "x.pi2"), "'nobody': no such file, and no model of that name"),
        (("verify", "{model}"), "magic: is b'GGUF"),
        (("verify", "{pack}"), "cannot be opened: No such file or directory"),
        (("convert", "{model}", "{pack}/x"), "cannot be written: its folder does not exist"),
        (("convert", "{model}", "{model}", "--force"), "is the model itself; choose another name"),
        (
            ("convert", "nobody", "/dev/null"),
            "/dev/null: cannot be written: it is there already, and is a device",
        ),
        (("convert", "nobody", "/"), "/: cannot be written: it is a directory"),
        (("convert", "{model}"), "the following arguments are required: FILE.pi2"),
    ],
)
def test_mistakes(pi2rt: Run, model: str, pack: Path, arguments: tuple[str, ...], message: str) -> None:
    done = pi2rt(*(each.format(model=model, pack=pack) for each in arguments))
    assert (done.status, done.output) == (2, "")
    assert message in done.errors
    assert done.errors.count("\n") == 1


def test_a_truncated_pack(pi2rt: Run, model: str, pack: Path) -> None:
    pi2rt("convert", model, str(pack))
    os.truncate(pack, pack.stat().st_size - 4096)
    for arguments in (("verify", str(pack)), ("run", str(pack), "-p", "Hi")):
        done = pi2rt(*arguments)
        assert done.status == 2
        assert "it is truncated" in done.errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(
    environment: dict[str, str], tmp_path: Path, pack: Path, number: signal.Signals
) -> None:
    source = sparse_model(tmp_path / "large.gguf", 512 << 20)
    process = subprocess.Popen(
        [*COMMAND, "convert", str(source), str(pack)], env=environment, stderr=subprocess.PIPE
    )
    part = pack.with_name(f".{pack.name}.part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1 << 20):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)  # another process is waited for
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, b"")
    assert os.listdir(pack.parent) == []


def test_the_real_model(pi2rt: Run, pack: Path) -> None:
    source = str(smollm2())
    assert pi2rt("convert", source, str(pack)).status == 0
    assert pi2rt("verify", str(pack)).status == 0
    options = ("-p", "Why is the sky blue?", "-n", "40")
    answers = [pi2rt("run", path, *options) for path in (source, str(pack))]
    assert [answer.status for answer in answers] == [0, 0]
    assert answers[0].output == answers[1].output
    assert len(answers[0].output) > 100
