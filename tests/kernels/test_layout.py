"""Row blocks: every value of a file comes back bit for bit, and what is not finite is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import quants
from tests.kernels.variants import KERNELS
from tests.kernels.weights import FLOAT_TYPES, QUANT_TYPES, TYPE_NAMES, random_rows

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("type_name", TYPE_NAMES)
@given(seed=seeds, rows=st.integers(0, 50), blocks=st.integers(0, 5), scale=st.integers(-9, 3))
@settings(max_examples=30, deadline=None)
def test_values_come_back_as_the_file_has_them(
    type_name: str, seed: int, rows: int, blocks: int, scale: int
) -> None:
    rng = np.random.default_rng(seed)
    k = blocks * quants.TYPES[type_name].block_elements
    raw = random_rows(rng, type_name, rows, k, scale=10.0**scale)  # to denormal float16 and beyond
    assert native.row_bytes(type_name, k) * rows == raw.size
    memory = native.Memory(native.matrix_bytes(type_name, rows, k) or 64)
    memory.view()[:] = 0xA5  # what was there before does not matter
    assert native.repack(type_name, raw.reshape(-1), rows, k, memory.address) is None
    values = native.unpack(type_name, memory.address, rows, k)
    # == and not bits: ggml's order of sums gives -0 where ours gives 0
    np.testing.assert_array_equal(values, quants.dequantize(type_name, raw, (rows, k)))
    memory.close()


@pytest.mark.parametrize("type_name", TYPE_NAMES)
def test_rows_are_padded_with_zeros(type_name: str) -> None:
    raw = random_rows(np.random.default_rng(1), type_name, 5, 256)
    memory = native.Memory(native.matrix_bytes(type_name, 5, 256))
    memory.view()[:] = 0xA5
    assert native.repack(type_name, raw.reshape(-1), 5, 256, memory.address) is None
    assert not native.unpack(type_name, memory.address, 16, 256)[5:].any()
    memory.close()


@pytest.mark.parametrize("type_name", TYPE_NAMES)
@given(seed=seeds, rows=st.integers(1, 40), bad=st.sampled_from([np.nan, np.inf, -np.inf]), data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_first_row_with_a_number_that_is_not_finite_is_reported(
    type_name: str, seed: int, rows: int, bad: float, data: st.DataObject
) -> None:
    kind, rng, k = quants.TYPES[type_name], np.random.default_rng(seed), 512
    raw = random_rows(rng, type_name, rows, k)
    row = data.draw(st.integers(0, rows - 1))
    for broken in (row, int(rng.integers(row, rows))):
        block = int(rng.integers(0, k // kind.block_elements))
        number = int(rng.integers(0, 2)) if kind.scale_format == "F16x2" else 0
        at = block * kind.block_bytes + kind.scales_at + 2 * number
        if type_name == "BF16":
            value = (np.array([bad], np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        else:
            value = np.array([bad], "<f4" if type_name == "F32" else "<f2").view(np.uint8)
        raw[broken, at : at + len(value)] = value
    memory = native.Memory(native.matrix_bytes(type_name, rows, k))
    assert native.repack(type_name, raw.reshape(-1), rows, k, memory.address) == row
    memory.close()


def test_wrong_sizes_are_refused() -> None:
    memory = native.Memory(4096)
    raw = np.zeros(18, np.uint8)
    with pytest.raises(ValueError, match="18 bytes for 2 rows of 32 Q4_0 values"):
        native.repack("Q4_0", raw, 2, 32, memory.address)
    with pytest.raises(ValueError, match="multiple of 64"):
        native.repack("Q4_0", raw, 1, 32, memory.address + 32)
    assert native.row_bytes("Q4_0", 31) == 0
    assert native.row_bytes("Q4_K", 128) == 0
    memory.close()


@pytest.mark.parametrize("type_name", QUANT_TYPES)
def test_a_matrix_costs_what_the_file_costs(type_name: str) -> None:
    """Row blocks of whole sixteens carry next to no padding: memory is what the runtime is about."""
    in_file = 4096 * native.row_bytes(type_name, 4096)
    # K types spread the 12 bytes of packed scales to 16
    assert in_file <= native.matrix_bytes(type_name, 4096, 4096) <= in_file * 1.03


@pytest.mark.parametrize("type_name", FLOAT_TYPES)
def test_a_float_matrix_costs_what_the_file_costs(type_name: str) -> None:
    assert native.matrix_bytes(type_name, 64, 100) == 64 * native.row_bytes(type_name, 100)


@pytest.mark.parametrize("name", KERNELS)
def test_reading_reads_everything(name: str) -> None:
    assert native.read_bandwidth(1 << 16, 2, repeats=1, name=name) > 0
