"""Packs as they are written: what comes back, where it lies, and what is left behind when writing fails."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt._errors import ClosedError, ConversionError, ModelFormatError, RequestError
from pi2rt.formats import TensorInfo, open_model_file, pack_writer, row_blocks
from pi2rt.formats.pack import PackFile
from pi2rt.formats.pack_header import ALIGNMENT, Source, SourceFile, decode_metadata, encode_metadata
from pi2rt.formats.pack_writer import PackWriter, Planned
from pi2rt.formats.quants import TYPES

SOURCE = Source("model.gguf", "gguf", (SourceFile("model.gguf", 100, bytes(32)),))
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "negative": -(2**63),
    "large": 2**64 - 1,
    "float": 0.1,
    "yes": True,
    "no": False,
    "text": "Grüße, 世界\0!",
    "tokens": ["a", "", "ü", "x" * 70_000],
    "none": [],
}
PLAN = (
    Planned("embedding", "Q4_0", (17, 64), "blocks16"),
    Planned("norm", "F32", (64,)),
    Planned("cube", "F16", (2, 3, 5)),
    Planned("head", "Q6_K", (16, 256), "blocks16"),
    Planned("tokenizer.json", size=5000),
    Planned("empty.txt", size=0),
)


def contents(plan: tuple[Planned, ...] = PLAN) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {each.name: rng.integers(0, 256, each.nbytes, dtype=np.uint8) for each in plan}


def write_pack(
    path: Path,
    plan: tuple[Planned, ...] = PLAN,
    *,
    metadata: Mapping[str, Any] | str | None = None,
    source: Source = SOURCE,
    overwrite: bool = False,
) -> dict[str, np.ndarray]:
    """Writes a pack of random bytes and returns them."""
    data = contents(plan)
    raw = encode_metadata(METADATA if metadata is None else metadata)
    with PackWriter(path, source, "llama", raw, plan, overwrite=overwrite) as writer:
        for name, values in data.items():
            for start in range(0, max(1, values.nbytes), 1000):
                writer.write(name, values[start : start + 1000])
        writer.finish(source)
    return data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.pi2"


def test_everything_comes_back(path: Path) -> None:
    data = write_pack(path)
    with open_model_file(path) as file:
        assert isinstance(file, PackFile)
        assert file.architecture == "llama"
        assert file.metadata == METADATA
        assert file.source == SOURCE
        tensors = [each for each in PLAN if each.type]
        assert list(file.tensors) == [each.name for each in tensors]
        for each in tensors:
            info = file.tensors[each.name]
            assert (info.type, info.shape, info.layout) == (each.type, each.shape, each.layout)
            np.testing.assert_array_equal(file.read(each.name), data[each.name])
        assert file.read_companion("tokenizer.json", 5000) == data["tokenizer.json"].tobytes()
        assert file.read_companion("empty.txt", 0) == b""
        assert file.read_companion("absent", 0) is None
        assert file.companion("tokenizer.json") is None  # it is no file
        with pytest.raises(
            ModelFormatError, match=r"companion tokenizer\.json: has more than the 4999 bytes"
        ):
            file.read_companion("tokenizer.json", 4999)


def test_everything_begins_at_a_page(path: Path) -> None:
    data = write_pack(path)
    raw = path.read_bytes()
    assert len(raw) % ALIGNMENT == 0
    with PackFile(path) as file:
        at = file.sections[0].offset
        for section, each in zip(file.sections, PLAN, strict=True):
            assert (section.name, section.offset, section.nbytes) == (each.name, at, each.nbytes)
            content = raw[at : at + each.nbytes]
            assert content == data[each.name].tobytes()
            assert section.checksum == hashlib.blake2b(content, digest_size=16).digest()
            at += -(-each.nbytes // ALIGNMENT) * ALIGNMENT
            assert not any(raw[section.offset + each.nbytes : at])
        assert at == len(raw)


def test_a_pack_of_nothing(path: Path) -> None:
    write_pack(path, ())
    with PackFile(path) as file:
        assert not file.tensors
        assert not file.sections


def test_a_damaged_companion_is_refused(path: Path) -> None:
    write_pack(path)
    with PackFile(path) as file:
        at = next(each.offset for each in file.sections if each.name == "tokenizer.json")
    with path.open("r+b") as raw:
        raw.seek(at + 100)
        byte = raw.read(1)[0]
        raw.seek(at + 100)
        raw.write(bytes([byte ^ 1]))
    with (
        PackFile(path) as file,
        pytest.raises(ModelFormatError, match=r"tokenizer\.json: its checksum does not"),
    ):
        file.read_companion("tokenizer.json", 5000)


def test_metadata_of_a_directory_is_its_config(path: Path) -> None:
    text = (
        '{"model_type": "llama", "deep": [{"a": [1, 2.5, null]}], "odd": "\\ud800", "big": 1'
        + "0" * 400
        + "}"
    )
    source = Source("dir", "huggingface", SOURCE.files)
    write_pack(path, metadata=text, source=source)
    with PackFile(path) as file:
        assert file.metadata == {
            "model_type": "llama",
            "deep": [{"a": [1, 2.5, None]}],
            "odd": "\ud800",
            "big": 10**400,
        }


ARRAYS = st.sampled_from(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8"]).flatmap(
    lambda dtype: st.lists(st.integers(0, 1), max_size=9).map(lambda values: np.array(values, dtype))
)
TEXTS = st.text("a\0 ü世\U0001f600", max_size=40)
SCALARS = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), TEXTS)
VALUES = st.one_of(SCALARS, ARRAYS, st.lists(TEXTS, max_size=40), st.lists(ARRAYS, min_size=1, max_size=3))


@given(st.dictionaries(TEXTS, VALUES, max_size=6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_metadata_comes_back(metadata: dict[str, Any]) -> None:
    found = decode_metadata(encode_metadata(metadata), "gguf")
    assert list(found) == list(metadata)
    for key, value in metadata.items():
        same(found[key], value)


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert not found.flags.writeable
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("type_name", TYPES)
def test_sizes_are_those_of_the_native_module(type_name: str) -> None:
    native = pytest.importorskip(
        "pi2rt.cython_kernels.kernels.native", reason="the native module is not built"
    )
    for blocks in (1, 2, 3, 7, 64):
        columns = blocks * TYPES[type_name].block_elements
        for rows in (1, 15, 16, 17, 160):
            expected = native.matrix_bytes(type_name, rows, columns)
            assert row_blocks.matrix_bytes(type_name, rows, columns) == expected


def test_reads_parts_and_refuses_what_is_outside(path: Path) -> None:
    data = write_pack(path)
    with PackFile(path) as file:
        info = file.tensors["embedding"]
        part = np.zeros(100, np.uint8)
        file.read_into(info, 33, part.data)
        np.testing.assert_array_equal(part, data["embedding"][33:133])
        for start, count in ((0, info.nbytes + 1), (info.nbytes, 1), (-1, 1)):
            with pytest.raises(ValueError, match="are not inside tensor 'embedding'"):
                file.read_into(info, start, memoryview(bytearray(count)))
        stranger = TensorInfo("embedding", "Q4_0", (17, 64), Path("other"), info.offset, info.nbytes)
        with pytest.raises(ValueError, match="are not inside tensor"):
            file.read_into(stranger, 0, memoryview(bytearray(1)))
        section = file.sections[0]
        with pytest.raises(ValueError, match="are not inside 'embedding'"):
            file.read_section(section, 1, memoryview(bytearray(section.nbytes)))


def test_close_is_idempotent_and_final(path: Path) -> None:
    write_pack(path)
    file = PackFile(path)
    file.close()
    file.close()
    with pytest.raises(ClosedError, match="is closed"):
        file.read("norm")


def test_a_file_that_shrank_is_an_error(path: Path) -> None:
    write_pack(path)
    with PackFile(path) as file:
        os.truncate(path, file.tensors["head"].offset + 10)
        with pytest.raises(ModelFormatError, match=r"model\.pi2: file: ended at byte \d+ while reading"):
            file.read("head")


# -- writing that fails


def nothing_left(path: Path) -> bool:
    return not list(path.parent.iterdir())


def interrupted(writer: PackWriter) -> None:
    writer.write("embedding", contents()["embedding"])
    assert [each.name for each in writer.path.parent.iterdir()] == [".model.pi2.part"]
    raise KeyboardInterrupt


def test_an_unfinished_pack_leaves_nothing(path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        PackWriter(path, SOURCE, "llama", encode_metadata({}), PLAN) as writer,
    ):
        interrupted(writer)
    assert nothing_left(path)


def wrong_name(writer: PackWriter, data: dict[str, np.ndarray]) -> None:
    writer.write("norm", data["norm"])


def too_much(writer: PackWriter, data: dict[str, np.ndarray]) -> None:
    writer.write("embedding", data["embedding"])
    writer.write("norm", np.zeros(257, np.uint8))


def too_early(writer: PackWriter, data: dict[str, np.ndarray]) -> None:
    writer.write("embedding", data["embedding"])
    writer.finish(SOURCE)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (wrong_name, "256 bytes of 'norm' after 0 of 1152 bytes of 'embedding'"),
        (too_much, "257 bytes of 'norm' after 0 of 256 bytes of 'norm'"),
        (too_early, "'norm' has not been written"),
    ],
)
def test_what_is_written_is_what_was_planned(
    path: Path, mistake: Callable[[PackWriter, dict[str, np.ndarray]], None], message: str
) -> None:
    with (
        pytest.raises(ValueError, match=message),
        PackWriter(path, SOURCE, "llama", encode_metadata({}), PLAN) as writer,
    ):
        mistake(writer, contents())
    assert nothing_left(path)


def test_what_an_interrupted_run_left_is_taken_over(path: Path) -> None:
    part = path.with_name(".model.pi2.part")
    part.write_bytes(bytes(1 << 20))
    data = write_pack(path)
    assert not part.exists()
    with PackFile(path) as file:
        np.testing.assert_array_equal(file.read("head"), data["head"])


def test_two_writers_of_one_pack(path: Path) -> None:
    with PackWriter(path, SOURCE, "llama", encode_metadata({}), ()) as first:
        with pytest.raises(
            ConversionError, match=r"model\.pi2: cannot be written: another process is writing it"
        ):
            PackWriter(path, SOURCE, "llama", encode_metadata({}), ())
        first.finish(SOURCE)
    PackFile(path).close()


def test_a_pack_that_is_there_is_replaced_only_when_asked(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(RequestError, match=r"is there already; remove it, or ask .* \(--force\)"):
        write_pack(path)
    assert path.read_text() == "mine"
    write_pack(path, overwrite=True)
    assert [each.name for each in path.parent.iterdir()] == ["model.pi2"]
    PackFile(path).close()


def test_one_that_appears_meanwhile_is_kept(path: Path) -> None:
    with PackWriter(path, SOURCE, "llama", encode_metadata({}), ()) as writer:
        path.write_text("mine")
        with pytest.raises(RequestError, match="is there already"):
            writer.finish(SOURCE)
    assert [each.name for each in path.parent.iterdir()] == ["model.pi2"]
    assert path.read_text() == "mine"


def test_only_files_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(RequestError, match="folder: cannot be written: it is a directory"):
        write_pack(folder, overwrite=True)
    with pytest.raises(RequestError, match=r"absent/x\.pi2: cannot be written: its folder does not exist"):
        write_pack(tmp_path / "absent" / "x.pi2")


def test_a_full_disk_is_found_before_anything_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(path.parent)
    fields = list(real)
    fields[4] = (100 << 10) // real.f_frsize  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    plan = (Planned("t", "F32", (1 << 20,)),)
    with pytest.raises(
        ConversionError, match=r"takes 4\.1 MiB, but only 0\.1 MiB are free there; free 4\.0 MiB"
    ):
        write_pack(path, plan)
    assert nothing_left(path)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync"])
def test_a_disk_that_fills_up_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(pack_writer, "FLUSH_BYTES", 4096)
    real, calls = getattr(os, call), []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3 or call == "fsync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(ConversionError, match=r"the disk is full .*: the pack takes 0\.1 MiB, .* are free"):
        write_pack(path)
    assert nothing_left(path)


def test_a_disk_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(ConversionError, match=r"model\.pi2: cannot be written: Input/output error"):
        write_pack(path)
    assert nothing_left(path)


def test_writes_that_come_short_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:777], offset))
    data = write_pack(path)
    monkeypatch.undo()
    with PackFile(path) as file:
        np.testing.assert_array_equal(file.read("embedding"), data["embedding"])


def test_names_that_no_reader_would_take(path: Path) -> None:
    plan = (Planned("n" * 300, "F32", (4,)),)
    with pytest.raises(
        ConversionError, match=r"model\.gguf: its header does not fit into a pack: .*length <= 255"
    ):
        PackWriter(path, SOURCE, "llama", encode_metadata({}), plan)
    with pytest.raises(ConversionError, match=r"it takes \d+ bytes; at most 67108864 are allowed"):
        PackWriter(path, SOURCE, "llama", encode_metadata({"k": "x" * (64 << 20)}), ())
