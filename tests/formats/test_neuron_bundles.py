"""Bundles in a pack: what comes back, and what a header may not say of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats import neuron_order, open_model_file
from pi2rt.formats.neuron_bundles import Matrix, NeuronBundles, arrange, step_neurons
from pi2rt.formats.pack import PackFile
from pi2rt.formats.pack_writer import Planned
from tests.formats.test_pack import write_pack
from tests.formats.test_pack_hostile import VALID, build, mutated_headers, refusal, region
from tests.support.tiny_models import TinyModel, write_gguf

# 64 neurons: up (64, 96) of Q4_1 is 64 * 2 * 16 * 2 bytes of scales, down (50, 64) of Q8_0 2 * 128 * 2; a neuron is
# 256 + 64 bytes, and 12 of them are a page.
BUNDLES: dict[str, Any] = copy.deepcopy(VALID) | {
    "tensors": [
        *VALID["tensors"],
        region("up", 20480, 4096, type="Q4_1", shape=[64, 96], layout="neurons"),
        region("down", 24576, 512, type="Q8_0", shape=[50, 64], layout="neurons"),
        region("other", 28672, 512, type="Q4_0", shape=[50, 64], layout="neurons"),
    ],
    "bundles": [
        region(
            "both",
            32768,
            6 * 4096,
            up="up",
            down="down",
            neurons=64,
            page_bytes=4096,
            neurons_per_page=12,
            neuron_bytes=320,
        ),
        region(
            "alone",
            57344,
            4096,
            up=None,
            down="other",
            neurons=64,
            page_bytes=4096,
            neurons_per_page=64,
            neuron_bytes=64,
        ),
    ],
}
DATA_BYTES = 61440
BACKWARDS = np.arange(64)[::-1].astype("<u2")


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    header = copy.deepcopy(BUNDLES)
    change(header)
    return build(header, data=DATA_BYTES)


def bundles(**fields: Any) -> bytes:
    """The valid pack, with these fields of its first bundles."""
    return changed(lambda header: header["bundles"][0].update(fields))


def tensor(index: int, **fields: Any) -> bytes:
    return changed(lambda header: header["tensors"][index].update(fields))


def test_the_valid_one_opens(tmp_path: Path) -> None:
    path = tmp_path / "valid.pi2"
    path.write_bytes(build(BUNDLES, data=DATA_BYTES))
    with PackFile(path) as file:
        data = file.sections[0].offset
        both = NeuronBundles("both", "up", "down", data + 32768, 24576, 64, 4096, 12, 320, 256)
        alone = NeuronBundles("alone", None, "other", data + 57344, 4096, 64, 4096, 64, 64, 0)
        assert dict(file.bundles) == {"down": both, "other": alone}
        assert both.layout == (12, 4096, 320, 256)
        assert [each.name for each in file.sections][-2:] == ["both", "alone"]
        up = file.tensors["up"]
        assert (up.layout, up.shape, up.offset, up.nbytes) == ("neurons", (64, 96), data + 20480, 4096)


def ordered(order: object, flags: int = 2) -> bytes:
    """The valid pack, whose first bundles have this order."""
    header = copy.deepcopy(BUNDLES)
    header["bundles"][0]["order"] = order
    return build(header, data=DATA_BYTES, flags=flags)


def test_an_order(tmp_path: Path) -> None:
    path = tmp_path / "ordered.pi2"
    path.write_bytes(ordered(BACKWARDS.tobytes()))
    with PackFile(path) as file:
        order = file.bundles["down"].order
        assert order is not None
        np.testing.assert_array_equal(neuron_order.decode_order(order, 64), BACKWARDS)
        assert file.bundles["other"].order is None


@st.composite
def orders(draw: st.DrawFn) -> neuron_order.Order:
    neurons = draw(st.integers(1, 50)) * 32
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    sizes = [min(512, neurons - at) for at in range(0, neurons, 512)]
    return np.concatenate([random.permutation(size) for size in sizes]).astype(np.uint16)


@given(orders(), st.integers(1, 12), st.integers(64, 330), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_there_and_back(order: neuron_order.Order, per_page: int, size: int, data: st.DataObject) -> None:
    neurons = len(order)
    raw = neuron_order.encode_order(order)
    np.testing.assert_array_equal(neuron_order.decode_order(raw, neurons), order)
    np.testing.assert_array_equal(np.sort(neuron_order.neurons_at(order)), np.arange(neurons))
    layout = (per_page, 4096, size, 0)
    pages = np.zeros(-(-neurons // per_page) * 4096, np.uint8)
    for neuron in range(neurons):
        at = neuron // per_page * 4096 + neuron % per_page * size
        pages[at : at + size] = np.resize(np.array([neuron], "<u4").view(np.uint8), size)
    moved = pages.copy()
    neuron_order.put_in_order(moved, layout, order)
    place = data.draw(st.integers(0, neurons - 1))
    at = place // per_page * 4096 + place % per_page * size
    assert moved[at : at + 4].view("<u4")[0] == place // 512 * 512 + order[place]
    neuron_order.take_back(moved, layout, order)
    np.testing.assert_array_equal(moved, pages)
    damaged = order.copy()
    damaged[place] = data.draw(st.integers(0, 65535).filter(lambda value: value != order[place]))
    with pytest.raises(ValueError, match=f"neurons {place // 512 * 512} to .* once in their cluster"):
        neuron_order.decode_order(neuron_order.encode_order(damaged), neurons)


def test_other_files_have_none(tmp_path: Path) -> None:
    with open_model_file(write_gguf(tmp_path / "m.gguf", TinyModel())) as file:
        assert not file.bundles
        some = NeuronBundles("both", "up", "down", 0, 4096, 32, 4096, 12, 320, 256)
        with pytest.raises(ValueError, match=r"m\.gguf has no bundles 'both'"):
            file.read_bundles_into(some, 0, memoryview(bytearray(1)))


def test_pages_come_back(tmp_path: Path) -> None:
    up, down = Matrix("up", "Q4_0", (96, 64)), Matrix("down", "Q4_0", (64, 96))
    plan = (
        Planned("m", "Q4_0", (96, 64), "blocks16"),
        Planned("up", "Q4_0", up.shape, "neurons", 96 * 32),
        Planned("down", "Q4_0", down.shape, "neurons", 3 * 256),
        Planned("b", bundles=arrange("b", up, down)),
        Planned("tokenizer.json", size=100),
    )
    path = tmp_path / "model.pi2"
    data = write_pack(path, plan)
    with PackFile(path) as file:
        assert list(file.tensors) == ["m", "up", "down"]
        for name in ("up", "down"):
            np.testing.assert_array_equal(file.read(name), data[name])
        (found,) = file.bundles.values()
        assert found == replace(arrange("b", up, down), offset=found.offset)
        assert found.offset % 4096 == 0
        pages = np.empty(5000, np.uint8)
        file.read_bundles_into(found, 4000, pages.data)
        np.testing.assert_array_equal(pages, data["b"][4000:9000])
        for wrong, start in ((found, found.nbytes - 4999), (found, -1), (replace(found, offset=0), 0)):
            with pytest.raises(ValueError, match="are not inside bundles 'b'"):
                file.read_bundles_into(wrong, start, pages.data)
        file.forget(found, 0, found.nbytes)


@pytest.mark.parametrize(
    ("up_type", "columns", "down_type", "rows", "neuron_bytes", "per_page", "page_bytes"),
    [
        ("Q4_0", 576, "Q4_1", 576, 512 + 320, 4, 4096),
        ("Q4_0", 4096, "Q4_0", 4096, 2048 + 2048, 1, 4096),
        ("Q4_0", 4096, "Q8_0", 4096, 2048 + 4096, 1, 8192),
        ("Q8_0", 32, "Q8_0", 1, 512 + 64, 7, 4096),
        (None, 0, "Q4_0", 1, 64, 64, 4096),
        (None, 0, "Q8_0", 4097, 4160, 1, 8192),
    ],
)
def test_pages_hold_what_they_can(
    up_type: str | None,
    columns: int,
    down_type: str,
    rows: int,
    neuron_bytes: int,
    per_page: int,
    page_bytes: int,
) -> None:
    up = None if up_type is None else Matrix("up", up_type, (96, columns))
    found = arrange("b", up, Matrix("down", down_type, (rows, 96)))
    assert (found.neuron_bytes, found.neurons_per_page, found.page_bytes) == (
        neuron_bytes,
        per_page,
        page_bytes,
    )
    assert found.nbytes == -(-96 // per_page) * page_bytes
    step = step_neurons(found)
    assert step % 32 == step % per_page == 0


def test_gates_make_bundles_larger() -> None:
    up, down = Matrix("up", "Q4_0", (96, 4096)), Matrix("down", "Q4_0", (4096, 96))
    found = arrange("b", up, down, gate=replace(up, name="gate", type="Q8_0"))
    assert (found.gate, found.gate_bytes, found.up_bytes) == ("gate", 4096, 2048)
    assert (found.neuron_bytes, found.neurons_per_page, found.page_bytes) == (8192, 1, 8192)
    assert found.layout == (1, 8192, 8192, 6144)


MALFORMED: dict[str, tuple[bytes, str]] = {
    "bundles a map": (changed(lambda header: header.update(bundles={})), "Expected `array`, got `object`"),
    "bundles claimed": (changed(lambda header: header.update(bundles=[{}])), "missing required field"),
    "twice": (
        changed(lambda header: header["bundles"].append(header["bundles"][0])),
        "bundles both: is there twice",
    ),
    "no name": (bundles(name=""), "Expected `str` of length >= 1 - at `$.bundles[0].name`"),
    "down missing": (bundles(down=None), " - at `$.bundles[0].down`"),
    "down unknown": (bundles(down="none"), "bundles both: down: none is no matrix of layout neurons"),
    "down in blocks": (bundles(down="m"), "bundles both: down: m is no matrix of layout neurons"),
    "up a vector": (bundles(up="v"), "bundles both: up: v is no matrix of layout neurons"),
    "up unknown": (bundles(up="\x1b[2J"), r"bundles both: up: \x1b[2J is no matrix of layout neurons"),
    "down of others": (bundles(down="other"), "bundles alone: down: other is in bundles already"),
    "up is down": (bundles(up="down"), "bundles both: down: down is in bundles already"),
    "up as down of others": (
        changed(lambda header: header["bundles"][1].update(down="up")),
        "bundles alone: down: up is in bundles already",
    ),
    "gate unknown": (bundles(gate="none"), "bundles both: gate: none is no matrix of layout neurons"),
    "gate is up": (bundles(gate="up"), "bundles both: up: up is in bundles already"),
    "gate of others": (bundles(gate="other"), "which is no gate of up"),
    "gate without up": (bundles(gate="up", up=None), "which is no gate of no up"),
    "nobody's": (
        bundles(up=None, neuron_bytes=64, neurons_per_page=64, nbytes=4096),
        "tensor up: layout: is neurons, but no bundles name it",
    ),
    "a cube": (tensor(3, shape=[50, 2, 32]), "bundles both: down: down is no matrix of layout neurons"),
    "no matrix": (tensor(3, shape=[3200]), "bundles both: down: down is no matrix of layout neurons"),
    "no groups": (tensor(3, shape=[50, 72]), "bundles both: 72 neurons are not a multiple of 32"),
    "other neurons": (tensor(2, shape=[96, 96]), "bundles both: up has 96 neurons, down 64"),
    "not whole blocks": (
        tensor(2, shape=[64, 100]),
        "tensor up: shape: [64, 100] has rows of 100, not whole blocks",
    ),
    "neurons": (bundles(neurons=32), "bundles both: neurons: is 32, but its tensors make it 64"),
    "neurons negative": (bundles(neurons=-1), "Expected `int` >= 0 - at `$.bundles[0].neurons`"),
    "page_bytes": (bundles(page_bytes=0), "bundles both: page_bytes: is 0, but its tensors make it 4096"),
    "neurons_per_page": (bundles(neurons_per_page=0), "neurons_per_page: is 0, but its tensors make it 12"),
    "neuron_bytes": (bundles(neuron_bytes=319), "neuron_bytes: is 319, but its tensors make it 320"),
    "order short": (
        ordered(BACKWARDS[1:].tobytes()),
        "bundles both: order: has 126 bytes, not 2 for each of 64 neurons",
    ),
    "order long": (ordered(bytes(4096)), "bundles both: order: has 4096 bytes, not 2 for each of 64"),
    "order of zeros": (
        ordered(bytes(128)),
        "bundles both: order: does not have each of the neurons 0 to 63 once in their cluster",
    ),
    "order beyond": (ordered((BACKWARDS + 1).tobytes()), "does not have each of the neurons 0 to 63 once"),
    "order no bytes": (ordered("x" * 128), "Expected `bytes"),
    "order without flag": (ordered(BACKWARDS.tobytes(), 0), "order: is there, but flag 0x2 is not"),
    "order with the other flag": (ordered(BACKWARDS.tobytes(), 1), "order: is there, but flag 0x2 is not"),
    "nbytes": (bundles(nbytes=20480), "bundles both: nbytes: is 20480, but its tensors make it 24576"),
    "nbytes huge": (bundles(nbytes=1 << 62), "bundles both: offset: 32768 and"),
    "offset not aligned": (bundles(offset=64), "bundles both: offset: 64 is not a multiple of 4096"),
    "offset past the end": (
        bundles(offset=40960),
        "bundles both: offset: 40960 and 24576 bytes from there reach",
    ),
    "over a tensor": (bundles(offset=16384), "offset: byte"),
    "over other bundles": (bundles(offset=36864), "alone: offset: byte"),
    "scales of up": (
        tensor(2, nbytes=4095),
        "tensor up: nbytes: is 4095, but shape [64, 96] of Q4_1 takes 4096",
    ),
    "scales of down": (
        tensor(3, nbytes=3600),
        "tensor down: nbytes: is 3600, but shape [50, 64] of Q8_0 takes 512",
    ),
    "rows huge": (
        tensor(3, shape=[1 << 62, 64]),
        "bundles both: neuron_bytes: is 320, but its tensors make it",
    ),
    "neurons huge": (
        changed(
            lambda header: [
                header["tensors"][i].update(shape=shape)
                for i, shape in ((2, [1 << 62, 96]), (3, [50, 1 << 62]))
            ]
        ),
        "bundles both: neurons: is 64, but its tensors make it 4611686018427387904",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path: Path, case: str) -> None:
    data, message = MALFORMED[case]
    path = tmp_path / "bad.pi2"
    path.write_bytes(data)
    error = refusal(path)
    assert type(error) is ModelFormatError
    assert message in str(error)
    assert str(error).isprintable()


def test_a_type_without_bundles(tmp_path: Path) -> None:
    path = tmp_path / "other.pi2"
    path.write_bytes(tensor(2, type="Q5_0"))
    error = refusal(path)
    assert type(error) is UnsupportedModelError
    assert "bundles both: up: up is Q5_0; bundles have Q4_0, Q4_1, Q8_0" in str(error)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "fuzz.pi2"


@given(st.sampled_from(["bundles", "tensors"]).flatmap(lambda key: mutated_headers(BUNDLES, key, DATA_BYTES)))
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_header_is_refused_or_holds(scratch: Path, data: bytes) -> None:
    """What opens can be read to its last byte, and each of its neurons lies in a page."""
    scratch.write_bytes(data)
    try:
        file = PackFile(scratch)
    except ModelFormatError:
        return
    with file:
        for name, info in file.tensors.items():
            assert len(file.read(name)) == info.nbytes
        for down, each in file.bundles.items():
            file.read_bundles_into(each, 0, memoryview(bytearray(each.nbytes)))
            assert file.tensors[down].layout == "neurons"
            assert each.neurons <= each.nbytes // each.page_bytes * each.neurons_per_page
            assert each.neurons_per_page * each.neuron_bytes <= each.page_bytes
