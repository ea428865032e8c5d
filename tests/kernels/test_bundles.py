"""Neuron bundles: every value of a file comes back bit for bit, nothing else is written, NaN and infinity are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import neuron_bundles, quants
from pi2rt.formats.neuron_bundles import Matrix, NeuronBundles
from tests.kernels.weights import TYPE_NAMES, Bytes, random_rows

Floats = npt.NDArray[np.float32]

BUNDLED = neuron_bundles.TYPES
LEFT = 0xA5  # what was in memory before
types = st.sampled_from(BUNDLED)
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Made:
    """Random matrices of a file, and the memory that their bundles take, full of ``LEFT``."""

    up: Matrix | None
    down: Matrix
    up_rows: Bytes
    down_rows: Bytes
    bundles: NeuronBundles
    pages: Bytes
    up_scales: Bytes
    down_scales: Bytes


def make(up_type: str | None, down_type: str, neurons: int, columns: int, rows: int, seed: int = 0) -> Made:
    rng = np.random.default_rng(seed)
    up = None if up_type is None else Matrix("up", up_type, (neurons, columns))
    down = Matrix("down", down_type, (rows, neurons))
    bundles = neuron_bundles.arrange("b", up, down)
    scale = 10.0 ** rng.integers(-9, 4)  # to denormal float16 and beyond
    sizes = (
        bundles.nbytes,
        0 if up is None else neuron_bundles.up_scales_bytes(up),
        neuron_bundles.down_scales_bytes(down),
    )
    return Made(
        up,
        down,
        random_rows(rng, up_type or "Q4_0", neurons, columns, scale=scale),
        random_rows(rng, down_type, rows, neurons, scale=scale),
        bundles,
        *(np.full(size, LEFT, np.uint8) for size in sizes),
    )


def pack(made: Made) -> None:
    layout, neurons = made.bundles.layout, made.bundles.neurons
    if made.up is not None:
        source, columns = made.up_rows.reshape(-1), made.up.shape[1]
        assert (
            native.bundle_up(made.up.type, source, neurons, columns, layout, made.pages, made.up_scales)
            is None
        )
    rows, source = made.down.shape[0], made.down_rows.reshape(-1)
    every = (made.down.type, source, rows, neurons, 0, neurons, layout)
    assert native.bundle_down(*every, made.pages, made.down_scales) is None


def same_bits(found: Floats, expected: Floats) -> None:
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@given(
    up_type=st.none() | types,
    down_type=types,
    groups=st.integers(1, 4),
    blocks=st.integers(1, 36),
    rows=st.integers(1, 300),
    seed=seeds,
)
@settings(max_examples=100, deadline=None)
def test_values_come_back_as_the_file_has_them(
    up_type: str | None, down_type: str, groups: int, blocks: int, rows: int, seed: int
) -> None:
    made = make(up_type, down_type, 32 * groups, 32 * blocks, rows, seed)
    pack(made)
    neurons, layout = made.bundles.neurons, made.bundles.layout
    if made.up is not None:
        found = native.unbundle_up(made.up.type, made.pages, made.up_scales, neurons, 32 * blocks, layout)
        same_bits(found, quants.dequantize(made.up.type, made.up_rows, made.up.shape))
    found = native.unbundle_down(down_type, made.pages, made.down_scales, rows, neurons, layout)
    same_bits(found, quants.dequantize(down_type, made.down_rows, made.down.shape))


@pytest.mark.parametrize("up_type", [None, *BUNDLED])
@pytest.mark.parametrize("down_type", BUNDLED)
def test_only_neurons_are_written(up_type: str | None, down_type: str) -> None:
    made = make(up_type, down_type, 96, 544, 200)
    pack(made)
    per_page, page_bytes, neuron_bytes, _ = made.bundles.layout
    pages = made.pages.reshape(-1, page_bytes)
    assert (pages[:, per_page * neuron_bytes :] == LEFT).all()
    behind = pages[:, : per_page * neuron_bytes].reshape(-1, neuron_bytes)[96:]
    assert (behind == LEFT).all()


@pytest.mark.parametrize("type_name", BUNDLED)
def test_padding_is_zeros(type_name: str) -> None:
    """All else being ones: what is zero then is padding, and there is as much of it as there should be."""
    made = make(type_name, type_name, 32, 544, 200)
    ones = np.full_like(made.up_rows, 0x11), np.full_like(made.down_rows, 0x11)  # scales are finite
    layout = made.bundles.layout
    native.bundle_up(type_name, ones[0].reshape(-1), 32, 544, layout, made.pages, made.up_scales)
    native.bundle_down(type_name, ones[1].reshape(-1), 200, 32, 0, 32, layout, made.pages, made.down_scales)
    per_page, page_bytes, neuron_bytes, up_bytes = layout
    neurons = made.pages.reshape(-1, page_bytes)[:, : per_page * neuron_bytes].reshape(-1, neuron_bytes)[:32]
    nibbles = np.stack((neurons & 15, neurons >> 4), axis=2)
    values = 2 if type_name == "Q8_0" else 1  # nibbles
    assert set(np.unique(nibbles)) == {0, 1}
    assert (nibbles[:, :up_bytes].sum(axis=(1, 2)) == 544 * values).all()
    assert (nibbles[:, up_bytes:].sum(axis=(1, 2)) == 200 * values).all()
    numbers = 2 if type_name == "Q4_1" else 1
    for scales, count, of in ((made.up_scales, 544 // 32, 32), (made.down_scales, 200, 1)):
        assert set(np.unique(scales)) == {0, 0x11}
        assert np.count_nonzero(scales) == 2 * numbers * count * of


@given(up_type=types, down_type=types, seed=seeds, data=st.data())
@settings(max_examples=40, deadline=None)
def test_pieces_are_the_whole(up_type: str, down_type: str, seed: int, data: st.DataObject) -> None:
    """Any part that begins with a page and a group; scales and quants together or apart."""
    made = make(up_type, down_type, 480, 96, 40, seed)
    pack(made)
    neurons, layout, step = 480, made.bundles.layout, neuron_bundles.step_neurons(made.bundles)
    first = step * data.draw(st.integers(0, (neurons - 1) // step))
    count = 32 * data.draw(st.integers(1, (neurons - first) // 32))
    per_page, page_bytes, neuron_bytes, _ = layout
    to = np.full(-(-count // per_page) * page_bytes, LEFT, np.uint8)
    up_part = made.up_rows[first : first + count].reshape(-1)
    native.bundle_up(up_type, up_part, count, 96, layout, to, None)
    down_whole = made.down_rows.reshape(-1)
    native.bundle_down(down_type, down_whole, 40, neurons, first, count, layout, to, None)
    at = first // per_page * page_bytes
    expected = made.pages[at : at + to.size].copy()
    last = expected.reshape(-1, page_bytes)[-1]
    last[((count - 1) % per_page + 1) * neuron_bytes :] = LEFT  # the whole goes on there
    np.testing.assert_array_equal(to, expected)

    each_up, each_down = neuron_bundles.up_scales(up_type, 96), neuron_bundles.down_scales(down_type, 40)
    up_scales, down_scales = np.empty(count * each_up, np.uint8), np.empty(count // 32 * each_down, np.uint8)
    native.bundle_up(up_type, up_part, count, 96, layout, None, up_scales)
    native.bundle_down(down_type, down_whole, 40, neurons, first, count, layout, None, down_scales)
    np.testing.assert_array_equal(up_scales, made.up_scales[first * each_up :][: up_scales.size])
    np.testing.assert_array_equal(
        down_scales, made.down_scales[first // 32 * each_down :][: down_scales.size]
    )


@pytest.mark.parametrize("type_name", BUNDLED)
@given(seed=seeds, bad=st.sampled_from([np.nan, np.inf, -np.inf]), data=st.data())
@settings(max_examples=20, deadline=None)
def test_the_first_row_with_a_scale_that_is_not_finite_is_reported(
    type_name: str, seed: int, bad: float, data: st.DataObject
) -> None:
    made = make(type_name, type_name, 96, 96, 50, seed)
    layout, kind = made.bundles.layout, quants.TYPES[type_name]
    numbers = 2 if kind.scale_format == "F16x2" else 1
    for raw in (made.up_rows, made.down_rows):
        row = data.draw(st.integers(0, len(raw) - 1))
        for broken in (row, data.draw(st.integers(row, len(raw) - 1))):
            block, number = data.draw(st.integers(0, 2)), data.draw(st.integers(0, numbers - 1))
            at = block * kind.block_bytes + kind.scales_at + 2 * number
            raw[broken, at : at + 2] = np.array([bad], "<f2").view(np.uint8)
        for to in (made.pages, None):
            if raw is made.up_rows:
                found = native.bundle_up(type_name, raw.reshape(-1), 96, 96, layout, to, None)
            else:
                found = native.bundle_down(type_name, raw.reshape(-1), 50, 96, 0, 96, layout, to, None)
            assert found == row


@given(type_name=types, columns=st.integers(1, 400), rows=st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
def test_sizes_are_those_of_the_reader(type_name: str, columns: int, rows: int) -> None:
    columns *= 32
    assert native.up_quants(type_name, columns) == neuron_bundles.up_quants(type_name, columns)
    assert native.up_scales(type_name, columns) == neuron_bundles.up_scales(type_name, columns)
    assert native.down_quants(type_name, rows) == neuron_bundles.down_quants(type_name, rows)
    assert native.down_scales(type_name, rows) == neuron_bundles.down_scales(type_name, rows)


def test_other_types_have_no_bundles() -> None:
    for name in set(TYPE_NAMES) - set(BUNDLED):
        sizes = (native.up_quants, native.down_quants, native.up_scales, native.down_scales)
        assert [size(name, 512) for size in sizes] == [0, 0, 0, 0]
    assert native.up_quants("Q4_0", 40) == native.up_scales("Q4_0", 40) == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "source": ({"source": np.zeros(10, np.uint8)}, "10 bytes for 64 rows of 64 Q4_0 values"),
    "pages": ({"to": np.zeros(4095, np.uint8)}, "4095 bytes for the pages of 64 neurons"),
    "scales": ({"scales": np.zeros(1, np.uint8)}, "1 bytes of scales, not 2048"),
    "type": ({"type_name": "Q5_0"}, "0 bytes of quants from byte 0 on do not fit into a neuron"),
    "columns": ({"k": 65}, "0 bytes of quants"),
    "no page": ({"layout": (0, 4096, 320, 256)}, "neurons do not fit into their page"),
    "short page": ({"layout": (12, 3000, 320, 256)}, "neurons do not fit into their page"),
    "short neuron": ({"layout": (12, 4096, 255, 255)}, "256 bytes of quants from byte 0 on do not fit"),
    "short up": ({"layout": (12, 4096, 320, 255)}, "up quants take 256 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    changed, message = WRONG[case]
    made = make("Q4_0", "Q4_0", 64, 64, 64)
    arguments: dict[str, Any] = {"type_name": "Q4_0", "source": made.up_rows.reshape(-1), "n": 64, "k": 64}
    arguments |= {"layout": made.bundles.layout, "to": made.pages, "scales": made.up_scales} | changed
    with pytest.raises(ValueError, match=message):
        native.bundle_up(**arguments)


@pytest.mark.parametrize(
    ("first", "count", "rows", "message"),
    [
        (16, 32, 64, "neurons 16 to 48 of 64: not whole blocks of 32"),
        (0, 40, 64, "neurons 0 to 40 of 64: not whole"),
        (32, 64, 64, "neurons 32 to 96 of 64: not whole"),
        (-32, 32, 64, "neurons -32 to 0 of 64: not whole"),
        (0, 64, 65, "2304 bytes for 65 rows of 64 Q4_0 values"),
        (0, 64, 129, "128 bytes of quants from byte 256 on do not fit into a neuron"),
    ],
)
def test_what_does_not_fit_of_down_is_refused(first: int, count: int, rows: int, message: str) -> None:
    made = make("Q4_0", "Q4_0", 64, 64, 64)
    source = made.down_rows.reshape(-1)
    with pytest.raises(ValueError, match=message):
        native.bundle_down("Q4_0", source, rows, 64, first, count, made.bundles.layout, made.pages, None)


def test_what_is_too_short_is_not_read() -> None:
    made = make("Q4_0", "Q4_0", 64, 64, 64)
    layout = made.bundles.layout
    with pytest.raises(ValueError, match="bytes for the pages of 64 neurons"):
        native.unbundle_up("Q4_0", made.pages[:-1], made.up_scales, 64, 64, layout)
    with pytest.raises(ValueError, match="bytes of scales, not 2048"):
        native.unbundle_up("Q4_0", made.pages, made.up_scales[:-1], 64, 64, layout)
    with pytest.raises(ValueError, match="bytes for the pages of 64 neurons"):
        native.unbundle_down("Q4_0", made.pages[:-1], made.down_scales, 64, 64, layout)
    with pytest.raises(ValueError, match="bytes of scales, not 512"):
        native.unbundle_down("Q4_0", made.pages, made.down_scales[:-1], 64, 64, layout)
    with pytest.raises(ValueError, match="63 neurons: not a multiple of 32"):
        native.unbundle_down("Q4_0", made.pages, made.down_scales, 64, 63, layout)
