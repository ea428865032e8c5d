"""``docs/pack-format.md`` is enough: a reader written from it, with nothing of pi2rt's but what ggml's types mean,
gets the values of the source."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import pytest

from pi2rt.formats import open_model_file
from pi2rt.formats.quants import TYPES, dequantize
from pi2rt.planner.pack.convert import convert
from pi2rt.planner.pack.findings import Findings
from tests.support.tiny_models import TinyModel, write_gguf

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ROLES = (
    "token_embd",
    "output",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)
ELEMENT_TYPES = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"
}  # fmt: skip
SCALE_BYTES = {
    "Q4_0": 32,
    "Q5_0": 32,
    "Q8_0": 32,
    "Q4_1": 64,
    "Q5_1": 64,
    "Q4_K": 320,
    "Q5_K": 320,
    "Q6_K": 288,
}
QUANT_BYTES = {"Q4": 256, "Q5": 256 + 64, "Q6": 256 + 128, "Q8": 512}


class DocumentedReader:
    def __init__(self, raw: bytes) -> None:
        assert raw[:8] == b"PI2\0PACK"
        version, flags, length, size = struct.unpack_from("<IIQQ", raw, 8)
        assert (version, size) == (1, len(raw))
        self.flags = flags
        assert hashlib.blake2b(raw[:32] + raw[64 : 64 + length], digest_size=32).digest() == raw[32:64]
        self.header: dict[str, Any] = msgpack.unpackb(raw[64 : 64 + length], ext_hook=array)
        self._raw, self._data = raw, -(-(64 + length) // 4096) * 4096

    def bytes_of(self, entry: dict[str, Any]) -> bytes:
        at = self._data + entry["offset"]
        content = self._raw[at : at + entry["nbytes"]]
        assert at % 4096 == 0
        assert hashlib.blake2b(content, digest_size=16).digest() == entry["checksum"]
        return content

    def values(self, tensor: dict[str, Any]) -> Floats:
        raw, kind, shape = np.frombuffer(self.bytes_of(tensor), np.uint8), tensor["type"], tensor["shape"]
        if tensor["layout"] == "rows":
            return dequantize(kind, raw, tuple(shape))
        if tensor["layout"] == "neurons":
            return self.neuron_values(tensor)
        assert tensor["layout"] == "blocks16"
        rows, columns = shape
        blocks = raw.reshape(-(-rows // 16), -1)
        values = float_blocks if kind in ("F32", "F16", "BF16") else quantised_blocks
        every = values(kind, blocks, columns)  # (blocks, 16, columns)
        assert not every.reshape(-1, columns)[rows:].any()
        return every.reshape(-1, columns)[:rows]

    def neuron_values(self, tensor: dict[str, Any]) -> Floats:
        name, (rows, columns) = tensor["name"], tensor["shape"]
        roles = "gate", "up", "down"
        (bundles,) = (each for each in self.header["bundles"] if name in [each.get(role) for role in roles])
        by_name = {each["name"]: each for each in self.header["tensors"]}
        gate, up, down = (by_name.get(bundles.get(role)) for role in roles)
        assert down is not None
        gate_bytes, up_bytes = (
            0 if each is None else -(-each["shape"][1] // 512) * (512 if each["type"] == "Q8_0" else 256)
            for each in (gate, up)
        )
        line_rows = 64 if down["type"] == "Q8_0" else 128
        size = gate_bytes + up_bytes + 64 * -(-down["shape"][0] // line_rows)
        per_page = max(1, 4096 // size)
        assert (bundles["neuron_bytes"], bundles["neurons_per_page"]) == (size, per_page)
        assert bundles["page_bytes"] == -(-size * per_page // 4096) * 4096
        pages = np.frombuffer(self.bytes_of(bundles), np.uint8).reshape(-1, bundles["page_bytes"])
        assert not pages[:, size * per_page :].any()
        neurons = pages[:, : size * per_page].reshape(-1, size)
        assert not neurons[bundles["neurons"] :].any()
        neurons = self.in_order(neurons[: bundles["neurons"]], bundles["order"])
        scales = np.frombuffer(self.bytes_of(tensor), "<f2").astype(np.float32)
        affine = tensor["type"] == "Q4_1"
        if tensor is gate or tensor is up:
            assert rows == bundles["neurons"]
            begin, end = (0, gate_bytes) if tensor is gate else (gate_bytes, gate_bytes + up_bytes)
            quants = up_neurons(tensor["type"], neurons[:, begin:end], columns)
            planes = scales.reshape(rows, 1 + affine, -1).swapaxes(0, 1)  # (d and m, neurons, blocks)
            assert not planes[:, :, columns // 32 :].any()
            numbers = [np.repeat(plane[:, : columns // 32], 32, axis=1) for plane in planes]
        else:
            assert columns == bundles["neurons"]
            quants = down_neurons(tensor["type"], neurons[:, gate_bytes + up_bytes :], rows)
            planes = scales.reshape(columns // 32, 1 + affine, -1).swapaxes(0, 1)  # (d and m, groups, rows)
            assert planes.shape[2] == -(-rows // 128) * 128
            assert not planes[:, :, rows:].any()
            numbers = [np.repeat(plane[:, :rows], 32, axis=0).T for plane in planes]
        if affine:
            return numbers[0] * quants + numbers[1]
        return numbers[0] * (quants - (8 if tensor["type"] == "Q4_0" else 0))

    def in_order(self, places: Bytes, order: bytes | None) -> Bytes:
        """From places to neurons."""
        if order is None:
            return places
        assert self.flags == 2
        neurons = np.empty_like(places)
        for place, neuron in enumerate(struct.unpack(f"<{len(places)}H", order)):
            neurons[place // 512 * 512 + neuron] = places[place]
        return neurons


def up_neurons(kind: str, data: Bytes, columns: int) -> Floats:
    """(neurons, columns)"""
    every = np.zeros((len(data), data.shape[1] // (512 if kind == "Q8_0" else 256) * 512), np.int32)
    for at in range(data.shape[1]):
        lane, b = at % 64 // 4, at % 4
        if kind == "Q8_0":
            c, i = at // 512, at % 512 // 64
            every[:, 32 * (16 * c + lane) + 4 * i + 2 * (b % 2) + b // 2] = signed(data[:, at])
            continue
        c, i = at // 256, at % 256 // 64
        for h in (0, 1):
            column = 32 * (16 * c + lane) + 8 * i + 4 * (b % 2) + 2 * h + b // 2
            every[:, column] = data[:, at] >> 4 * h & 15
    assert not every[:, columns:].any()
    return every[:, :columns].astype(np.float32)


def down_neurons(kind: str, data: Bytes, rows: int) -> Floats:
    """(rows, neurons)"""
    every = np.zeros((data.shape[1] * (1 if kind == "Q8_0" else 2), len(data)), np.int32)
    for at in range(data.shape[1]):
        c, lane, b = at // 64, at % 64 // 4, at % 4
        if kind == "Q8_0":
            every[64 * c + 16 * b + lane] = signed(data[:, at])
            continue
        for h in (0, 1):
            every[128 * c + 16 * (2 * b + h) + lane] = data[:, at] >> 4 * h & 15
    assert not every[rows:].any()
    return every[:rows].astype(np.float32)


def signed(data: Bytes) -> npt.NDArray[np.int8]:
    return np.ascontiguousarray(data).view(np.int8)


def array(code: int, data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, ELEMENT_TYPES[code])


def float_blocks(kind: str, blocks: Bytes, columns: int) -> Floats:
    size = TYPES[kind].block_bytes
    values = blocks[:, : columns * 16 * size].reshape(-1, columns, 16, size).swapaxes(1, 2)
    return dequantize(kind, np.ascontiguousarray(values), (len(blocks), 16, columns))


def quantised_blocks(kind: str, blocks: Bytes, columns: int) -> Floats:
    span = 256 if kind.endswith("_K") else 32
    scale_bytes, groups = SCALE_BYTES[kind] * (columns // span), columns // 32
    begin = -(-scale_bytes // 64) * 64
    assert blocks.shape[1] == begin + groups * QUANT_BYTES[kind[:2]]
    scales = blocks[:, :scale_bytes].reshape(len(blocks), -1, SCALE_BYTES[kind])
    quants = group_quants(
        kind, blocks[:, begin:].reshape(len(blocks), groups, -1)
    )  # (blocks, groups, 16, 32)
    values = k_values(kind, scales, quants) if span == 256 else plain_values(kind, scales, quants)
    return values.reshape(len(blocks), groups, 16, 32).swapaxes(1, 2).reshape(len(blocks), 16, columns)


def group_quants(kind: str, data: Bytes) -> Floats:
    found = np.zeros((*data.shape[:2], 16, 32), np.int32)
    if kind == "Q8_0":
        for column in range(32):
            found[..., column] = data.reshape(*data.shape[:2], 8, 16, 4)[
                :, :, column // 4, :, column % 4
            ].view(np.int8)
        return found.astype(np.float32)
    low = data[..., :256].reshape(*data.shape[:2], 4, 16, 4)
    for column in range(32):
        found[..., column] = low[:, :, column // 4 % 4, :, column % 4] >> (4 if column >= 16 else 0) & 15
    if kind.startswith("Q5"):
        bits = np.unpackbits(data[..., 256:], axis=2, bitorder="little").reshape(*data.shape[:2], 8, 16, 4)
        for column in range(32):
            found[..., column] |= bits[:, :, column // 4, :, column % 4].astype(np.int32) << 4
    if kind == "Q6_K":
        top = data[..., 256:].reshape(*data.shape[:2], 2, 16, 4)
        for column in range(32):
            h, t, j = column // 16, column // 4 % 4, column % 4
            found[..., column] |= (top[:, :, h, :, j].astype(np.int32) >> 2 * t & 3) << 4
    return found.astype(np.float32)


def half(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def plain_values(kind: str, scales: Bytes, quants: Floats) -> Floats:
    d = half(scales[..., :32])[..., None]
    if SCALE_BYTES[kind] == 64:
        return d * quants + half(scales[..., 32:])[..., None]
    return d * (quants - {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}[kind])


def k_values(kind: str, scales: Bytes, quants: Floats) -> Floats:
    quants = quants.reshape(*scales.shape[:2], 8, 16, 32)  # (blocks, super-groups, groups, rows, columns)
    d = half(scales[..., :32])[:, :, None, :]
    if kind == "Q6_K":
        signed = np.ascontiguousarray(scales[..., 32:]).view(np.int8).reshape(*scales.shape[:2], 8, 2, 16)
        each = (d[:, :, :, None, :] * signed.astype(np.float32)).swapaxes(
            3, 4
        )  # (..., rows, halves of a group)
        return np.repeat(each, 16, axis=4) * (quants - 32)
    fine = scales[..., 64:].reshape(*scales.shape[:2], 8, 2, 16)
    dmin = half(scales[..., 32:64])[:, :, None, :]
    scale, least = (fine[:, :, :, part].astype(np.float32) for part in (0, 1))
    return (d * scale)[..., None] * quants - (dmin * least)[..., None]


def compare(source: Path, pack: Path) -> DocumentedReader:
    """Every value of the pack with the source's."""
    reader = DocumentedReader(pack.read_bytes())
    with open_model_file(source) as file:
        for tensor in reader.header["tensors"]:
            info = file.tensors[tensor["name"]]
            expected = dequantize(info.type, file.read(info.name), info.shape)
            np.testing.assert_array_equal(reader.values(tensor), expected)
    return reader


