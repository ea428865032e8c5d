"""Packs in the cache directory: made once, made anew when the model changes, whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import trio

import pi2rt
from pi2rt._errors import ConversionError, ModelNotFoundError
from pi2rt.formats.pack import PackFile
from pi2rt.opening.pack_cache import ensure_pack, packs_directory
from pi2rt.planner.pack.convert import verify
from tests.support.limited import run_limited
from tests.support.sparse_model import sparse_model
from tests.support.tiny_models import TinyModel, write_gguf, write_huggingface


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path / "cache"))


def packs() -> list[str]:
    return sorted(name for name in os.listdir(packs_directory()) if not name.endswith(".lock"))


class Stages:
    """Which stages were reported, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.seen[-1:] != [stage]:
            self.seen.append(stage)


async def test_it_is_made_once(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "my model.gguf", TinyModel())
    stages = Stages()
    first = await pi2rt.ensure_pack(source, stages)
    assert stages.seen == ["converting"]
    assert packs() == [first.name]
    assert first.name.startswith("my model.gguf.")
    before = first.stat()
    assert await ensure_pack(tmp_path / "." / "my model.gguf", stages) == first
    assert await ensure_pack(first) == first  # a pack is its own
    assert (stages.seen, first.stat().st_mtime_ns) == (["converting"], before.st_mtime_ns)
    assert verify(first) == ()


@pytest.mark.parametrize("change", ["touch", "replace", "grow"])
async def test_a_changed_model_is_converted_anew(tmp_path: Path, change: str) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel(seed=1))
    other = await ensure_pack(write_gguf(tmp_path / "m2.gguf", TinyModel(seed=1)))  # of another model: stays
    first = await ensure_pack(source)
    if change == "touch":
        os.utime(source, ns=(1, 1))
    elif change == "replace":
        os.replace(write_gguf(tmp_path / "new.gguf", TinyModel(seed=2)), source)
    else:
        with source.open("ab") as file:
            file.write(bytes(32))
    second = await ensure_pack(source)
    assert second != first
    assert packs() == sorted([second.name, other.name])


async def test_a_directory_changes_with_any_of_its_files(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "Model-1.5", TinyModel("gemma3_text"))
    first = await ensure_pack(source)
    with PackFile(first) as file:
        assert file.architecture == "gemma3_text"
    assert await ensure_pack(source) == first
    (source / "chat_template.jinja").write_text("{{ messages }}")
    second = await ensure_pack(source)
    assert second != first
    assert packs() == [second.name]


async def test_two_at_once_convert_once(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    stages = [Stages(), Stages()]
    made: list[Path] = []

    async def make(number: int) -> None:
        made.append(await ensure_pack(source, stages[number]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(make, 0)
        nursery.start_soon(make, 1)
    assert sorted(each.seen for each in stages) == [["converting"], ["waiting"]]
    assert made[0] == made[1]


async def test_a_cancelled_one_leaves_nothing(tmp_path: Path) -> None:
    source = sparse_model(tmp_path / "large.gguf", 64 << 20)
    with trio.CancelScope() as scope:
        await ensure_pack(source, lambda stage, done, total: scope.cancel())
    assert scope.cancelled_caught
    assert packs() == []


async def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    pack = await ensure_pack(source)
    pack.rename(pack.with_name(f".{pack.name.replace(pack.name[-8:], 'ffff.pi2')}.part"))
    assert await ensure_pack(source) == pack
    assert packs() == [pack.name]


async def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        await ensure_pack(tmp_path / "nothing.gguf")
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    (tmp_path / "file").touch()
    monkeypatch.setenv("PI2RT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConversionError, match=r"cannot be written to: .*; PI2RT_CACHE may name another"):
        await ensure_pack(source)


async def test_names_of_any_bytes(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    for name in (os.fsdecode(b"\xff\xfe model.gguf"), "ä" * 120 + ".gguf"):
        os.replace(source, tmp_path / name)
        source = tmp_path / name
        assert verify(await ensure_pack(source)) == ()


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "folder", "dangling link"])
async def test_a_damaged_pack_is_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    pack = await ensure_pack(source)
    whole = pack.read_bytes()
    if damage in ("cut", "empty"):
        os.truncate(pack, len(whole) // 2 if damage == "cut" else 0)
    elif damage == "header":
        pack.write_bytes(whole[:100] + bytes(100) + whole[200:])
    else:
        pack.unlink()
        if damage == "folder":
            pack.mkdir()
        else:
            pack.symlink_to(tmp_path / "nothing")
    if damage == "folder":
        with pytest.raises(ConversionError, match="Is a directory"):
            await ensure_pack(source)
        assert caplog.messages == [f"{pack}: file: is not a regular file; the pack is made again"]
        return
    assert await ensure_pack(source) == pack
    (told,) = caplog.messages
    assert told.startswith(f"{pack}: ")
    assert (pack.read_bytes(), pack.is_symlink()) == (whole, False)
    assert await ensure_pack(source) == pack  # whole again
    assert caplog.messages == [told]
    assert packs() == [pack.name]


def test_a_cache_that_can_only_be_read_is_enough_for_a_pack_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        model = write_gguf(folder / "m.gguf", TinyModel())
        monkeypatch.setenv("PI2RT_CACHE", str(folder / "cache"))
        program = """
import trio
from pi2rt.opening.pack_cache import ensure_pack
print(trio.run(ensure_pack, sys.argv[1]))
become_stranger()
print(trio.run(ensure_pack, sys.argv[1]))
"""
        done = run_limited(program, model)
        first, second = done.stdout.splitlines()
        assert first == second, done.stderr
    finally:
        shutil.rmtree(folder)
