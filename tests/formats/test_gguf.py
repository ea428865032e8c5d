"""What a good GGUF file gives back: files written by the gguf package, and the real default model."""

from __future__ import annotations

import os
import struct
import threading
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt._errors import ClosedError, ModelFormatError
from pi2rt.formats import quants
from pi2rt.formats.gguf import GgufFile
from pi2rt.formats.model_file import TensorInfo, open_model_file


def write(path: Path, arch: str = "llama") -> GGUFWriter:
    """A writer that has only the architecture yet."""
    writer = GGUFWriter(path, arch)
    writer.add_quantization_version(2)
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_type_is_read_bit_exactly(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    rng = np.random.default_rng(0)
    writer = write(path)
    written: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    for i, (name, kind) in enumerate(quants.TYPES.items()):
        for shape in ((512,), (3 + i, 256), (2, 5, 256), (2, 3, 4, 256)):
            raw = rng.integers(0, 256, (*shape[:-1], kind.nbytes(shape[-1])), np.uint8)
            tensor = f"{name}.{len(shape)}.weight"
            writer.add_tensor(tensor, raw, raw_dtype=GGMLQuantizationType[name])
            written[tensor] = (shape, raw)
    finish(writer)
    with open_model_file(path) as file:
        assert isinstance(file, GgufFile)
        assert file.companion("tokenizer.json") is None
        assert list(file.tensors) == list(written)
        for name, (shape, raw) in written.items():
            info = file.tensors[name]
            assert (info.name, info.type, info.shape) == (name, name.split(".")[0], shape)
            assert (info.nbytes, info.path, info.offset % 32) == (raw.size, path, 0)
            np.testing.assert_array_equal(file.read(name), raw.reshape(-1))


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    path = tmp_path / "keys.gguf"
    writer = write(path, arch="qwen2")
    scalars = {
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "f32": 0.5,
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": 1e300,
        "yes": True,
        "no": False,
        "text": "Grüße, 世界\0!",
        "empty": "",
    }
    for key, value in scalars.items():
        kind = {
            "f32": "FLOAT32",
            "f64": "FLOAT64",
            "yes": "BOOL",
            "no": "BOOL",
            "text": "STRING",
            "empty": "STRING",
        }
        number = kind.get(key) or key.replace("u", "UINT").replace("i", "INT")
        writer.add_key_value(key, value, gguf.GGUFValueType[number])
    arrays = {
        "ints": [1, -2, 3],
        "floats": [0.5, -1.5],
        "bools": [True, False, True],
        "strings": ["a", "", "ü", "x" * 300],
    }
    for key, array in arrays.items():
        writer.add_array(key, array)
    writer.add_array("nested", [[1, 2], [3]])
    finish(writer)
    with GgufFile(path) as file:
        assert file.architecture == "qwen2"
        assert file.metadata["general.quantization_version"] == 2
        for key, value in scalars.items():
            assert file.metadata[key] == value
            assert type(file.metadata[key]) is type(value)
        assert file.metadata["strings"] == arrays["strings"]
        for key in ("ints", "floats", "bools"):
            array = file.metadata[key]
            assert isinstance(array, np.ndarray)
            assert array.tolist() == arrays[key]
            assert not array.flags.writeable
        assert [a.tolist() for a in file.metadata["nested"]] == [[1, 2], [3]]
        assert not file.tensors


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "aligned.gguf"
    writer = write(path)
    writer.add_custom_alignment(alignment)
    tensors = {f"t{i}": np.arange(i + 1, dtype=np.float32) for i in range(5)}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    with GgufFile(path) as file:
        for name, values in tensors.items():
            assert file.tensors[name].offset % alignment == 0
            np.testing.assert_array_equal(file.read(name).view(np.float32), values)


def test_version_2_reads_as_version_3(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    writer = write(path)
    writer.add_tensor("t", np.ones((2, 3), np.float32))
    finish(writer)
    data = bytearray(path.read_bytes())
    assert data[4:8] == struct.pack("<I", 3)
    data[4:8] = struct.pack("<I", 2)
    path.write_bytes(data)
    with GgufFile(path) as file:
        np.testing.assert_array_equal(file.read("t").view(np.float32), np.ones(6))


def test_reads_parts_and_refuses_what_is_outside(tmp_path: Path) -> None:
    path = tmp_path / "parts.gguf"
    values = np.arange(256, dtype=np.float32)
    writer = write(path)
    writer.add_tensor("t", values)
    writer.add_tensor("u", -values)
    finish(writer)
    raw = values.view(np.uint8)
    with GgufFile(path) as file:
        t = file.tensors["t"]
        part = np.zeros((5, 20), np.uint8)
        file.read_into(t, 17, part.data)  # any contiguous buffer, whatever its shape and item size
        np.testing.assert_array_equal(part.reshape(-1), raw[17:117])
        floats = np.zeros(4, np.float32)
        file.read_into(t, 1008, floats.data)
        np.testing.assert_array_equal(floats, values[-4:])
        file.read_into(t, t.nbytes, memoryview(bytearray()))
        for start, count in ((0, 1025), (1024, 1), (-1, 1), (2**62, 1)):
            with pytest.raises(ValueError, match="are not inside tensor 't'"):
                file.read_into(t, start, memoryview(bytearray(count)))
        stranger = TensorInfo("t", "F32", (256,), tmp_path / "other", t.offset, t.nbytes)
        with pytest.raises(ValueError, match="are not inside tensor 't'"):
            file.read_into(stranger, 0, memoryview(bytearray(4)))
        with pytest.raises(KeyError):
            file.read("absent")


def test_close_is_idempotent_and_final(tmp_path: Path) -> None:
    path = tmp_path / "closed.gguf"
    writer = write(path)
    writer.add_tensor("t", np.zeros(8, np.float32))
    finish(writer)
    file = GgufFile(path)
    file.close()
    file.close()
    with pytest.raises(ClosedError, match="is closed"):
        file.read("t")


def test_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "shrank.gguf"
    writer = write(path)
    writer.add_tensor("t", np.zeros(1024, np.float32))
    finish(writer)
    with GgufFile(path) as file:
        os.truncate(path, file.tensors["t"].offset + 100)
        with pytest.raises(ModelFormatError, match=r"shrank\.gguf: file: ended at byte \d+ while reading"):
            file.read("t")


def test_threads_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "threads.gguf"
    rng = np.random.default_rng(0)
    written = {f"t{i}": rng.standard_normal(20_000).astype(np.float32) for i in range(8)}
    writer = write(path)
    for name, values in written.items():
        writer.add_tensor(name, values)
    finish(writer)
    wrong: list[str] = []
    with GgufFile(path) as file:

        def work() -> None:
            for name, values in written.items():
                reads = (file.read(name).view(np.float32) for _ in range(5))
                wrong.extend(name for read in reads if not np.array_equal(read, values))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# Arrays of strings are read in vectorised passes where that applies; to these strings it does not.
AWKWARD = [
    "",
    "\0",
    "a\0b",
    "\0" * 7,
    "\0" * 8,
    "\0" * 20,
    "\x01",
    "x" * 255,
    "x" * 256,
    "x" * 70_000,
    "ü" * 127,
]
TOKENS = st.one_of(st.text(max_size=5), st.sampled_from(AWKWARD), st.text("\0\x01\x07a", max_size=12))


def strings_back(path: Path, arrays: list[list[str]]) -> list[list[str]]:
    """Writes the arrays and reads them again. By hand: the gguf package drops empty arrays."""

    def string(text: str) -> bytes:
        data = text.encode()
        return struct.pack("<Q", len(data)) + data

    keys = [string("general.architecture") + struct.pack("<I", 8) + string("llama")]
    for i, array in enumerate(arrays):
        head = string(f"array{i}") + struct.pack("<IIQ", 9, 8, len(array))
        keys.append(head + b"".join(map(string, array)))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys))
    with GgufFile(path) as file:
        return [file.metadata[f"array{i}"] for i in range(len(arrays))]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strings") / "strings.gguf"