@pytest.mark.parametrize("shift", [0, 3])
def test_a_reader_from_the_document(tmp_path: Path, shift: int) -> None:
    names = [*TYPES][shift:] + [*TYPES][:shift]  # more types than roles
    model = TinyModel("qwen3", seed=8, dim=256, hidden=512, layers=1, heads=2, kv_heads=1, head_dim=256)
    source = write_gguf(tmp_path / "m.gguf", model, types=dict(zip(ROLES, names, strict=False)))
    convert(source, tmp_path / "m.pi2")
    reader = compare(source, tmp_path / "m.pi2")
    assert reader.flags == 0
    with open_model_file(source) as file:
        assert reader.header["architecture"] == file.architecture
        assert list(reader.header["metadata"]) == list(file.metadata)
        np.testing.assert_array_equal(
            reader.header["metadata"]["tokenizer.ggml.token_type"], file.metadata["tokenizer.ggml.token_type"]
        )
        (only,) = reader.header["source"]["files"]
        assert only["digest"] == hashlib.blake2b(source.read_bytes(), digest_size=32).digest()
        tensors = reader.header["tensors"]
        assert {tensor["type"] for tensor in tensors} >= set(names[: len(ROLES)])


@pytest.mark.parametrize(
    ("roles", "up", "down"),
    [("up down", "Q4_0", "Q4_0"), ("up down", "Q4_1", "Q8_0"), ("up down", "Q8_0", "Q4_1"), ("up down", "Q8_0", "Q8_0"),
     ("down", "F32", "Q4_0"), ("down", "F32", "Q8_0"),
     ("gate up down", "Q4_0", "Q8_0"), ("gate up down", "Q8_0", "Q4_1")],
)  # fmt: skip
def test_a_reader_of_neurons(tmp_path: Path, roles: str, up: str, down: str) -> None:
    """Rows that are more than one padded line, neurons that are no whole number of pages."""
    config, gated = {"hidden_act": "relu"}, roles != "down"
    model = TinyModel(seed=9, dim=544, hidden=160, layers=2, head_dim=16, gated=gated, config=config)
    types = {"ffn_up": up, "ffn_down": down} | ({"ffn_gate": "Q4_1"} if gated else {})
    source = write_gguf(tmp_path / "m.gguf", model, types=types)
    convert(source, tmp_path / "m.pi2", bundles="gates" if "gate" in roles else "relu")
    reader = compare(source, tmp_path / "m.pi2")
    layouts = {each["name"]: each["layout"] for each in reader.header["tensors"]}
    assert {name for name, layout in layouts.items() if layout == "neurons"} == {
        f"blk.{layer}.ffn_{role}.weight" for layer in (0, 1) for role in roles.split()
    }


@pytest.mark.parametrize(("dim", "hidden"), [(96, 1184), (544, 1056), (4096, 544)])
def test_a_reader_of_neurons_in_another_order(tmp_path: Path, dim: int, hidden: int) -> None:
    """Several clusters, the last one short; pages of 12, of 3 and of one neuron."""
    model = TinyModel(seed=9, dim=dim, hidden=hidden, layers=1, head_dim=16, config={"hidden_act": "relu"})
    source = write_gguf(tmp_path / "m.gguf", model, weight_type="Q4_0", types={"ffn_down": "Q8_0"})
    random = np.random.default_rng(dim)
    sizes = [min(512, hidden - at) for at in range(0, hidden, 512)]
    order = np.concatenate([random.permutation(size) for size in sizes]).astype(np.uint16)
    convert(source, tmp_path / "m.pi2", calibration=Findings({"blk.0.ffn_down.weight": order}))
    reader = compare(source, tmp_path / "m.pi2")
    (bundles,) = reader.header["bundles"]
    assert (reader.flags, bundles["order"]) == (2, order.astype("<u2").tobytes())
