"""Malformed and malicious GGUF files: each is refused with its own message, and nothing big is allocated
first."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi2rt._errors import ModelFormatError, ModelNotFoundError, Pi2rtError, UnsupportedModelError
from pi2rt.formats import gguf_header
from pi2rt.formats.gguf import GgufFile
from pi2rt.formats.gguf_part import MAX_KEYS, MAX_TENSORS
from pi2rt.formats.model_file import open_model_file

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
HUGE = 2**64 - 1


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + elements


def tensor(name: str | bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    """An entry of the table; ``shape`` rows first, as everywhere in pi2rt."""
    return string(name) + u32(len(shape)) + u64(*shape[::-1]) + u32(kind) + u64(offset)


ARCHITECTURE = key("general.architecture", STRING, string("llama"))


def build(
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    architecture: bytes = ARCHITECTURE,
) -> bytes:
    """A file that says what it is told to say; whole and valid by default."""
    keys = (architecture, *keys) if architecture else keys
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    head = magic + u32(version) + u64(*counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


VALID = build(
    (
        key("llama.block_count", U32, u32(1)),
        key("tokenizer.ggml.tokens", ARRAY, array(STRING, 4, b"".join(map(string, ("a", "", "bc", "ü"))))),
        key("tokenizer.ggml.scores", ARRAY, array(F32, 3, struct.pack("<3f", 1, 2, 3))),
        key("tokenizer.ggml.add_bos_token", BOOL, b"\1"),
        key("deep", ARRAY, array(ARRAY, 1, array(U8, 2, b"\1\2"))),
    ),
    (tensor("a", (2, 4)), tensor("b", (1, 32), 8, 32), tensor("c", (256,), 12, 96)),
    bytes(range(240)),
)


def refusal(path: Path) -> Pi2rtError:
    """The error that opening the file gives; it must not have taken much memory to find out."""
    tracemalloc.start()
    try:
        with pytest.raises(Pi2rtError) as caught:
            open_model_file(path).close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20
    return caught.value


def test_the_valid_one_opens(tmp_path: Path) -> None:
    path = tmp_path / "valid.gguf"
    path.write_bytes(VALID)
    with GgufFile(path) as file:
        assert {n: t.shape for n, t in file.tensors.items()} == {"a": (2, 4), "b": (1, 32), "c": (256,)}
        assert file.read("a").tolist() == list(range(32))
        assert file.read("c").tolist() == list(range(96, 240))
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "", "bc", "ü"]


DEEP = array(U8, 0)
for _ in range(10_000):
    DEEP = array(ARRAY, 1, DEEP)

# name: (bytes, what the message must say)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic: needs 4 bytes at byte 0, but the file ends at 0"),
    "not gguf": (b"PK\3\4" + bytes(100), r"magic: is b'PK\x03\x04', not b'GGUF': this is not a GGUF file"),
    "only magic": (b"GGUF", "version: needs 4 bytes at byte 4, but the file ends at 4"),
    "no counts": (b"GGUF" + u32(3), "tensor count: needs 8 bytes at byte 8, but the file ends at 8"),
    "tensor count lies": (
        build(tensor_count=1000),
        "tensor count: is 1000, at least 33000 bytes, but 72 bytes",
    ),
    "tensor count huge": (
        build(tensor_count=HUGE),
        f"tensor count: is {HUGE}; at most {MAX_TENSORS} are allowed",
    ),
    "key count lies": (
        build(key_count=1000),
        "metadata key count: is 1000, at least 14000 bytes, but 72 bytes",
    ),
    "key count huge": (
        build(key_count=HUGE),
        f"metadata key count: is {HUGE}; at most {MAX_KEYS} are allowed",
    ),
    "key count one too many": (build(key_count=2), "metadata key 1 of 2: is empty"),
    "no architecture": (build(architecture=b""), "metadata general.architecture: is missing"),
    "architecture a number": (
        build(architecture=key("general.architecture", U32, u32(1))),
        "metadata general.architecture: is int, not a string with text in it",
    ),
    "architecture empty": (
        build(architecture=key("general.architecture", STRING, string(""))),
        "metadata general.architecture: is str, not a string with text in it",
    ),
    "key twice": (build((key("k", U8, b"\1"), key("k", U8, b"\2"))), "metadata k: is there twice"),
    "key too long": (
        build((key("k" * 65536, U8, b"\1"),)),
        "metadata key 1 of 2: is 65536 bytes long; at most 65535 are allowed",
    ),
    "key longer than the file": (
        build((u64(HUGE) + b"k",)),
        f"metadata key 1 of 2: needs {HUGE} bytes at byte 77, but the file ends at 96",
    ),
    "key with control characters": (
        build((key("\x1b[2J\n", 99, b""),)),
        r"metadata \x1b[2J\n: has value type 99; types are 0 to 12",
    ),
    "value type unknown": (build((key("k", 13, b""),)), "metadata k: has value type 13; types are 0 to 12"),
    "value missing": (
        build((key("k", U64, b""),))[:85],
        "metadata k: needs 8 bytes at byte 82, but the file ends",
    ),
    "string longer than the file": (
        build((key("k", STRING, u64(2**40)),)),
        f"metadata k: needs {2**40} bytes at byte 90, but the file ends at 96",
    ),
    "array type unknown": (build((key("k", ARRAY, array(13, 0)),)), "metadata k: has elements of type 13"),
    "array of numbers lies": (
        build((key("k", ARRAY, array(F32, 2**40)),)),
        f"metadata k: claims {2**40} elements of 4 bytes or more, but 2 bytes are left",
    ),
    "array count overflows": (
        build((key("k", ARRAY, array(U64, 2**61 + 1)),)),
        f"metadata k: claims {2**61 + 1} elements of 8 bytes or more",
    ),
    "array of strings lies": (
        build((key("k", ARRAY, array(STRING, HUGE)),)),
        f"metadata k: claims {HUGE} elements of 8 bytes or more",
    ),
    "array of strings too long": (
        build((key("k", ARRAY, array(STRING, 10, string("a" * 60) * 2)),)),
        "metadata k[5]: needs 8 bytes",
    ),
    "string in array longer than the file": (
        build((key("k", ARRAY, array(STRING, 2, string("ab") + u64(1 << 50) + bytes(30))),)),
        f"metadata k[1]: needs {1 << 50} bytes",
    ),
    "nested too deep": (
        build((key("k", ARRAY, DEEP),)),
        "metadata k: nests arrays deeper than the 4 levels allowed",
    ),
    "nested array lies": (
        build((key("k", ARRAY, array(ARRAY, 1 << 30)),)),
        f"metadata k: claims {1 << 30} elements of 12 bytes or more",
    ),
    "alignment not a power of two": (
        build((key("general.alignment", U32, u32(24)),)),
        "metadata general.alignment: is 24, not a power of two",
    ),
    "alignment zero": (
        build((key("general.alignment", U32, u32(0)),)),
        "general.alignment: is 0, not a power of two",
    ),
    "alignment a bool": (
        build((key("general.alignment", BOOL, b"\1"),)),
        "general.alignment: is True, not a power",
    ),
    "alignment a string": (
        build((key("general.alignment", STRING, string("32")),)),
        "metadata general.alignment: is a str, not a power of two",
    ),
    "alignment past the end": (
        build((key("general.alignment", U32, u32(1 << 31)),), (tensor("t", (1,)),), bytes(4)),
        f"tensor data: begins at byte {1 << 31}, but the file ends at byte",
    ),
    "tensor twice": (
        build((), (tensor("t", (8,)), tensor("t", (8,), 0, 32)), bytes(64)),
        "tensor t: is there twice",
    ),
    "experts of an unknown type without end": (
        build(
            (),
            tuple(tensor(f"blk.{i}.ffn_up_exps.weight", (4096, 1 << 40, 1 << 40), 1234) for i in range(65)),
        ),
        "tensor blk.0.ffn_up_exps.weight: the experts of the model have 266240 matrices; at most 262144 are allowed",
    ),
    "tensor name too long": (
        build((), (tensor("t" * 256, (8,)),), bytes(32)),
        "name of tensor 0 of 1: is 256 bytes long; at most 255 are allowed",
    ),
    "tensor without a name": (build((), (tensor("", (8,)),), bytes(32)), "name of tensor 0 of 1: is empty"),
    "tensor without dimensions": (
        build((), (tensor("t", ()),), bytes(32)),
        "tensor t: number of dimensions: is 0; 1 to 4 are allowed",
    ),
    "tensor with five dimensions": (
        build((), (tensor("t", (1, 1, 1, 1, 8)),), bytes(32)),
        "tensor t: number of dimensions: is 5; 1 to 4 are allowed",
    ),
    "tensor with many dimensions": (
        build((), (string("t") + u32(2**32 - 1) + bytes(40),)),
        f"tensor t: number of dimensions: is {2**32 - 1}; 1 to 4 are allowed",
    ),
    "dimension zero": (
        build((), (tensor("t", (4, 0)),), bytes(32)),
        "tensor t: dimensions: [4, 0] have a zero",
    ),
    "dimensions overflow": (
        build((), (tensor("t", (2**32, 2**32)),), bytes(32)),
        f"tensor t: dimensions: [{2**32}, {2**32}] are more than a file of",
    ),
    "dimensions overflow to something small": (
        build((), (tensor("t", (2**63, 2, 2**2, 2**62)),), bytes(32)),
        "tensor t: dimensions: ",
    ),
    "row not whole blocks": (
        build((), (tensor("t", (32, 31), 8),), bytes(2048)),
        "tensor t: dimensions: [32, 31] have rows of 31, not whole blocks of 32 (Q8_0)",
    ),
    "offset not aligned": (
        build((), (tensor("t", (8,), 0, 16),), bytes(64)),
        "tensor t: offset: 16 is not a multiple of the alignment 32",
    ),
    "offset past the end": (
        build((), (tensor("t", (8,), 0, 1 << 40),), bytes(64)),
        f"tensor t: offset: {1 << 40} and 32 bytes from there reach byte",
    ),
    "offset overflows": (
        build((), (tensor("t", (8,), 0, 2**64 - 32),), bytes(64)),
        f"tensor t: offset: {2**64 - 32} and 32 bytes from there reach byte",
    ),
    "data cut by a byte": (
        build((), (tensor("t", (8,)),), bytes(31)),
        "tensor t: offset: 0 and 32 bytes from there reach byte 160, but the file ends at byte 159",
    ),
    "no data": (build((), (tensor("t", (1,)),)), "tensor t: offset: 0 and 4 bytes from there reach byte"),
    "tensors overlap": (
        build((), (tensor("t", (16,)), tensor("u", (8,), 0, 32)), bytes(64)),
        "tensor u: offset: byte 192 of the file lies inside tensor t",
    ),
}
UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 0": (build(version=0), "version: is 0; pi2rt reads GGUF versions 2 and 3"),
    "version 1": (build(version=1), "version: is 1; pi2rt reads GGUF versions 2 and 3"),
    "version 4": (build(version=4), "version: is 4; pi2rt reads GGUF versions 2 and 3"),
    "big endian": (
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "version: is written big endian; convert the file to little endian",
    ),
    "magic swapped": (b"FUGG" + bytes(100), "magic: is byte-swapped: big-endian GGUF is not supported"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path: Path, case: str) -> None:
    data, message = MALFORMED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    error = refusal(path)
    assert type(error) is ModelFormatError
    assert f"{path}: " in str(error)
    assert message in str(error)
    assert str(error).isprintable()
    assert error.exit_status == 2


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(tmp_path: Path, case: str) -> None:
    data, message = UNSUPPORTED[case]
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    error = refusal(path)
    assert type(error) is UnsupportedModelError
    assert message in str(error)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for length in range(0, len(VALID), 3):
        path.write_bytes(VALID[:length])
        with pytest.raises(ModelFormatError):
            GgufFile(path)


# Files as long as they say, but sparse: nothing is wrong with a count except that it is absurd.
BOMBS: dict[str, tuple[bytes, str]] = {
    "strings": (
        build((string("tokenizer.ggml.tokens") + u32(ARRAY) + array(STRING, 1 << 26),)),
        f"metadata tokenizer.ggml.tokens: claims {1 << 26} elements, {1 << 26} strings in arrays in all; "
        f"at most {gguf_header.MAX_STRINGS} are allowed",
    ),
    "arrays": (
        build((string("k") + u32(ARRAY) + array(ARRAY, 1 << 25),)),
        f"metadata k: claims {1 << 25} elements, {1 << 25} arrays in arrays in all; at most 65536 are",
    ),
    "numbers": (
        build((string("k") + u32(ARRAY) + array(U64, 1 << 26),)),
        f"a header of at most {gguf_header.MAX_HEADER_BYTES} is allowed",
    ),
    "string": (
        build((string("k") + u32(STRING) + u64(1 << 29),)),
        f"metadata k: is {1 << 29} bytes long; at most {gguf_header.MAX_HEADER_BYTES} are allowed",
    ),
    "string behind a number": (
        build((string("k") + u32(STRING) + u64(gguf_header.MAX_HEADER_BYTES),)),
        f"a header of at most {gguf_header.MAX_HEADER_BYTES} is allowed",
    ),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_are_refused_before_they_are_read(tmp_path: Path, case: str) -> None:
    data, message = BOMBS[case]
    path = tmp_path / "bomb.gguf"
    path.write_bytes(data.rstrip(b"\0"))
    os.truncate(path, 1 << 30)
    error = refusal(path)
    assert type(error) is ModelFormatError
    assert message in str(error)


def test_strings_are_counted_over_all_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", 5)
    three = array(STRING, 3, string("a") * 3)
    path = tmp_path / "many.gguf"
    path.write_bytes(build((key("j", ARRAY, three), key("k", ARRAY, three))))
    message = "metadata k: claims 3 elements, 6 strings in arrays in all; at most 5 are allowed"
    assert message in str(refusal(path))


def test_what_is_not_utf8_is_replaced(tmp_path: Path) -> None:
    """Text that nobody computes with is no reason to refuse a model; names that differ stay different."""
    tokens = string("ab") * 300 + string(b"\xff") + string("ab") * 99
    keys = (
        key("general.description", STRING, string("caf\xe9".encode("latin-1"))),
        key(b"\xff", U8, b"\1"),
        key(b"\xfe", U8, b"\2"),
        key("tokens", ARRAY, array(STRING, 400, tokens)),
    )
    (tmp_path / "a.gguf").write_bytes(
        build(keys, (tensor(b"\x80", (8,)), tensor(b"\x81", (8,), 0, 32)), bytes(64))
    )
    with GgufFile(tmp_path / "a.gguf") as file:
        assert file.metadata["general.description"] == "caf\ufffd"
        assert (file.metadata["\\xff"], file.metadata["\\xfe"]) == (1, 2)
        assert file.metadata["tokens"] == ["ab"] * 300 + ["\ufffd"] + ["ab"] * 99
        assert list(file.tensors) == ["\\x80", "\\x81"]


@pytest.mark.parametrize(
    ("number", "shown"), [(23, "IQ4_XS"), (10, "Q2_K"), (27, "I64"), (1234, "number 1234")]
)
def test_a_type_that_cannot_be_read_is_listed_and_refused_where_it_is_read(
    tmp_path: Path, number: int, shown: str
) -> None:
    tensors = (tensor("odd", (256,), number), tensor("a", (8,), 0, 2048))
    (tmp_path / "a.gguf").write_bytes(build((), tensors, bytes(2080)))
    with GgufFile(tmp_path / "a.gguf") as file:
        assert (file.tensors["odd"].type, file.tensors["odd"].shape) == (shown, (256,))
        assert file.read("a").nbytes == 32
        with pytest.raises(
            UnsupportedModelError, match=rf"a\.gguf: tensor odd: type: is {shown}; pi2rt reads F32, F16"
        ):
            file.read("odd")


def test_vocabulary_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi2rt.formats.gguf_part.MAX_VOCABULARY", 2)
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(build((key("tokenizer.ggml.tokens", ARRAY, array(STRING, 3, string("a") * 3)),)))
    assert "metadata tokenizer.ggml.tokens: has 3 tokens; at most 2 are allowed" in str(refusal(path))


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="absent: no such file or directory"):
        open_model_file(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"absent: cannot be opened: No such file"):
        GgufFile(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match="cannot be opened"):
        GgufFile(Path("nul\0byte"))
    with pytest.raises(ModelFormatError, match="is not a regular file"):
        GgufFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFormatError, match="neither a regular file nor a directory"):
        open_model_file(tmp_path / "pipe")
    with pytest.raises(ModelFormatError, match="is not a regular file"):  # and does not wait for a writer
        GgufFile(tmp_path / "pipe")


def test_refusing_leaves_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(VALID[:-1])
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ModelFormatError):
            GgufFile(path)
    assert sorted(os.listdir("/proc/self/fd")) == before


# Fuzzing: whatever the bytes, the file opens and can be read, or it is refused with one of our errors.

SMALL = (0, 1, 2, 3, 4, 9, 31, 32, 33, 255, 256, 2**16)
NUMBER = st.sampled_from((*SMALL, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, HUGE))
POSITION = st.integers(0, len(VALID) - 1)
MUTATION = st.one_of(
    st.tuples(st.just("byte"), POSITION, st.integers(0, 255)),
    st.tuples(st.just("flip"), POSITION, st.integers(0, 7)),
    st.tuples(st.just("u32"), POSITION, NUMBER),
    st.tuples(st.just("u64"), POSITION, NUMBER),
    st.tuples(st.just("cut"), POSITION, st.just(0)),
    st.tuples(st.just("delete"), POSITION, st.integers(1, 40)),
    st.tuples(st.just("repeat"), POSITION, st.integers(1, 200)),
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=4)


def mutate(mutations: list[tuple[str, int, int]]) -> bytes:
    data = bytearray(VALID)
    for what, at, value in mutations:
        at = min(at, len(data))
        if what == "byte":
            data[at : at + 1] = bytes([value])
        elif what == "flip":
            data[at : at + 1] = bytes(b ^ 1 << value for b in data[at : at + 1])
        elif what in ("u32", "u64"):
            width = 4 if what == "u32" else 8
            data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        elif what == "cut":
            del data[at:]
        elif what == "delete":
            del data[at : at + value]
        else:
            data[at:at] = data[at : at + value]
    return bytes(data)


def check_fuzzed(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused: str | None = None
    tracemalloc.start()
    try:
        with GgufFile(path) as file:
            for name, info in file.tensors.items():
                assert info.offset + info.nbytes <= len(data)
                assert file.read(name).tobytes() == data[info.offset : info.offset + info.nbytes]
    except Pi2rtError as error:
        refused = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
    assert refused is None or re.match(re.escape(f"{path}: ") + r"\S.*: \S", refused)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.gguf"


@given(MUTATIONS)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_fuzz(scratch: Path, mutations: list[tuple[str, int, int]]) -> None:
    check_fuzzed(scratch, mutate(mutations))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))  # in parts, since faulthandler takes two minutes for a hang
@given(mutations=MUTATIONS)
@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzz_for_minutes(scratch: Path, part: int, mutations: list[tuple[str, int, int]]) -> None:
    check_fuzzed(scratch, mutate(mutations))


@pytest.mark.slow
@given(st.binary(max_size=400))
@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_fuzz_of_anything_behind_the_magic(scratch: Path, data: bytes) -> None:
    check_fuzzed(scratch, b"GGUF" + u32(3) + data)
