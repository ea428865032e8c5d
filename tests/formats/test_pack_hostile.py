"""Malformed and malicious packs: each is refused with its own message, and nothing big is allocated first.

The digest of a header stops accidents, not people: these headers all carry the right one.
"""

from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi2rt._errors import ModelFormatError, ModelNotFoundError, Pi2rtError, UnsupportedModelError
from pi2rt.formats.model_file import open_model_file
from pi2rt.formats.pack import PREAMBLE, PackFile, header_digest
from pi2rt.formats.pack_header import MAGIC, MAX_HEADER_BYTES

HUGE = 2**64 - 1


def region(name: str, offset: int, nbytes: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "offset": offset, "nbytes": nbytes, "checksum": bytes(16), **more}


VALID: dict[str, Any] = {
    "source": {
        "name": "model.gguf",
        "container": "gguf",
        "files": [{"name": "model.gguf", "nbytes": 100, "digest": bytes(32)}],
    },
    "architecture": "llama",
    "metadata": {
        "general.architecture": "llama",
        "n": 3,
        "tokens": ["a", "b"],
        "scores": msgspec.msgpack.Ext(6, bytes(8)),
    },
    "tensors": [
        region("m", 0, 9216, type="Q4_0", shape=[256, 64], layout="blocks16"),
        region("v", 12288, 256, type="F32", shape=[64], layout="rows"),
    ],
    "companions": [region("tokenizer.json", 16384, 10)],
}
DATA_BYTES = 20480


