"""GGUF models in several files, as llama-gguf-split and the gguf package write them."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pi2rt._errors import ModelFormatError, ModelNotFoundError
from pi2rt.formats.gguf import GgufFile
from pi2rt.formats.model_file import open_model_file
from pi2rt.models import describe
from pi2rt.planner.pack.convert import convert, source_stamps
from tests.support.tiny_models import TinyModel, write_gguf


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    first = write_gguf(tmp_path / "m.gguf", TinyModel(seed=3), part_tensors=12)
    found = sorted(first.parent.glob("m-*.gguf"))
    assert [path.name for path in found] == [f"m-0000{k}-of-00003.gguf" for k in (1, 2, 3)]
    return found


def whole(folder: Path) -> Path:
    return write_gguf(folder / "whole.gguf", TinyModel(seed=3))


def change(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def u16_key(name: str, value: int) -> bytes:
    return name.encode() + (2).to_bytes(4, "little") + value.to_bytes(2, "little")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_part_opens_the_whole_model(parts: list[Path], tmp_path: Path, which: int) -> None:
    with open_model_file(parts[which]) as file, open_model_file(whole(tmp_path)) as one:
        assert isinstance(file, GgufFile)
        assert (file.path, file.paths, file.architecture) == (parts[0], tuple(parts), "llama")
        assert set(file.tensors) == set(one.tensors)
        assert {info.path for info in file.tensors.values()} == set(parts)
        for name in one.tensors:
            np.testing.assert_array_equal(file.read(name), one.read(name))
        assert describe(file) == describe(one)


def test_stacks_of_experts_may_be_in_any_part(tmp_path: Path) -> None:
    model = TinyModel("mixtral", seed=1)
    first = write_gguf(tmp_path / "m.gguf", model, part_tensors=2)
    with open_model_file(first) as file, open_model_file(write_gguf(tmp_path / "w.gguf", model)) as one:
        assert set(file.tensors) == set(one.tensors)
        for name in one.tensors:
            np.testing.assert_array_equal(file.read(name), one.read(name))


def test_a_pack_of_parts_is_that_of_the_whole(parts: list[Path], tmp_path: Path) -> None:
    convert(parts[1], tmp_path / "parts.pi2")
    convert(whole(tmp_path), tmp_path / "whole.pi2")
    with open_model_file(tmp_path / "parts.pi2") as file, open_model_file(tmp_path / "whole.pi2") as one:
        assert set(file.tensors) == set(one.tensors)
        for name in one.tensors:
            np.testing.assert_array_equal(file.read(name), one.read(name))


def test_the_stamps_of_a_model_are_those_of_all_parts(parts: list[Path]) -> None:
    with open_model_file(parts[0]) as file:
        before = source_stamps(file)
    assert [name for name, _ in before] == [os.fspath(path) for path in parts]
    os.utime(parts[2], ns=(1, 1))
    with open_model_file(parts[2]) as file:
        assert source_stamps(file)[:2] == before[:2]
        assert source_stamps(file)[2] != before[2]


@pytest.mark.parametrize("missing", [0, 2])
def test_a_missing_part_is_named(parts: list[Path], missing: int) -> None:
    parts[missing].unlink()
    message = re.escape(f"{parts[missing]}: no such file; it is part {missing + 1} of 3 of the model that")
    with pytest.raises(ModelNotFoundError, match=message):
        open_model_file(parts[1])


def test_a_part_with_another_name_says_which_one_it_needs(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(ModelFormatError, match=r"name: this is part 1 of 3; .* NAME-00001-of-00003\.gguf"):
        open_model_file(renamed)


def test_parts_in_the_wrong_order_are_refused(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(
        ModelFormatError, match=r"m-00003-of-00003\.gguf: metadata split\.no: is 1, but .* says 2"
    ):
        open_model_file(parts[0])


def test_a_tensor_in_two_parts_is_refused(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    change(parts[2], u16_key("split.no", 1), u16_key("split.no", 2))
    with pytest.raises(ModelFormatError, match=r"m-00003.*: tensor .*: is in m-00002-of-00003\.gguf, too"):
        open_model_file(parts[0])


def test_the_number_of_tensors_must_be_right(parts: list[Path]) -> None:
    data = parts[0].read_bytes()
    at = data.index(b"split.tensors.count") + len("split.tensors.count") + 4
    count = int.from_bytes(data[at : at + 4], "little")
    parts[0].write_bytes(data[:at] + (count + 1).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(
        ModelFormatError, match=f"split.tensors.count: is {count + 1}, but the parts have {count}"
    ):
        open_model_file(parts[0])


def test_a_failed_open_closes_every_part(parts: list[Path]) -> None:
    parts[2].write_bytes(b"GGUF")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ModelFormatError, match="m-00003-of-00003"):
            open_model_file(parts[0])
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_count_of_one_or_none_is_a_whole_model(tmp_path: Path) -> None:
    for count in (0, 1):
        path = write_gguf(tmp_path / f"{count}.gguf", TinyModel(), metadata={"split.count": count})
        with open_model_file(path) as file:
            assert isinstance(file, GgufFile)
            assert file.paths == (path,)


def test_a_number_beyond_the_parts_is_refused(parts: list[Path]) -> None:
    change(parts[1], u16_key("split.no", 1), u16_key("split.no", 65535))
    with pytest.raises(ModelFormatError, match=r"split\.no: is 65535; the parts are numbered from 0 to 2"):
        open_model_file(parts[1])
