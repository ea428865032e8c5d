"""Writes the cases that ``runner.c`` runs: inputs, and what the scalar variant makes of them.

A case is, in little endian: kernel, whether it passes through the C library's erff or log, number of inputs,
number of outputs (uint32); 8 int64 and 4 float32 parameters; then the arrays, each kind and bytes of
misalignment (uint32), bytes (uint64), data.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import neuron_bundles
from pi2rt.models import rope_scaling
from tests.kernels.weights import FLOAT_TYPES, QUANT_TYPES, TYPE_NAMES, random_rows

(
    QUANTIZE,
    GEMM,
    RMSNORM,
    ADD,
    ACTIVATE,
    ROPE,
    ATTENTION,
    SCALE,
    ARGMAX,
    LOGSUMEXP,
    SOFTCAP,
    READ,
    REPACK,
    UNPACK,
    NEURON_ROWS,
    NEURON_COLUMNS,
    ROTATION,
    EXPONENTIAL,
) = range(18)
ACTIVATIONS = tuple(native.ACTIVATIONS)
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 64, 100, 4095, 4097)

Array = npt.NDArray[Any]
SCALAR = native.Kernels("scalar")


@dataclass(frozen=True, slots=True)
class Case:
    kernel: int
    inputs: Sequence[Array]
    outputs: Sequence[Array]
    p: tuple[int, ...] = ()
    f: tuple[float, ...] = ()
    misalign: int = 0  # bytes, of the inputs and outputs of floats

    def to_bytes(self) -> bytes:
        head = struct.pack("<3I", self.kernel, len(self.inputs), len(self.outputs))
        parameters = struct.pack(
            "<8q4f", *self.p, *[0] * (8 - len(self.p)), *self.f, *[0.0] * (4 - len(self.f))
        )
        return head + parameters + b"".join(self._array(a) for a in (*self.inputs, *self.outputs))

    def _array(self, a: Array) -> bytes:
        kind = {"float32": 1, "float64": 2}.get(a.dtype.name, 0)
        data = np.ascontiguousarray(a).tobytes()
        return struct.pack("<2IQ", kind, self.misalign if kind == 1 else 0, len(data)) + data


def wild(rng: np.random.Generator, n: int) -> npt.NDArray[np.float32]:
    """Finite floats of every magnitude, with zeros of both signs and denormals among them."""
    x = (rng.standard_normal(n) * 10.0 ** rng.uniform(-38, 37, n)).astype(np.float32)
    special = np.array([0.0, -0.0, 1e-45, -1e-40, 3e38, -3e38], np.float32)
    return np.where(rng.random(n) < 0.2, rng.choice(special, n), x).astype(np.float32)


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def quantize_cases(rng: np.random.Generator) -> Iterator[Case]:
    ties = np.tile(np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127], np.float32), 8)
    first = (np.zeros(32, np.float32), np.full(64, 1e-40, np.float32), np.full(32, 3.4e38, np.float32), ties)
    for i in range(24):
        usual = wild(rng, 32 * i) if i % 2 else normal(rng, 32 * i, scale=10.0 ** (i - 12))
        x = first[i] if i < len(first) else usual
        yield Case(QUANTIZE, [x], SCALAR.quantize(x), (0,), misalign=4 * (i % 4))
        for way, mixed in ((1, False), (2, True)):
            q, *others = SCALAR.quantize(x, wide=True, mixed=mixed)
            kernel_order = q.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1)
            yield Case(QUANTIZE, [x], [kernel_order, *others], (way,), misalign=4 * (i % 4))


def products(
    type_name: str, raw: Array, x: npt.NDArray[np.float32], offset: int = 0, padding: int = 0
) -> Iterator[Case]:
    """With int8, int16 and mixed activations, row blocks one by one and several at once. Rows of activations start
    ``offset`` elements into memory and lie ``padding`` elements apart."""
    rows, k = len(raw), x.shape[1]
    memory = native.Memory(native.matrix_bytes(type_name, rows, k))
    if native.repack(type_name, raw.reshape(-1), rows, k, memory.address) is not None:
        raise ValueError("weights of a case must be finite")
    ways = tuple(itertools.product((False, True), (0, 1, 2)))
    for panel, way in ways[: 1 if type_name in FLOAT_TYPES else 6]:
        out = SCALAR.gemm(type_name, memory.address, rows, k, x, wide=way > 0, mixed=way == 2)
        p = (native.TYPE_IDS[type_name], rows, k, len(x), way, offset, padding, int(panel))
        yield Case(GEMM, [raw, x], [out], p, misalign=4 * (offset % 4))
    memory.close()


def gemm_cases(rng: np.random.Generator) -> Iterator[Case]:
    for name in QUANT_TYPES:
        for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 17):
            k, rows = (256, 512, 768)[n % 3], (16, 5, 33)[n % 3]
            x = normal(rng, n, k, scale=10.0 ** (n % 7 - 3))
            yield from products(name, random_rows(rng, name, rows, k), x, n % 5, 3 * n % 64)
        for n in (4, 10):
            yield from products(name, random_rows(rng, name, 80, 256), normal(rng, n, 256), n)
        if not name.endswith("K"):
            yield from products(name, random_rows(rng, name, 16, 32), normal(rng, 5, 32), 1)
            yield from products(name, random_rows(rng, name, 17, 96), normal(rng, 2, 96), 0, 1)
        for quants in (0, 0x7F, 0x80, 0xFF):  # where sums of 16 bits come closest to overflowing
            signs = rng.choice(np.array([-1, 1], np.float32), (7, 256))
            signs[:3], signs[3:5] = 1, -1
            yield from products(name, random_rows(rng, name, 64, 256, quants=quants), signs)
        yield from products(name, random_rows(rng, name, 16, 256, scale=0.0), normal(rng, 1, 256))
        yield from products(
            name, random_rows(rng, name, 16, 256, scale=1e-6), wild(rng, 256)[None] * np.float32(2**-7)
        )
    for name in FLOAT_TYPES:
        for n in (1, 2, 3, 4, 5, 8, 9, 11):
            for k in (1, 2, 31, 64, 127):
                yield from products(name, random_rows(rng, name, 1 + 7 * n, k), normal(rng, n, k), n)
        tiny = random_rows(rng, name, 16, 64, scale=1e-7)
        yield from products(name, tiny, normal(rng, 1, 64, scale=1e-30))


def vector_cases(rng: np.random.Generator) -> Iterator[Case]:
    for i, n in enumerate(LENGTHS):
        x, y, at = normal(rng, n), normal(rng, n, scale=3), 4 * (i % 16)
        for a in (x, wild(rng, n) * np.float32(1e-20)):
            for in_place in (0, 1):
                out = SCALAR.rmsnorm(a, y, float(i % 2), 1e-6)
                yield Case(RMSNORM, [a, y], [out], (in_place,), (float(i % 2), 1e-6), misalign=at)
        quarter = np.float32(0.25)
        for a, b in ((x, y), (wild(rng, n) * quarter, wild(rng, n) * quarter)):
            yield Case(ADD, [a, b], [SCALAR.add(a, b)], misalign=at)
        yield Case(SCALE, [y], [SCALAR.scale(y, 0.3)], f=(0.3,), misalign=at)
        for cap in (1.0, 30.0):
            z = np.concatenate([normal(rng, n, scale=40), np.array([0, 1e-30, 1e4, -1e4], np.float32)])
            yield Case(SOFTCAP, [z], [SCALAR.softcap(z, cap)], f=(cap,), misalign=at)
        for a in (x, y * 30, np.full(n, 2.5, np.float32), holes(rng, x)):
            yield Case(ARGMAX, [a], [np.array([SCALAR.argmax(a)], np.int64)], misalign=at)
        for a in (x, y * 30, np.where(rng.random(n) < 0.3, -np.inf, x).astype(np.float32)):
            yield Case(LOGSUMEXP, [a], [np.array([SCALAR.logsumexp(a)])], misalign=at)
        for kind in ACTIVATIONS:
            yield activate_case(kind, None, None, y * 3, at)
            yield activate_case(kind, kind if n % 2 else None, x, y, at)
            if kind != "relu2":
                yield activate_case(
                    kind, None, None, np.array([0, -0.0, 90, -90, 87.4, -87.4, 1e4, -1e4], np.float32), at
                )
        if n <= 128:
            angle = rng.uniform(0, 6, n)
            cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
            for interleaved in (0, 1):
                head = normal(rng, 2 * n + n % 3)
                out = SCALAR.rope(head, cosine, sine, bool(interleaved))
                yield Case(ROPE, [head, cosine, sine], [out], (interleaved,), misalign=at)


def elementary_cases(rng: np.random.Generator) -> Iterator[Case]:
    frequencies = rope_scaling.plain(64, 10_000.0)
    many = np.concatenate([rope_scaling.plain(128, 500_000.0), rng.uniform(0, 1e-3, 7), [1e3, 1e15, 1e300]])
    for values, first, count, magnitude in (
        (frequencies, 0, 32_768, 1.0),
        (many, 0, 3000, 1.0),
        (many, (1 << 24) - 300, 300, 1.1902),
    ):
        outputs = native.rotations(values, first, count, magnitude)
        yield Case(ROTATION, [values], outputs, (first, count), (float(np.float32(magnitude)),))
    x = np.concatenate(
        [rng.uniform(-1, 1, 20_000), rng.uniform(-800, 800, 20_000), [0.0, np.inf, -np.inf, np.nan]]
    )
    yield Case(EXPONENTIAL, [x], [native.exponential(x)])


def holes(rng: np.random.Generator, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Some NaN, some minus infinity."""
    return np.where(rng.random(len(x)) < 0.4, np.nan, np.where(rng.random(len(x)) < 0.2, -np.inf, x)).astype(
        np.float32
    )


