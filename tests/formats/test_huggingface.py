"""Hugging Face directories, good ones first, then broken in every way we know."""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi2rt._errors import ClosedError, ModelFormatError, ModelNotFoundError, Pi2rtError, UnsupportedModelError
from pi2rt.formats import quants, safetensors_file
from pi2rt.formats.huggingface import HuggingFaceDirectory
from pi2rt.formats.model_file import open_model_file

CONFIG = {"model_type": "llama", "hidden_size": 64, "rope_scaling": None, "eos_token_id": [1, 2]}

Tensor = dict[str, Any]


def tensor(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bits, as ``safetensors.deserialize`` describes a tensor."""
    count = int(np.prod(shape)) * quants.TYPES[kind].block_bytes
    data = np.random.default_rng(seed).integers(0, 256, count, np.uint8).tobytes()
    return {"dtype": kind, "shape": list(shape), "data": data}


def serialize(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """By hand: the package's own takes bfloat16 only from frameworks that have it."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, t in tensors.items():
        offsets = [len(data), len(data) + len(t["data"])]
        entries[name] = {"dtype": t["dtype"], "shape": t["shape"], "data_offsets": offsets}
        data += t["data"]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


TENSORS = {
    "model.embed_tokens.weight": tensor("F16", (10, 64), 1),
    "model.norm.weight": tensor("F32", (64,), 2),
    "model.layers.0.mlp.up_proj.weight": tensor("BF16", (3, 64), 3),
    "conv": tensor("BF16", (2, 3, 4, 5), 4),
    "scalar": tensor("F32", (), 5),
    "nothing": tensor("F16", (0, 4), 6),
}


def write(path: Path, config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(serialize(TENSORS, {"format": "pt"}))
    return path


def write_shards(path: Path, **weight_map: str) -> Path:
    """Each tensor in a shard of its own; ``weight_map`` overrides the index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    index = {}
    for i, (name, value) in enumerate(TENSORS.items()):
        shard = f"model-{i + 1:05}-of-{len(TENSORS):05}.safetensors"
        (path / shard).write_bytes(serialize({name: value}))
        index[name] = shard
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index | weight_map})
    (path / "model.safetensors.index.json").write_text(text)
    return path


def check(file: HuggingFaceDirectory) -> None:
    assert file.architecture == "llama"
    assert file.metadata == CONFIG
    assert set(file.tensors) == set(TENSORS)
    for name, written in TENSORS.items():
        info = file.tensors[name]
        assert (info.name, info.type, list(info.shape)) == (name, written["dtype"], written["shape"])
        assert info.nbytes == len(written["data"])
        assert file.read(name).tobytes() == written["data"]


@pytest.mark.parametrize("layout", [write, write_shards])
def test_reads_what_was_written(tmp_path: Path, layout: Any) -> None:
    with open_model_file(layout(tmp_path)) as file:
        assert isinstance(file, HuggingFaceDirectory)
        check(file)


def test_the_packages_reader_sees_the_same() -> None:
    assert dict(safetensors.deserialize(serialize(TENSORS, {"format": "pt"}))) == TENSORS


def test_reads_what_the_package_wrote(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.float16),
    }
    write(tmp_path)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors", {"format": "np"})
    with HuggingFaceDirectory(tmp_path) as file:
        assert set(file.tensors) == set(arrays)
        for name, array in arrays.items():
            assert file.tensors[name].shape == array.shape
            np.testing.assert_array_equal(file.read(name).view(array.dtype), array.reshape(-1))


def test_reads_through_links_as_the_hubs_cache_has_them(tmp_path: Path) -> None:
    blobs = write(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(Path("..") / "blobs" / name)
    with HuggingFaceDirectory(snapshot) as file:
        check(file)


def test_one_file_goes_before_an_index(tmp_path: Path) -> None:
    write(write_shards(tmp_path))
    with HuggingFaceDirectory(tmp_path) as file:
        assert {t.path.name for t in file.tensors.values()} == {"model.safetensors"}


def test_tensors_that_the_index_does_not_name_are_not_there(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv": "model-00004-of-00006.safetensors"}}))
    with HuggingFaceDirectory(tmp_path) as file:
        assert list(file.tensors) == ["conv"]


def test_companions(tmp_path: Path) -> None:
    with HuggingFaceDirectory(write(tmp_path)) as file:
        assert file.companion("tokenizer.json") is None
        (tmp_path / "tokenizer.json").write_text("{}")
        assert file.companion("tokenizer.json") == tmp_path / "tokenizer.json"
        for name in ("../config.json", "/etc/hostname", "..", ".", "", "a\0b", "a\\b"):
            with pytest.raises(ModelFormatError, match="is not the plain name of a file in this directory"):
                file.companion(name)


def test_reads_parts_and_refuses_what_is_outside(tmp_path: Path) -> None:
    data = TENSORS["conv"]["data"]
    with HuggingFaceDirectory(write_shards(tmp_path)) as file:
        conv = file.tensors["conv"]
        part = bytearray(100)
        file.read_into(conv, 30, memoryview(part))
        assert part == data[30:130]
        for start, count in ((0, len(data) + 1), (len(data), 1), (-1, 1)):
            with pytest.raises(ValueError, match="are not inside tensor 'conv'"):
                file.read_into(conv, start, memoryview(bytearray(count)))
    with HuggingFaceDirectory(write(tmp_path / "other")) as other:
        with pytest.raises(ValueError, match="are not inside tensor 'conv'"):
            other.read_into(conv, 0, memoryview(bytearray(1)))


def test_close_is_idempotent_and_final(tmp_path: Path) -> None:
    file = HuggingFaceDirectory(write_shards(tmp_path))
    file.close()
    file.close()
    with pytest.raises(ClosedError, match="is closed"):
        file.read("conv")


def test_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    with HuggingFaceDirectory(write(tmp_path)) as file:
        os.truncate(tmp_path / "model.safetensors", file.tensors["conv"].offset + 10)
        with pytest.raises(ModelFormatError, match=r"model\.safetensors: file: ended at byte"):
            file.read("conv")


def refusal(path: Path) -> Pi2rtError:
    """The error that opening the directory gives; it must not have taken much memory to find out."""
    tracemalloc.start()
    try:
        with pytest.raises(Pi2rtError) as caught:
            open_model_file(path).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # files are a few kilobytes; a module imported on first use takes more than they do
    assert str(caught.value).isprintable()
    return caught.value


ENTRY = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


def header(entries: object = None, data: int = 32, *, length: int | None = None, **changes: object) -> bytes:
    """A file with one tensor "t" of 32 bytes whose entry is changed, or with other entries."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries or {"t": ENTRY | changes}).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header length: needs 8 bytes, but the file has 0"),
    "seven bytes": (bytes(7), "header length: needs 8 bytes, but the file has 7"),
    "length lies": (header(length=2**40), f"header length: is {2**40} bytes, but the file has"),
    "length overflows": (header(length=2**64 - 1), f"header length: is {2**64 - 1} bytes, but the file has"),
    "length zero": (header(length=0), "header: is not a JSON object"),
    "not JSON": (header(b"{]"), "header: is not a JSON object: JSON is malformed"),
    "not UTF-8": (header(b'{"\xff": 1}'), "header: is not a JSON object"),
    "an array": (header(b"[]"), "header: is not a JSON object: Expected `object`, got `array`"),
    "cut": (header(b'{"t": {"dtype": "F3'), "header: is not a JSON object"),
    "deep": (header(b'{"t":' + b"[" * 100_000), "header: is not a JSON object"),
    "deep entry": (header(b'{"t":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "header: is not a JSON object"),
    "entry not an object": (
        header({"t": 1}),
        "tensor t: has a malformed entry: Expected `object`, got `int`",
    ),
    "no dtype": (
        header({"t": {"shape": [8], "data_offsets": [0, 32]}}),
        "tensor t: has a malformed entry: Object missing required field `dtype`",
    ),
    "no shape": (header({"t": {"dtype": "F32", "data_offsets": [0, 32]}}), "missing required field `shape`"),
    "no offsets": (header({"t": {"dtype": "F32", "shape": [8]}}), "missing required field `data_offsets`"),
    "shape negative": (header(shape=[-2, -4]), "tensor t: has a malformed entry: Expected `int` >= 0"),
    "shape not whole": (header(shape=[2.5]), "tensor t: has a malformed entry: Expected `int`, got `float`"),
    "shape huge": (header(shape=[2**64]), "tensor t: has a malformed entry: "),
    "shape endless": (
        header(shape=[1] * 9),
        "tensor t: has a malformed entry: Expected `array` of length <= 8",
    ),
    "shape overflows": (
        header(shape=[2**62, 8]),
        "tensor t: data_offsets: span 32 bytes, but shape [46116860",
    ),
    "one offset": (header(data_offsets=[0]), "tensor t: has a malformed entry: Expected `array` of length 2"),
    "offset negative": (
        header(data_offsets=[-32, 0]),
        "tensor t: has a malformed entry: Expected `int` >= 0",
    ),
    "offsets reversed": (
        header(data_offsets=[32, 0]),
        "tensor t: data_offsets: 32 to 0 are not inside the 32 bytes",
    ),
    "offset past the end": (
        header(data_offsets=[8, 40]),
        "tensor t: data_offsets: 8 to 40 are not inside the 32",
    ),
    "data cut": (
        header(data=31),
        "tensor t: data_offsets: 0 to 32 are not inside the 31 bytes of tensor data",
    ),
    "span and shape differ": (
        header(shape=[2, 3]),
        "tensor t: data_offsets: span 32 bytes, but shape [2, 3] of F32 takes 24",
    ),
    "overlap": (
        header({"t": ENTRY, "u": ENTRY | {"shape": [1], "data_offsets": [28, 32]}}),
        "tensor u: offset: byte 164 of the file lies inside tensor t",
    ),
    "name with control characters": (header({"\x1b[2J\n": 1}), r"tensor \x1b[2J\n: has a malformed entry"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors(tmp_path: Path, case: str) -> None:
    data, message = MALFORMED[case]
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    error = refusal(tmp_path)
    assert type(error) is ModelFormatError
    assert str(error).startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert message in str(error)


@pytest.mark.parametrize("dtype", ["F64", "I8", "U8", "I32", "I64", "BOOL", "F8_E4M3", "f32", "\n"])
def test_dtypes_that_cannot_be_read_are_listed_and_refused_where_they_are_read(
    tmp_path: Path, dtype: str
) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header(dtype=dtype))
    with open_model_file(tmp_path) as file:
        assert file.tensors["t"].nbytes == 0
        with pytest.raises(UnsupportedModelError) as caught:
            file.read("t")
    shown = dtype.replace("\n", r"\n")
    assert f"tensor t: type: is {shown} of safetensors; pi2rt reads F32, F16, BF16" in str(caught.value)


def test_header_is_bounded(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header(length=1 << 29))
    os.truncate(tmp_path / "model.safetensors", 1 << 30)
    limit = safetensors_file.MAX_HEADER_BYTES
    assert f"header length: is {1 << 29} bytes; at most {limit} are allowed" in str(refusal(tmp_path))


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file: is not JSON: Expecting value"),
    "not JSON": (b"{model_type}", "file: is not JSON: Expecting property name"),
    "not UTF-8": (b'{"model_type": "\xff"}', "file: is not JSON: 'utf-8' codec can't decode"),
    "an array": (b"[]", "file: holds a list, not an object"),
    "deep": (b"[" * 100_000, "file: is not JSON: maximum recursion depth exceeded"),
    "endless number": (b'{"model_type": ' + b"9" * 10_000 + b"}", "file: is not JSON: Exceeds the limit"),
    "no model_type": (b"{}", "model_type: is missing"),
    "model_type a list": (b'{"model_type": ["llama"]}', "model_type: is ['llama'], not a name"),
    "model_type empty": (b'{"model_type": ""}', "model_type: is '', not a name"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_malformed_config(tmp_path: Path, case: str) -> None:
    data, message = CONFIGS[case]
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(data)
    error = refusal(tmp_path)
    assert type(error) is ModelFormatError
    assert str(error).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_config_is_bounded(tmp_path: Path) -> None:
    write(tmp_path)
    os.truncate(tmp_path / "config.json", 1 << 30)
    assert f"config.json: file: is {1 << 30} bytes; at most {4 << 20} are allowed" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "..", ".", "a/b.safetensors", "a\\b", "a\0b", "sub/../../x"]
)
def test_index_that_leads_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(header())
    write_shards(tmp_path / "model", conv=name)
    error = refusal(tmp_path / "model")
    assert type(error) is ModelFormatError
    assert "model.safetensors.index.json: weight_map: '" in str(error)
    assert "is not the plain name of a file in this directory" in str(error)


INDEXES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "file: is not a safetensors index: Input data was truncated"),
    "not UTF-8": (b'{"weight_map": {"\xff": "a"}}', "file: is not a safetensors index: "),
    "no weight_map": (b"{}", "file: is not a safetensors index: Object missing required field `weight_map`"),
    "weight_map a list": (
        b'{"weight_map": []}',
        "file: is not a safetensors index: Expected `object`, got `array`",
    ),
    "file a number": (
        b'{"weight_map": {"t": 1}}',
        "file: is not a safetensors index: Expected `str`, got `int`",
    ),
    "file empty": (
        b'{"weight_map": {"t": ""}}',
        "file: is not a safetensors index: Expected `str` of length >= 1",
    ),
    "deep": (b'{"weight_map":' + b"[" * 100_000, "file: is not a safetensors index: "),
    "too many files": (
        json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(513)}}).encode(),
        "weight_map: names 513 files; at most 512 are allowed",
    ),
    "tensor not in its file": (
        b'{"weight_map": {"absent": "model-00001-of-00006.safetensors"}}',
        "weight_map absent: model-00001-of-00006.safetensors has no tensor of that name",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_malformed_index(tmp_path: Path, case: str) -> None:
    data, message = INDEXES[case]
    index = write_shards(tmp_path) / "model.safetensors.index.json"
    index.write_bytes(data)
    error = refusal(tmp_path)
    assert type(error) is ModelFormatError
    assert str(error).startswith(f"{index}: {message}")


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json: cannot be opened: No such file"):
        HuggingFaceDirectory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        ModelFormatError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        HuggingFaceDirectory(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin: is pickled, which can run code"):
        HuggingFaceDirectory(tmp_path)
    write_shards(tmp_path)
    (tmp_path / "model-00003-of-00006.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"model-00003-of-00006\.safetensors: cannot be opened"):
        HuggingFaceDirectory(tmp_path)


def test_refusing_leaves_no_file_open(tmp_path: Path) -> None:
    write_shards(tmp_path)
    os.truncate(tmp_path / "model-00004-of-00006.safetensors", 100)
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ModelFormatError):
            HuggingFaceDirectory(tmp_path)
    assert sorted(os.listdir("/proc/self/fd")) == before


# Fuzzing: whatever the bytes, the directory opens and can be read, or it is refused with one of our errors.

FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")
CHANGE = st.tuples(
    st.sampled_from(("byte", "cut", "delete", "repeat", "insert")),
    st.integers(0, 2000),
    st.one_of(
        st.binary(min_size=1, max_size=2),
        st.sampled_from(
            [
                b'"',
                b"{",
                b"[" * 50,
                b"]",
                b"}",
                b",",
                b"-",
                b"1e999",
                b"9" * 30,
                b"null",
                b"\\u0000",
                b"\\ud800",
            ]
        ),
    ),
)


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, list[tuple[str, int, bytes]]]:
    return draw(st.sampled_from(FILES)), draw(st.lists(CHANGE, min_size=1, max_size=4))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A directory with shards, where one more ``model.safetensors`` is a shard too, and what its files
    hold."""
    path = tmp_path_factory.mktemp("fuzz")
    write_shards(path)
    return path, {
        "config.json": (path / "config.json").read_bytes(),
        "model.safetensors": serialize(TENSORS),
        "model.safetensors.index.json": (path / "model.safetensors.index.json").read_bytes(),
    }


def check_fuzzed(
    scratch: tuple[Path, dict[str, bytes]], change: tuple[str, list[tuple[str, int, bytes]]]
) -> None:
    path, originals = scratch
    name, mutations = change
    data = bytearray(originals[name])
    for what, at, value in mutations:
        at = at % (len(data) + 1)
        if what == "byte":
            data[at : at + len(value)] = value
        elif what == "cut":
            del data[at:]
        elif what == "delete":
            del data[at : at + len(value) * 8]
        elif what == "repeat":
            data[at:at] = data[at : at + 40]
        else:
            data[at:at] = value
    for file_name, original in originals.items():
        if file_name != "model.safetensors" or name == file_name:
            (path / file_name).write_bytes(data if name == file_name else original)
    refused: str | None = None
    tracemalloc.start()
    try:
        with HuggingFaceDirectory(path) as file:
            for tensor_name, info in file.tensors.items():
                assert len(file.read(tensor_name)) == info.nbytes
    except Pi2rtError as error:
        refused = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        (path / "model.safetensors").unlink(missing_ok=True)
    assert peak < 4 << 20  # files are a few kilobytes; a module imported on first use takes more than they do
    assert refused is None or re.match(re.escape(f"{path}") + r".*: \S", refused)


@given(changes())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_fuzz(scratch: Any, change: Any) -> None:
    check_fuzzed(scratch, change)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # in parts, since faulthandler takes two minutes for a hang
@given(change=changes())
@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzz_for_minutes(scratch: Any, part: int, change: Any) -> None:
    check_fuzzed(scratch, change)