@given(st.lists(st.lists(TOKENS, max_size=8), max_size=2), st.integers(0, 400))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_strings_come_back(scratch: Path, arrays: list[list[str]], plain: int) -> None:
    """Between runs of plain tokens, so that the passes begin, meet the awkward ones, and begin again."""
    tokens = [f"tok{i}" for i in range(plain)]
    arrays = [tokens + array + tokens for array in arrays]
    assert strings_back(scratch, arrays) == arrays


@pytest.mark.parametrize("width", [1, 3, 20, 200, 255, 256, 1000])
def test_long_arrays_come_back(scratch: Path, width: int) -> None:
    """Longer than the window over the file, so that strings lie across its end."""
    array = [f"{i:>{width}}"[-width:] for i in range(3_000_000 // (width + 8))]
    array[len(array) // 2] = ""
    assert strings_back(scratch, [array, array[:10]]) == [array, array[:10]]


def test_real_model(smollm2: Path) -> None:
    with open_model_file(smollm2) as file:
        assert file.architecture == "llama"
        assert file.metadata["llama.rope.freq_base"] == 100_000.0
        tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
        assert (len(tokens), tokens[0], tokens[-1]) == (49152, "<|endoftext|>", "ectable")
        assert (len(merges), merges[0], merges[-1]) == (48900, "Ġ t", "ect able")
        assert len(file.tensors) == 272
        assert file.tensors["blk.29.ffn_down.weight"].shape == (576, 1536)
        assert file.tensors["token_embd.weight"].type == "Q8_0"
        for name, tensor in file.tensors.items():
            assert quants.check_scales(tensor.type, file.read(name)) is None


@pytest.mark.slow  # the gguf package takes ten seconds to read it
def test_real_model_reads_as_the_gguf_package_does(smollm2: Path) -> None:
    theirs = GGUFReader(smollm2)
    with GgufFile(smollm2) as file:
        assert [t.name for t in theirs.tensors] == list(file.tensors)
        for t in theirs.tensors:
            info = file.tensors[t.name]
            assert info.type == t.tensor_type.name
            assert info.shape == tuple(t.shape.tolist()[::-1])
            assert (info.offset, info.nbytes) == (t.data_offset, t.n_bytes)
            np.testing.assert_array_equal(file.read(t.name), t.data.view(np.uint8).reshape(-1))
        assert set(theirs.fields) - {f for f in theirs.fields if f.startswith("GGUF.")} == set(file.metadata)
        for key, value in file.metadata.items():
            field = theirs.fields[key]
            if isinstance(value, list):  # contents() of the whole vocabulary takes seconds
                assert len(value) == len(field.data)
                for i in range(0, len(value), 997):
                    assert value[i] == field.contents(i)
            elif isinstance(value, np.ndarray):
                assert len(value) == len(field.data)
                assert value[::997].tolist() == [field.contents(i) for i in range(0, len(value), 997)]
            else:
                assert value == field.contents()


def test_real_model_opens_in_little_memory(smollm2: Path) -> None:
    """Python strings of the vocabulary and merges take 9 MB; the header is 1.8 MB and goes through a
    window."""
    tracemalloc.start()
    try:
        with GgufFile(smollm2) as file:
            kept, peak = tracemalloc.get_traced_memory()
            assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    finally:
        tracemalloc.stop()
    assert kept < 12 << 20
    assert peak < kept + (4 << 20)