def build(
    header: Any = VALID,
    *,
    raw: bytes | None = None,
    data: int = DATA_BYTES,
    magic: bytes = MAGIC,
    version: int = 1,
    flags: int = 0,
    length: int | None = None,
    size: int | None = None,
    digest: bytes | None = None,
) -> bytes:
    """A file that says what it is told to say; whole and valid by default."""
    if raw is None:
        raw = msgspec.msgpack.encode(header)
    begin = -(-(PREAMBLE.size + len(raw)) // 4096) * 4096
    declared = begin + data if size is None else size
    fields = magic, version, flags, len(raw) if length is None else length, declared
    preamble = PREAMBLE.pack(*fields, bytes(32))
    digest = header_digest(preamble, raw) if digest is None else digest
    return (PREAMBLE.pack(*fields, digest) + raw).ljust(begin + data, b"\0")


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    header = copy.deepcopy(VALID)
    change(header)
    return build(header)


def tensor(**fields: Any) -> bytes:
    """The valid pack, with these fields of its matrix."""
    return changed(lambda header: header["tensors"][0].update(fields))


def metadata(value: Any) -> bytes:
    return changed(lambda header: header["metadata"].update(k=value))


def raw_metadata(value: bytes) -> bytes:
    return changed(lambda header: header.update(metadata=msgspec.Raw(value)))


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
    path = tmp_path / "valid.pi2"
    path.write_bytes(build())
    with PackFile(path) as file:
        assert {name: info.shape for name, info in file.tensors.items()} == {"m": (256, 64), "v": (64,)}
        assert file.metadata["tokens"] == ["a", "b"]
        assert file.metadata["scores"].tolist() == [0.0, 0.0]


SIZE = len(build())
MATRIX = [256, 64]
DEEP = b"\x91" * 500_000

# name: (bytes, what the message must say)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "only magic": (MAGIC, "preamble: needs 64 bytes, but the file ends at 8"),
    "no header": (build()[:64], f"file length: is 64 bytes, not {SIZE}: it is truncated"),
    "cut by a page": (build()[:-4096], f"file length: is {SIZE - 4096} bytes, not {SIZE}: it is truncated"),
    "cut by a byte": (build()[:-1], f"file length: is {SIZE - 1} bytes, not {SIZE}: it is truncated"),
    "too long": (build() + b"x", f"file length: is {SIZE + 1} bytes, not {SIZE}: it is longer than it was"),
    "odd length": (
        build(data=DATA_BYTES + 1),
        f"file length: is {SIZE + 1} bytes, not a multiple of 4096",
    ),
    "header past the end": (
        build(length=SIZE - 63),
        f"header length: is {SIZE - 63} bytes, but the file ends at byte {SIZE}",
    ),
    "header huge": (build(length=HUGE), f"header length: is {HUGE} bytes; at most {MAX_HEADER_BYTES}"),
    "digest": (build(digest=bytes(32)), "header: its digest does not match: the file is damaged"),
    "header empty": (build(raw=b""), "header: is malformed: Input data was truncated"),
    "header a number": (build(3), "header: is malformed: Expected `object`, got `int`"),
    "header cut": (build(raw=msgspec.msgpack.encode(VALID)[:-1]), "header: is malformed: Input data was"),
    "header with more behind it": (build(raw=msgspec.msgpack.encode(VALID) + b"\0"), "header: is malformed:"),
    "header deep": (build(raw=DEEP), "header: is malformed: "),
    "header of many": (build(raw=b"\xdf\xff\xff\xff\xff"), "header: is malformed: "),
    "no source": (changed(lambda header: header.pop("source")), "missing required field `source`"),
    "unknown container": (
        changed(lambda header: header["source"].update(container="tar")),
        "header: is malformed: Invalid enum value 'tar' - at `$.source.container`",
    ),
    "no architecture": (changed(lambda header: header.update(architecture="")), "`$.architecture`"),
    "architecture a number": (changed(lambda header: header.update(architecture=1)), "`$.architecture`"),
    "tensors claimed": (
        changed(lambda header: header.update(tensors=msgspec.Raw(b"\xdd\xff\xff\xff\xff"))),
        "header: is malformed: Expected `array` of length <= 131072 - at `$.tensors`",
    ),
    "metadata a number": (raw_metadata(b"\x01"), "metadata: is malformed: Expected `object`, got `int`"),
    "metadata with a null": (
        metadata(None),
        "metadata: is malformed: Expected `bool | int | float | str | ext`",
    ),
    "metadata with bytes": (metadata(b"x"), "metadata: is malformed: Expected "),
    "metadata with a map": (metadata({}), "metadata: is malformed: Expected "),
    "metadata not UTF-8": (raw_metadata(b"\x81\xa1k\xa2\xff\xfe"), "metadata: is malformed: "),
    "metadata key not UTF-8": (raw_metadata(b"\x81\xa1\xff\x01"), "metadata: is malformed: "),
    "array claims": (
        raw_metadata(b"\x81\xa1k\x91\xdd\x00\xff\xff\xff"),
        "header: is malformed: ",  # msgpack is scanned once to find where metadata ends
    ),
    "array too deep": (metadata([[[[[1]]]]]), "metadata: 'k' nests arrays deeper than the 4 levels allowed"),
    "array much too deep": (raw_metadata(b"\x81\xa1k" + DEEP), "header: is malformed: "),
    "numbers of an unknown type": (
        metadata(msgspec.msgpack.Ext(99, b"x")),
        "metadata: 'k' is an array of unknown type 99",
    ),
    "numbers cut": (metadata(msgspec.msgpack.Ext(6, b"12345")), "metadata: 'k' is no array of float32"),
    "truths of another kind": (
        metadata(msgspec.msgpack.Ext(7, b"\0\2")),
        "metadata: 'k' is no array of bool",
    ),
    "tensor twice": (tensor(name="v"), "tensor v: is there twice"),
    "companion twice": (
        changed(lambda header: header["companions"].append(header["companions"][0])),
        "companion tokenizer.json: is there twice",
    ),
    "tensor without a name": (tensor(name=""), "Expected `str` of length >= 1 - at `$.tensors[0].name`"),
    "tensor with a long name": (tensor(name="n" * 256), "Expected `str` of length <= 255"),
    "tensor with control characters": (
        tensor(name="\x1b[2J", offset=1),
        r"tensor \x1b[2J: offset: 1 is not a multiple of 4096",
    ),
    "no dimensions": (tensor(shape=[]), "`$.tensors[0].shape`"),
    "five dimensions": (tensor(shape=[1] * 5), "Expected `array` of length <= 4 - at `$.tensors[0].shape`"),
    "dimension zero": (tensor(shape=[0, 64]), "Expected `int` >= 1 - at `$.tensors[0].shape[0]`"),
    "dimension negative": (tensor(shape=[-1, 64]), "Expected `int` >= 1"),
    "dimension a float": (tensor(shape=[1.5, 64]), "Expected `int`, got `float`"),
    "dimensions overflow": (
        tensor(shape=[2**62, 2**62], type="F32"),
        f"tensor m: nbytes: is 9216, but shape [{2**62}, {2**62}] of F32 takes {2**126}",
    ),
    "not whole blocks": (
        tensor(shape=[256, 63]),
        "tensor m: shape: [256, 63] has rows of 63, not whole blocks of 32 (Q4_0)",
    ),
    "blocks of a vector": (
        tensor(shape=[256 * 64]),
        "tensor m: layout: is blocks16, but shape [16384] is no matrix",
    ),
    "blocks of a cube": (tensor(shape=[2, 128, 64]), "is blocks16, but shape [2, 128, 64] is no matrix"),
    "nbytes of another shape": (
        tensor(shape=[272, 64]),
        "tensor m: nbytes: is 9216, but shape [272, 64] of Q4_0 takes 9792",
    ),
    "nbytes too few": (
        tensor(nbytes=9215),
        f"tensor m: nbytes: is 9215, but shape {MATRIX} of Q4_0 takes 9216",
    ),
    "nbytes zero": (tensor(nbytes=0), "tensor m: nbytes: is 0"),
    "nbytes negative": (tensor(nbytes=-1), "Expected `int` >= 0"),
    "nbytes huge": (tensor(nbytes=HUGE), "Expected `int` <= "),
    "offset not aligned": (tensor(offset=64), "tensor m: offset: 64 is not a multiple of 4096"),
    "offset past the end": (
        tensor(offset=1 << 40),
        f"tensor m: offset: {1 << 40} and 9216 bytes from there reach byte",
    ),
    "offset so that it ends past the end": (
        tensor(offset=12288),
        f"tensor m: offset: 12288 and 9216 bytes from there reach byte {4096 + 12288 + 9216}, but the file ends",
    ),
    "offset huge": (tensor(offset=1 << 62), f"tensor m: offset: {1 << 62} and"),
    "checksum short": (tensor(checksum=bytes(15)), "Expected `bytes` of length >= 16"),
    "checksum missing": (changed(lambda header: header["tensors"][0].pop("checksum")), "`checksum`"),
    "overlap": (
        changed(lambda header: header["tensors"][1].update(offset=8192)),
        "v: offset: byte 12288 of the file lies inside m",
    ),
    "overlap with a companion": (
        changed(lambda header: header["companions"][0].update(offset=4096)),
        "tokenizer.json: offset: byte 8192 of the file lies inside m",
    ),
    "config.json not JSON": (
        changed(
            lambda header: (header["source"].update(container="huggingface"), header.update(metadata="{"))
        ),
        "metadata: is malformed: Expecting property name",
    ),
    "config.json no object": (
        changed(
            lambda header: (header["source"].update(container="huggingface"), header.update(metadata="[]"))
        ),
        "metadata: is a list, not an object",
    ),
    "config.json deep": (
        changed(
            lambda header: (
                header["source"].update(container="huggingface"),
                header.update(metadata="[" * 100_000),
            )
        ),
        "metadata: is malformed: maximum recursion depth",
    ),
    "config.json a map": (
        changed(lambda header: header["source"].update(container="huggingface")),
        "metadata: is malformed: Expected `str`, got `object`",
    ),
}
UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "version 0": (
        build(version=0),
        "version: is 0; this pi2rt reads packs of version 1: convert the model again",
    ),
    "version 2": (
        build(version=2),
        "version: is 2; this pi2rt reads packs of version 1: convert the model again",
    ),
    "flags": (build(flags=4), "flags: are 0x4; this pi2rt knows 0x3 alone"),
    "type": (tensor(type="Q2_K"), "tensor m: type: is Q2_K; pi2rt reads F32, F16, BF16, Q4_0"),
    "layout": (
        tensor(layout="bundles"),
        "tensor m: layout: is bundles; pi2rt reads rows, blocks16 and neurons",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path: Path, case: str) -> None:
    data, message = MALFORMED[case]
    path = tmp_path / "bad.pi2"
    path.write_bytes(data)
    error = refusal(path)
    assert type(error) is ModelFormatError
    assert str(error).startswith(f"{path}: ")
    assert message in str(error)
    assert str(error).isprintable()
    assert error.exit_status == 2


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(tmp_path: Path, case: str) -> None:
    data, message = UNSUPPORTED[case]
    path = tmp_path / "other.pi2"
    path.write_bytes(data)
    error = refusal(path)
    assert type(error) is UnsupportedModelError
    assert message in str(error)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"none\.pi2: cannot be opened: No such file"):
        PackFile(tmp_path / "none.pi2")
    with pytest.raises(ModelFormatError, match="is not a regular file"):
        PackFile(tmp_path)