def activate_case(
    kind: str | None, up_kind: str | None, gate: Array | None, up: Array, misalign: int
) -> Case:
    p = (native.ACTIVATIONS[kind], native.ACTIVATIONS[up_kind], int(gate is not None))
    inputs = [up] if gate is None else [up, gate]
    return Case(
        ACTIVATE,
        inputs,
        [SCALAR.activate(kind, up_kind, gate, up)],
        p,
        misalign=misalign,
    )


def attention_cases(rng: np.random.Generator) -> Iterator[Case]:
    shapes = [
        (1, 16, 1),
        (5, 32, 2),
        (64, 64, 3),
        (65, 64, 4),
        (70, 16, 5),
        (130, 80, 8),
        (200, 128, 9),
        (64, 256, 7),
    ]
    for i, (n, hd, nq) in enumerate([*shapes, (97, 48, 40), (300, 64, 12)]):
        for kv_type, number in native.KV_TYPES.items():
            for cap in (0.0, 20.0):
                keys, values, queries = (
                    normal(rng, n, hd),
                    normal(rng, n, hd, scale=3),
                    normal(rng, nq, hd, scale=0.4),
                )
                lo = rng.integers(0, n, nq, dtype=np.int32) if i % 2 else np.zeros(nq, np.int32)
                hi = np.minimum(lo + rng.integers(1, n + 1, nq), n).astype(np.int32)
                cuts = (0, n) if i % 3 else (0, n // 3, n // 2, n)
                splits = [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
                out = SCALAR.attention(
                    keys, values, queries, lo, hi, kv_type=kv_type, softcap=cap, splits=splits
                )
                inputs = [keys, values, queries, lo, hi, np.array(splits, np.int64)]
                yield Case(
                    ATTENTION, inputs, [out], (n, hd, nq, number, len(splits)), (cap,), misalign=4 * (i % 3)
                )


def memory_cases(rng: np.random.Generator) -> Iterator[Case]:
    for n in (256, 512, 4096):
        block = rng.integers(0, 256, n, dtype=np.uint8)
        yield Case(READ, [block], [np.bitwise_xor.reduce(block.view(np.uint64), keepdims=True)])
    for name in TYPE_NAMES:
        for rows, k in (
            (1, 256),
            (16, 512),
            (37, 256),
            *([(3, 32), (18, 96)] if not name.endswith("K") else []),
        ):
            raw = random_rows(rng, name, rows, k)
            if rows == 37 and name not in FLOAT_TYPES:
                raw = rng.integers(0, 256, raw.shape, dtype=np.uint8)  # scales that are no numbers too
            memory = native.Memory(native.matrix_bytes(name, rows, k))
            bad = native.repack(name, raw.reshape(-1), rows, k, memory.address)
            blocks, p = memory.view().copy(), (native.TYPE_IDS[name], rows, k)
            yield Case(REPACK, [raw], [blocks, np.array([0 if bad is None else bad + 1], np.int64)], p)
            yield Case(UNPACK, [blocks], [native.unpack(name, memory.address, rows, k)], p)
            memory.close()


def neuron_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Expected is what the row blocks' kernel makes of the whole matrix: single neurons have the same bits."""
    shapes = ((32, 1), (96, 3), (512, 16), (544, 5), (1024, 9), (1600, 16))
    for name in neuron_bundles.TYPES:
        for quants in (None, 0, 0x7F, 0x80, 0xFF):
            for wide, (k, m) in itertools.product((0, 1), shapes):
                raw, x = random_rows(rng, name, m, k, quants=quants), normal(rng, 1, k, scale=3.0)
                p = (native.TYPE_IDS[name], m, k, wide)
                yield Case(NEURON_ROWS, [raw, x], [dense(name, raw, x, bool(wide))[0]], p)
            for wide, rows in itertools.product((0, 1), (1, 64, 100, 128, 300)):
                raw, h = random_rows(rng, name, rows, 32, quants=quants), normal(rng, 1, 32)
                h[0, rng.random(32) < rng.random()] = 0
                p = (native.TYPE_IDS[name], rows, wide)
                yield Case(NEURON_COLUMNS, [raw, h], [dense(name, raw, h, bool(wide))[0]], p)


def dense(type_name: str, raw: Array, x: npt.NDArray[np.float32], wide: bool) -> npt.NDArray[np.float32]:
    rows, k = len(raw), x.shape[1]
    memory = native.Memory(native.matrix_bytes(type_name, rows, k))
    if native.repack(type_name, raw.reshape(-1), rows, k, memory.address) is not None:
        raise ValueError("weights of a case must be finite")
    out = SCALAR.gemm(type_name, memory.address, rows, k, x, wide=wide)
    memory.close()
    return out


KINDS = (
    quantize_cases,
    gemm_cases,
    vector_cases,
    attention_cases,
    memory_cases,
    neuron_cases,
    elementary_cases,
)


def main(path: Path) -> None:
    rng = np.random.default_rng(20240229)
    with path.open("wb") as file:
        for cases in KINDS:
            for case in cases(rng):
                file.write(case.to_bytes())
