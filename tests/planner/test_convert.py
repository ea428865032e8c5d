"""From model to pack: the same bytes in memory, little memory on the way, and nothing left of what failed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pi2rt._errors import ConversionError, ModelFormatError, RequestError, UnsupportedModelError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.cpu.weights import WeightLayout, Weights
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import open_model_file
from pi2rt.formats.pack import PackFile
from pi2rt.formats.quants import TYPES
from pi2rt.formats.regular_file import drop_cache
from pi2rt.models import describe
from pi2rt.planner.pack import convert as module
from pi2rt.planner.pack.convert import Broken, convert, verify
from pi2rt.tokenizer import load_tokenizer
from tests.support.families import FAMILIES
from tests.support.running import all_logits, opened
from tests.support.sparse_model import poke, sparse_model
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf, write_huggingface

TOKENS = np.random.RandomState(3).randint(0, VOCAB_SIZE - 2, 20).astype(np.int32)
WIDE = TinyModel("qwen3", seed=21, dim=256, hidden=512, layers=2, heads=4, kv_heads=2, head_dim=32)
NINE_TYPES = {
    "token_embd": "F16", "output": "BF16", "attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K",
    "attn_output": "Q4_1", "ffn_gate": "Q5_0", "ffn_up": "Q5_1", "ffn_down": "Q8_0",
}  # fmt: skip
THE_OTHERS = {"attn_q": "Q4_0", "ffn_down": "Q4_0"}


@pytest.fixture(scope="module")
def many_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("types") / "model.gguf", WIDE, types=NINE_TYPES)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return tmp_path / "model.pi2"


async def in_memory(path: Path, exact_floats: bool = False) -> dict[str, bytes]:
    """What the native executor has in memory of every tensor."""
    with open_model_file(path) as file:
        weights = Weights(file, WeightLayout(file, describe(file), exact_floats=exact_floats))
        reports: list[tuple[int, int]] = []
        await weights.load(lambda done, total: reports.append((done, total)), 2)
        assert reports[-1][0] == reports[-1][1]
        found = {name: vector.tobytes() for name, vector in weights.vectors.items()}
        ends = sorted(matrix.address for matrix in weights.matrices.values())
        ends.append(ends[0] + weights.nbytes)
        for name, matrix in weights.matrices.items():
            end = ends[ends.index(matrix.address) + 1]
            found[name] = ctypes.string_at(matrix.address, end - matrix.address)
        weights.close()
        return found


def test_no_type_is_left_out() -> None:
    assert {*NINE_TYPES.values(), *THE_OTHERS.values(), "F32"} == set(TYPES)


@pytest.mark.parametrize("types", [NINE_TYPES, THE_OTHERS], ids=["nine types", "the others"])
@pytest.mark.parametrize("exact_floats", [False, True])
async def test_the_same_bytes_in_memory(
    tmp_path: Path, pack: Path, types: dict[str, str], exact_floats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 5000)  # several pieces of each, the last of them short
    source = write_gguf(tmp_path / "model.gguf", WIDE, types=types)
    convert(source, pack)
    with open_model_file(pack) as file:
        matrices = {info.type for info in file.tensors.values() if info.layout == "blocks16"}
    assert matrices == set(types.values()) | ({"F32"} if types is THE_OTHERS else set())
    found, expected = await in_memory(pack, exact_floats), await in_memory(source, exact_floats)
    assert found.keys() == expected.keys()
    for name in expected:
        if exact_floats:  # == and not bits: ggml's order of sums gives -0 where unpacking gives 0
            values = [np.frombuffer(each[name], "<f4") for each in (found, expected)]
            np.testing.assert_array_equal(values[0], values[1])
        else:
            assert found[name] == expected[name]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
async def test_the_same_bytes_of_a_directory(tmp_path: Path, pack: Path, dtype: str) -> None:
    source = write_huggingface(tmp_path / "source", TinyModel("qwen2", seed=4), dtype=dtype)
    convert(source, pack)
    assert await in_memory(pack) == await in_memory(source)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pack_describes_the_same_model(name: str, tmp_path: Path, pack: Path) -> None:
    family = FAMILIES[name]
    source = write_huggingface(tmp_path / "model", family.model)
    convert(source, pack)
    with open_model_file(source) as file, open_model_file(pack) as packed:
        assert packed.metadata == file.metadata
        for context in (family.context, 32, None):
            assert describe(packed, context) == describe(file, context)


@pytest.mark.parametrize("executor", [CpuExecutor, ReferenceExecutor])
@pytest.mark.parametrize("exact_floats", [False, True])
async def test_executors_compute_the_same(
    many_types: Path, pack: Path, executor: type[CpuExecutor | ReferenceExecutor], exact_floats: bool
) -> None:
    convert(many_types, pack)
    logits = []
    for path in (many_types, pack):
        async with opened(executor(), path, exact_floats=exact_floats) as running:
            logits.append(await all_logits(running, TOKENS))
    np.testing.assert_array_equal(logits[0], logits[1])


async def test_the_reference_refuses_what_is_not_finite(many_types: Path, pack: Path) -> None:
    convert(many_types, pack)
    with open_model_file(pack) as file:
        info = file.tensors["output.weight"]
        assert info.type == "BF16"
    poke(pack, info.offset, b"\xc0\x7f")  # NaN
    with pytest.raises(ModelFormatError, match=r"tensor output\.weight: holds NaN or infinity"):
        async with opened(ReferenceExecutor(), pack):
            pass


def test_tokenizers_are_the_same(tmp_path: Path, many_types: Path) -> None:
    directory = write_huggingface(tmp_path / "source", TinyModel(seed=4))
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}!")
    text = "Hello, the world is on <|bos|> Grüße 世界"
    for index, source in enumerate((many_types, directory)):
        pack = tmp_path / f"{index}.pi2"
        convert(source, pack)
        with open_model_file(source) as file, open_model_file(pack) as packed:
            one, other = load_tokenizer(file), load_tokenizer(packed)
        for parse_special in (False, True):
            assert other.encode(text, parse_special=parse_special) == one.encode(
                text, parse_special=parse_special
            )
        assert (other.vocab_size, other.eos_ids) == (one.vocab_size, one.eos_ids)
    template = other.chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi!"


def test_packs_have_the_files_that_declare_tokens(tmp_path: Path, pack: Path) -> None:
    source = write_huggingface(tmp_path / "source", TinyModel(config={"vocab_size": None}))
    pad = {"pad_token": "<|pad|>", "unk_token": {"content": "<unused0>"}}
    (source / "special_tokens_map.json").write_text(json.dumps(pad))
    (source / "added_tokens.json").write_text(json.dumps({"<|pad|>": 320}))
    (source / "chat_template.jinja").write_text("{{ pad_token }}{{ unk_token }}")
    convert(source, pack)
    for path in (source, pack):
        with open_model_file(path) as file:
            tokenizer = load_tokenizer(file)
        assert tokenizer.encode("<|pad|>", parse_special=True) == [320]
        assert tokenizer.chat_template is not None
        assert tokenizer.chat_template.render([]) == "<|pad|><unused0>"
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (source / name).unlink()
    convert(source, pack, overwrite=True)  # as packs were before, which still open
    with open_model_file(pack) as file:
        assert load_tokenizer(file).vocab_size == 320


def test_a_directory_without_a_tokenizer(tmp_path: Path, pack: Path) -> None:
    source = write_huggingface(tmp_path / "source", TinyModel())
    (source / "tokenizer.json").unlink()
    convert(source, pack)
    with (
        open_model_file(pack) as file,
        pytest.raises(UnsupportedModelError, match=r"model\.pi2: tokenizer\.json: is missing"),
    ):
        load_tokenizer(file)


def test_vectors_that_only_the_description_reads(tmp_path: Path, pack: Path) -> None:
    factors = np.array([1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0], np.float32)
    source = write_gguf(tmp_path / "m.gguf", TinyModel(), extra={"rope_freqs.weight": factors})
    convert(source, pack)
    with open_model_file(source) as file, open_model_file(pack) as packed:
        assert list(packed.tensors)[-1] == "rope_freqs.weight"
        np.testing.assert_array_equal(packed.read("rope_freqs.weight").view(np.float32), factors)
        assert describe(packed) == describe(file)


def test_everything_lies_in_the_order_of_its_use(many_types: Path, pack: Path) -> None:
    convert(many_types, pack)
    with PackFile(pack) as file:
        layer = "attn_norm attn_q_norm attn_k_norm ffn_norm attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down"
        expected = ["token_embd", "output_norm", "output"]
        expected += [f"blk.{i}.{name}" for i in range(2) for name in layer.split()]
        assert list(file.tensors) == [f"{name}.weight" for name in expected]
        for info in file.tensors.values():
            assert info.layout == ("blocks16" if len(info.shape) == 2 else "rows")
        offsets = [info.offset for info in file.tensors.values()]
        assert offsets == sorted(offsets)


def test_a_tied_embedding_is_there_once(tmp_path: Path, pack: Path) -> None:
    model = TinyModel(config={"tie_word_embeddings": True})
    convert(write_huggingface(tmp_path / "source", model), pack)
    with PackFile(pack) as file:
        assert list(file.tensors)[:2] == ["model.embed_tokens.weight", "model.norm.weight"]
        assert "lm_head.weight" not in file.tensors


def test_the_source_is_named(tmp_path: Path, many_types: Path, pack: Path) -> None:
    convert(many_types, pack)
    with PackFile(pack) as file:
        assert (file.source.name, file.source.container) == ("model.gguf", "gguf")
        (only,) = file.source.files
        digest = hashlib.blake2b(many_types.read_bytes(), digest_size=32).digest()
        assert (only.name, only.nbytes, only.digest) == ("model.gguf", many_types.stat().st_size, digest)

    source = write_huggingface(tmp_path / "source", TinyModel())
    convert(source, pack, overwrite=True)
    with PackFile(pack) as file:
        assert (file.source.name, file.source.container) == ("source", "huggingface")
        assert {each.name: each.digest for each in file.source.files} == {
            name: hashlib.blake2b((source / name).read_bytes(), digest_size=32).digest()
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        }


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf"))
    write_gguf(source, TinyModel())
    pack = Path(os.fsdecode(os.fsencode(tmp_path) + b"/p\xff.pi2"))
    convert(source, pack)
    with PackFile(pack) as file:
        assert file.source.name == "m\ufffd.gguf"


def test_two_conversions_give_the_same_file(many_types: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        convert(many_types, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- what fails


def nothing_left(pack: Path) -> bool:
    return not [path.name for path in pack.parent.iterdir() if "pi2" in path.name]


@pytest.mark.parametrize(
    ("role", "bad", "message"),
    [
        (
            "blk.1.ffn_up.weight",
            np.nan,
            r"tensor blk\.1\.ffn_up\.weight: row 40 holds NaN or infinity in a scale",
        ),
        (
            "blk.1.ffn_up.weight",
            np.inf,
            r"tensor blk\.1\.ffn_up\.weight: row 40 holds NaN or infinity in a scale",
        ),
        ("blk.0.attn_norm.weight", np.nan, r"tensor blk\.0\.attn_norm\.weight: holds NaN or infinity"),
    ],
)
def test_what_is_not_finite_is_refused(
    tmp_path: Path, pack: Path, role: str, bad: float, message: str
) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    with open_model_file(source) as file:
        info = file.tensors[role]
    at = info.offset + (40 * info.nbytes // info.shape[0] if len(info.shape) == 2 else 0)
    poke(source, at, np.array([bad], "<f4").tobytes())
    with pytest.raises(ModelFormatError, match=message):
        convert(source, pack)
    assert nothing_left(pack)


class Interruption(BaseException):
    pass


def test_interrupted_anywhere_it_leaves_nothing(many_types: Path, pack: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(many_types, pack, progress=lambda done, total: calls.append((done, total)))
    assert all(0 < done <= total for done, total in calls)
    assert calls[-1][0] == calls[-1][1]
    pack.unlink()
    for stop in (0, 1, len(calls) // 2, len([done for done, _ in calls]) - 2):
        count = iter(range(10_000))

        def progress(done: int, total: int, stop: int = stop, count: Iterator[int] = count) -> None:
            if next(count) == stop:
                raise Interruption

        with pytest.raises(Interruption):
            convert(many_types, pack, progress=progress)
        assert nothing_left(pack)
    convert(many_types, pack)
    assert verify(pack) == ()


def test_killed_it_can_be_run_again(tmp_path: Path, pack: Path) -> None:
    source = sparse_model(tmp_path / "m.gguf", 256 << 20)
    code = "import sys; from pi2rt.planner.pack.convert import convert; convert(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-P", "-c", code, source, pack])
    part = pack.with_name(f".{pack.name}.part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1 << 20):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)  # another process is waited for
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert part.exists()
    assert not pack.exists()
    small = write_gguf(tmp_path / "small.gguf", TinyModel())
    convert(small, pack)
    assert not part.exists()
    assert verify(pack) == ()


def test_a_source_that_changes_meanwhile(many_types: Path, tmp_path: Path, pack: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(many_types.read_bytes())

    def progress(done: int, total: int) -> None:
        os.utime(source, ns=(0, 0))

    with pytest.raises(ConversionError, match=r"m\.gguf changed while it was converted"):
        convert(source, pack, progress=progress)
    assert nothing_left(pack)


def test_a_source_that_shrinks_meanwhile(many_types: Path, tmp_path: Path, pack: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(many_types.read_bytes())
    with pytest.raises(ModelFormatError, match=r"m\.gguf: file: ended at byte"):
        convert(source, pack, progress=lambda done, total: os.truncate(source, 100_000))
    assert nothing_left(pack)


def test_the_disk_fills_up(many_types: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(
        ConversionError, match=r"the disk is full \(No space left on device\): the pack takes"
    ):
        convert(many_types, pack)
    assert nothing_left(pack)


def test_what_is_refused_at_once(many_types: Path, tmp_path: Path, pack: Path) -> None:
    convert(many_types, pack)
    with pytest.raises(RequestError, match=r"model\.pi2 is a pack already"):
        convert(pack, tmp_path / "other.pi2")
    with pytest.raises(RequestError, match="is there already"):
        convert(many_types, pack)
    link = tmp_path / "link.gguf"
    link.symlink_to(many_types)
    with pytest.raises(RequestError, match=r"link\.gguf is the model itself"):
        convert(many_types, link, overwrite=True)
    source = write_huggingface(tmp_path / "source", TinyModel())
    with pytest.raises(RequestError, match=r"config\.json is the model itself"):
        convert(source, source / "config.json", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.gguf", "model.pi2", "source"]


# -- verifying


def test_every_broken_tensor_is_found(tmp_path: Path, pack: Path) -> None:
    convert(write_huggingface(tmp_path / "source", TinyModel()), pack)
    reports: list[tuple[int, int]] = []
    assert verify(pack, progress=lambda done, total: reports.append((done, total))) == ()
    assert reports[-1][0] == reports[-1][1] > 0
    with PackFile(pack) as file:
        sections = file.sections
        raw = pack.read_bytes()
    for section in sections:
        for at in (section.offset, section.offset + section.nbytes - 1):
            poke(pack, at, bytes([raw[at] ^ 0x10]))
            assert verify(pack) == (Broken(section.name, "its checksum does not match"),)
            poke(pack, at, raw[at : at + 1])
    for section in sections[::2]:
        poke(pack, section.offset, bytes([raw[section.offset] ^ 1]))
    assert [each.name for each in verify(pack)] == [section.name for section in sections[::2]]


def test_what_cannot_be_read_is_broken(many_types: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(many_types, pack)
    with PackFile(pack) as file:
        bad = file.tensors["blk.0.ffn_up.weight"]
    real = os.preadv

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == bad.offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    assert verify(pack) == (Broken("blk.0.ffn_up.weight", "cannot be read: Input/output error"),)


# -- size


MEASURED = """
import sys
from pi2rt.planner.pack.convert import convert
from pi2rt.host.memory import peak_rss_bytes
convert(sys.argv[1], sys.argv[2])  # imports and first uses are no growth
before = peak_rss_bytes()
convert(sys.argv[3], sys.argv[4])
print(peak_rss_bytes() - before)
"""


@pytest.mark.parametrize("nbytes", [128 << 20, pytest.param(2 << 30, marks=pytest.mark.slow)])
def test_it_takes_little_memory(tmp_path: Path, nbytes: int) -> None:
    """However large the model: a buffer for reading, one for row blocks, and one for the digest of the source."""
    small = write_gguf(tmp_path / "small.gguf", TinyModel())
    source = sparse_model(tmp_path / "large.gguf", nbytes)
    assert source.stat().st_size > 0.99 * nbytes
    pack = tmp_path / "large.pi2"
    arguments = [small, tmp_path / "small.pi2", source, pack]
    run = subprocess.run(
        [sys.executable, "-P", "-c", MEASURED, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    assert int(run.stdout) < 32 << 20
    assert pack.stat().st_size > 0.99 * nbytes
    if can_drop(tmp_path):
        for path in (source, pack):
            assert cached(path) < 8 << 20


def can_drop(folder: Path) -> bool:
    """Whether the page cache can be told to forget a file here; a file system in memory cannot."""
    path = folder / "probe"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        drop_cache(file.fileno(), 0, 1 << 20)
    return cached(path) < 1 << 20


def cached(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = np.zeros(pages, np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        content = np.frombuffer(mapped, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        address, size = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(content.nbytes)
        if libc.mincore(address, size, ctypes.c_void_p(found.ctypes.data)) != 0:
            pytest.skip(f"the system does not say what it has cached: {os.strerror(ctypes.get_errno())}")
        del content
    return int((found & 1).sum()) * mmap.PAGESIZE