def test_a_file_that_is_no_pack(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFormatError, match=r"magic: is b'GGUF.*', not b'PI2.*PACK': this is not a pack"):
        PackFile(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.pi2", build()
    for length in (*range(0, 1200, 7), *range(4096, len(whole), 509)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFormatError):
            open_model_file(path)


def test_every_flipped_bit_of_the_head_is_found(tmp_path: Path) -> None:
    path, whole = tmp_path / "flipped.pi2", build()
    head = PREAMBLE.size + len(msgspec.msgpack.encode(VALID))
    for bit in (*range(8 * PREAMBLE.size), *range(8 * PREAMBLE.size, 8 * head, 11)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(ModelFormatError):
            open_model_file(path)


def test_a_header_may_say_more(tmp_path: Path) -> None:
    """What a later writer of the same version adds, this reader passes over."""
    path = tmp_path / "more.pi2"
    path.write_bytes(changed(lambda header: (header.update(new=[1]), header["tensors"][0].update(hot=True))))
    with PackFile(path) as file:
        assert len(file.tensors) == 2


# -- fuzzing

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([0, 1, 16, 64, 4096, 8192, 2**62, HUGE])
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=17),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated_headers(
    draw: st.DrawFn, valid: dict[str, Any] = VALID, key: str | None = None, data: int = DATA_BYTES
) -> bytes:
    """The valid header with a few values, anywhere in it (or under ``key``), replaced by others or taken away."""
    header = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        at: Any = header if key is None else header[key]
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            chosen = draw(st.sampled_from(keys))
            if isinstance(at[chosen], (dict, list)) and at[chosen] and draw(st.integers(0, 3)):
                at = at[chosen]
                continue
            if draw(st.integers(0, 7)):
                at[chosen] = draw(JUNK)
            else:
                del at[chosen]
            break
    return build(header, data=data)


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """The valid header's bytes, some of them changed, with the digest that belongs to them."""
    raw = bytearray(msgspec.msgpack.encode(VALID))
    for _ in range(draw(st.integers(1, 4))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return build(raw=bytes(raw[: draw(st.integers(len(raw) // 2, 2 * len(raw)))]))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.pi2"


@given(st.one_of(mutated_headers(), mutated_bytes()))
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_header_is_refused_or_holds(scratch: Path, data: bytes) -> None:
    """What opens can be read to its last byte."""
    scratch.write_bytes(data)
    try:
        file = PackFile(scratch)
    except ModelFormatError:
        return
    with file:
        for name, info in file.tensors.items():
            assert len(file.read(name)) == info.nbytes
            assert info.offset % 4096 == 0
        for section in file.sections:
            file.read_section(section, 0, memoryview(bytearray(section.nbytes)))
