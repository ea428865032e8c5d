"""The calibration file: what was written is read, and nothing else is."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt._errors import ModelFormatError, ModelNotFoundError, RequestError, UnsupportedModelError
from pi2rt.formats.calibration import (
    DIGEST_BYTES,
    MAGIC,
    PREAMBLE,
    VERSION,
    BlockCalibration,
    Calibration,
    Cost,
    Reading,
    Readings,
    calibration_path,
    open_calibration,
    read_calibration,
    recorded,
    recorded_shares,
    write_calibration,
)
from pi2rt.formats.neuron_order import encode_order
from pi2rt.formats.pack import PackFile
from pi2rt.formats.predictor import Predictor, PredictorRecord
from pi2rt.planner.pack.convert import convert
from tests.support.tiny_models import TinyModel, write_gguf


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    convert(
        write_gguf(folder / "m.gguf", TinyModel(layers=2), weight_type="Q4_0"),
        folder / "m.pi2",
        bundles="all",
    )
    return folder / "m.pi2"


def calibration_of(pack: Path, seed: int = 0) -> Calibration:
    random = np.random.default_rng(seed)

    def shares(count: int) -> np.ndarray:
        return random.random(count).astype(np.float16).astype(np.float32)

    with PackFile(pack) as file:
        blocks = tuple(
            BlockCalibration(
                layer,
                name,
                each.neurons,
                recorded_shares(shares(each.neurons)),
                {
                    "cats": recorded(random.random(1).astype(np.float32), shares(each.neurons)),
                    "chess": recorded(random.random(each.neurons).astype(np.float32), shares(each.neurons)),
                },
            )
            for layer, (name, each) in enumerate(file.bundles.items())
        )
        costs = {"cats": Cost(0.5, 12.5), "chess": Cost(0.49, 11.0)}
        return Calibration(file.source_digest, 0.5, 4096, 510, 10.0, "chess", costs, blocks)


def read(path: Path, pack: Path) -> Calibration:
    with PackFile(pack) as file:
        return read_calibration(path, file)


def test_what_was_written_is_read(tmp_path: Path, pack: Path) -> None:
    written, path = calibration_of(pack), tmp_path / "c"
    write_calibration(path, written)
    found = read(path, pack)
    assert found == written
    assert os.listdir(tmp_path) == ["c"]
    assert found.summary("chess") == "chess: 49% of neurons are inactive, perplexity +10.0% on held-out text"
    assert found.increase("cats") == pytest.approx(0.25)
    for block, (name, values) in zip(found.blocks, found.thresholds().items(), strict=True):
        assert block.down == name
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, block.vector("chess"))
        assert block.vector("cats").shape == values.shape == (block.neurons,)
        assert block.resting("cats") == pytest.approx(1 - block.firing("cats").mean(), abs=1e-6)


def predictor(neurons: int, rank: int = 3, dim: int = 64) -> PredictorRecord:
    random = np.random.default_rng(rank)
    first, second = (random.random(shape).astype("<f2") for shape in ((rank, dim), (neurons, rank)))
    bias = random.random(neurons).astype("<f4")
    return PredictorRecord.of(Predictor(first, second, bias), 0.985, 0.4, 0.25)


def test_predictors(tmp_path: Path, pack: Path) -> None:
    plain = calibration_of(pack)
    with pytest.raises(ValueError, match="there are no predictors"):
        plain.cost("predicted")
    blocks = tuple(msgspec.structs.replace(each, predictor=predictor(each.neurons)) for each in plain.blocks)
    written = msgspec.structs.replace(plain, blocks=blocks, predicted=Cost(0.75, 10.2))
    write_calibration(tmp_path / "c", written)
    found = read(tmp_path / "c", pack)
    assert found == written
    assert found.summary("predicted") == (
        "predicted: 75% of neurons are not read, perplexity +2.0% on held-out text"
    )
    record = found.blocks[0].predictor
    assert record is not None
    first, second, bias = record.predictor.arrays
    assert (first.shape, second.shape, bias.shape) == ((3, 64), (96, 3), (96,))
    assert (first.dtype, second.dtype, bias.dtype) == (np.float16, np.float16, np.float32)
    np.testing.assert_array_equal(first, np.random.default_rng(3).random((3, 64)).astype(np.float16))
    assert record.nbytes == 2 * 3 * (64 + 96) + 4 * 96
    names = [block.down for block in found.blocks]
    stored = found.predictors(tmp_path / "c", names[:1])
    assert list(stored) == names[:1]
    for array, expected in zip(stored[names[0]].arrays, (first, second, bias), strict=True):
        np.testing.assert_array_equal(array, expected)
    with pytest.raises(KeyError, match=re.escape(names[0])):
        plain.predictors(tmp_path / "c", names[:1])


def test_orders(tmp_path: Path, pack: Path) -> None:
    plain = calibration_of(pack)
    assert plain.orders() == {}
    assert plain.reading("own") == Reading(0, 0, 0)
    each = Reading(3.0, 2.0, 1.0)
    order = np.arange(96, dtype=np.uint16)[::-1]
    first = msgspec.structs.replace(
        plain.blocks[0], order=encode_order(order), readings=Readings(each, each, each, each)
    )
    second = msgspec.structs.replace(plain.blocks[1], readings=Readings(each, each, each, each))
    written = msgspec.structs.replace(plain, blocks=(first, second), gap=16384)
    write_calibration(tmp_path / "c", written)
    assert read(tmp_path / "c", pack) == written == open_calibration(tmp_path / "c")
    assert list(written.orders()) == [first.down]
    np.testing.assert_array_equal(written.orders()[first.down], order)
    assert written.reading("ordered_half") == Reading(6, 4, 2)
    for raw, why in (
        (bytes(192), "does not have each of the neurons 0 to 95 once"),
        (encode_order(order)[1:], "has 191 bytes, not 2 for each of 96 neurons"),
        (b"", "has 0 bytes"),
    ):
        broken = msgspec.structs.replace(first, order=raw)
        write_calibration(
            tmp_path / "c", msgspec.structs.replace(written, blocks=(broken, second)), overwrite=True
        )
        with pytest.raises(ModelFormatError, match=why):
            open_calibration(tmp_path / "c")


def test_it_lies_beside_the_pack_and_is_replaced_only_when_asked(tmp_path: Path, pack: Path) -> None:
    assert calibration_path(Path("a/m.pi2")) == Path("a/m.pi2.calibration")
    path = tmp_path / "c"
    write_calibration(path, calibration_of(pack))
    with pytest.raises(RequestError, match=r"c is there already; .*--force"):
        write_calibration(path, calibration_of(pack, 1))
    write_calibration(path, calibration_of(pack, 1), overwrite=True)
    assert read(path, pack) == calibration_of(pack, 1)
    with pytest.raises(RequestError, match="its folder does not exist"):
        write_calibration(tmp_path / "no" / "c", calibration_of(pack))


def test_it_goes_with_any_pack_of_the_model(tmp_path: Path, pack: Path) -> None:
    write_calibration(tmp_path / "c", calibration_of(pack))
    convert(pack.with_name("m.gguf"), tmp_path / "again.pi2", bundles="off")
    assert read(tmp_path / "c", tmp_path / "again.pi2") == calibration_of(pack)


def test_another_model(tmp_path: Path, pack: Path) -> None:
    write_calibration(tmp_path / "c", calibration_of(pack))
    other = TinyModel(layers=2, seed=9)
    convert(write_gguf(tmp_path / "o.gguf", other, weight_type="Q4_0"), tmp_path / "o.pi2", bundles="all")
    with pytest.raises(
        ModelFormatError, match=r"c: source: is another model than that of .*o\.pi2; calibrate"
    ):
        read(tmp_path / "c", tmp_path / "o.pi2")


def sealed(body: bytes, *, magic: bytes = MAGIC, version: int = VERSION, flags: int = 0) -> bytes:
    head = PREAMBLE.pack(magic, version, flags, len(body), bytes(DIGEST_BYTES))[:-DIGEST_BYTES]
    return head + hashlib.blake2b(head + body, digest_size=DIGEST_BYTES).digest() + body


def changed(calibration: Calibration, **block: object) -> bytes:
    """With other fields in the first block."""
    first = msgspec.structs.replace(calibration.blocks[0], **block)
    blocks = (first, *calibration.blocks[1:])
    return sealed(msgspec.msgpack.encode(msgspec.structs.replace(calibration, blocks=blocks)))


def values(count: int, value: float = 0.5) -> bytes:
    return np.full(count, value, "<f4").tobytes()


def test_malformed(tmp_path: Path, pack: Path) -> None:
    good = calibration_of(pack)
    block = good.blocks[0]
    body, count = msgspec.msgpack.encode(good), good.blocks[0].neurons
    chess = block.thresholds["chess"]

    def with_values(raw: bytes) -> bytes:
        both = {"cats": block.thresholds["cats"], "chess": msgspec.structs.replace(chess, values=raw)}
        return changed(good, thresholds=both)

    replaced = msgspec.structs.replace
    cases: list[tuple[bytes, type[ModelFormatError], str]] = [
        (b"", ModelFormatError, "preamble: needs 56 bytes, but the file ends at 0"),
        (sealed(body, magic=b"PI2\0PACK"), ModelFormatError, "this is no calibration"),
        (sealed(body, version=2), UnsupportedModelError, "version: is 2; this pi2rt reads calibrations of version 1"),
        (sealed(body, flags=1), UnsupportedModelError, "flags: are 0x1"),
        (sealed(body)[:-1], ModelFormatError, "it is truncated"),
        (sealed(body) + b"x", ModelFormatError, "it is longer than it was written"),
        (sealed(body)[:-1] + b"\xff", ModelFormatError, "digest: does not match: the file is damaged"),
        (sealed(b"\xc1"), ModelFormatError, "body: is malformed"),
        (sealed(body[:-5]), ModelFormatError, "body: is malformed"),
        (sealed(msgspec.msgpack.encode({"source": b""})), ModelFormatError, "body: is malformed"),
        (sealed(msgspec.msgpack.encode(replaced(good, exact=float("nan")))), ModelFormatError, "body: is malformed"),
        (sealed(msgspec.msgpack.encode(replaced(good, blocks=()))), ModelFormatError, "body: is malformed"),
        (sealed(msgspec.msgpack.encode(replaced(good, costs={"cats": Cost(0.5, 2)}))), ModelFormatError,
         "method: chess has no costs"),
        (sealed(msgspec.msgpack.encode(replaced(good, blocks=good.blocks * 2))), ModelFormatError, "is there twice"),
        (changed(good, down="ghost"), ModelFormatError, "have 0 neurons of blk.0.ffn_down.weight, the pack has 96"),
        (changed(good, frequency=b""), ModelFormatError, "frequency: is not 96 numbers from 0 to 1"),
        (changed(good, frequency=np.full(count, 2, "<f2").tobytes()), ModelFormatError, "is not 96 numbers"),
        (changed(good, thresholds={}), ModelFormatError, "thresholds: are not those of cats, chess"),
        (changed(good, predictor=predictor(95)), ModelFormatError, "is not of 96 neurons, rank 3 and width 64"),
        (changed(good, predictor=replaced(predictor(96), rank=2)), ModelFormatError, "rank 2 and width 64"),
        (changed(good, predictor=replaced(predictor(96), bias=values(96, np.nan))), ModelFormatError,
         "predictor: holds NaN or infinity"),
        (with_values(values(2)), ModelFormatError, "are not 1 or 96 finite numbers"),
        (with_values(values(count, -1)), ModelFormatError, "are not 1 or 96 finite numbers"),
        (with_values(values(count, np.nan)), ModelFormatError, "are not 1 or 96 finite numbers"),
        (with_values(values(count, np.inf)), ModelFormatError, "are not 1 or 96 finite numbers"),
    ]  # fmt: skip
    path = tmp_path / "c"
    for data, kind, message in cases:
        path.write_bytes(data)
        with pytest.raises(ModelFormatError) as caught:
            read(path, pack)
        assert type(caught.value) is kind
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")
    path.unlink()
    with pytest.raises(ModelNotFoundError, match="cannot be opened: No such file"):
        read(path, pack)
    path.mkdir()
    with pytest.raises(ModelFormatError, match="is not a regular file"):
        read(path, pack)


def test_a_length_that_is_claimed_is_not_allocated(tmp_path: Path, pack: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(PREAMBLE.pack(MAGIC, VERSION, 0, 1 << 62, bytes(DIGEST_BYTES)))
    with pytest.raises(ModelFormatError, match=f"length: is {1 << 62} bytes; at most"):
        read(path, pack)
    path.write_bytes(PREAMBLE.pack(MAGIC, VERSION, 0, 1 << 29, bytes(DIGEST_BYTES)))
    with pytest.raises(ModelFormatError, match="it is truncated"):
        read(path, pack)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_goes_unseen(
    pack: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Cut off anywhere, or with any bit turned."""
    whole = sealed(msgspec.msgpack.encode(calibration_of(pack)))
    broken = bytearray(whole)
    if data.draw(st.booleans()):
        del broken[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        broken[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = pack.with_name("damaged")
    path.write_bytes(broken)
    with pytest.raises(ModelFormatError):
        read(path, pack)


@settings(max_examples=100, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary(max_size=40)
    | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["source", "wanted", "tokens", "scored", "exact", "method", "costs", "blocks", "layer", "down",
                         "neurons", "frequency", "thresholds", "cats", "chess", "values"]), inner, max_size=8),
    max_leaves=12,
))  # fmt: skip
def test_any_body_is_refused_in_words(pack: Path, body: object) -> None:
    path = pack.with_name("odd")
    path.write_bytes(sealed(msgspec.msgpack.encode(body)))
    with pytest.raises(ModelFormatError, match="body: is malformed"):
        read(path, pack)
