"""Tensors of synthetic models, each filled from any byte on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from synthetic_noise import Noise

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Words: TypeAlias = npt.NDArray[np.uint16]

BLOCK = 32
"""Values of a Q4_0 block."""
BLOCK_BYTES = (
    18  # f16 scale d; 16 bytes: value j in the low four bits of byte j, value j + 16 in the high ones
)
NIBBLE_ENERGY = 21.5
"""Mean square of a random value of a block over its scale: whole numbers from -8 to 7, all as likely."""

_PIECE_BLOCKS = 8192  # filled at once: what L2 holds
_PIECE_ROWS = 32


class Tensor(Protocol):
    """Something that knows its bytes. ``type``: Q4_0 or F32; ``shape``: rows first."""

    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def fill(self, start: int, out: Bytes) -> None:
        """Writes the bytes from ``start`` on to ``out``, uint8, which end inside the tensor. Thread-safe."""


def half_bits(values: npt.NDArray[np.float64]) -> Words:
    """The bits of float16 numbers."""
    return values.astype("<f2").view("<u2")


@dataclass(frozen=True, slots=True)
class Constant:
    """A vector of one float32 value."""

    value: float
    length: int
    type: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,)

    def fill(self, start: int, out: Bytes) -> None:
        pattern = np.frombuffer(np.float32(self.value).astype("<f4").tobytes(), np.uint8)
        out[:] = np.resize(np.roll(pattern, -(start % 4)), len(out))


@dataclass(frozen=True, slots=True)
class Uniform:
    """A float32 matrix of values uniform about zero with standard deviation ``spread``; the first ``BLOCK`` columns are
    zero."""

    noise: Noise
    shape: tuple[int, ...]
    spread: float
    type: str = "F32"

    def fill(self, start: int, out: Bytes) -> None:
        columns = self.shape[-1]
        first, end = start // 4, -(-(start + len(out)) // 4)
        values = uniform(self.noise.bytes(first, end - first)) * np.float32(self.spread)
        values[np.arange(first, end) % columns < BLOCK] = 0
        out[:] = values.astype("<f4").view(np.uint8)[start - 4 * first :][: len(out)]


@dataclass(frozen=True, slots=True)
class RandomBlocks:
    """One or more Q4_0 matrices of random nibbles. All scales have the magnitude ``scale``, and random signs, which
    makes values symmetric about zero. Scales are 0 in the first ``BLOCK`` rows of every matrix where ``zero_rows``, and
    in the first block of every row where ``zero_columns``. With ``first_scales`` (bits of float16, one for each row of
    all matrices) the values of that block are all -8 times this scale instead.
    """

    noise: Noise
    shape: tuple[int, ...]
    scale: float
    zero_rows: bool = False
    zero_columns: bool = False
    first_scales: Words | None = None
    type: str = "Q4_0"

    def fill(self, start: int, out: Bytes) -> None:
        first, end = start // BLOCK_BYTES, -(-(start + len(out)) // BLOCK_BYTES)
        if (end - first) * BLOCK_BYTES == len(out):
            blocks = out.view("<u2").reshape(-1, BLOCK_BYTES // 2)
        else:
            blocks = np.empty((end - first, BLOCK_BYTES // 2), "<u2")
        for at in range(0, len(blocks), _PIECE_BLOCKS):
            self._fill_blocks(first + at, blocks[at : at + _PIECE_BLOCKS])
        if not np.shares_memory(blocks, out):
            out[:] = blocks.view(np.uint8).reshape(-1)[start - first * BLOCK_BYTES :][: len(out)]

    def _fill_blocks(self, first: int, out: Words) -> None:
        """``out``: (blocks, 9), from block ``first`` on."""
        self.noise.fill(first * (BLOCK_BYTES // 2), out.reshape(-1))
        scales = out[:, 0]
        scales &= np.uint16(0x8000)
        scales |= half_bits(np.array([self.scale]))[0]
        per_row = self.shape[-1] // BLOCK
        if self.zero_columns or self.first_scales is not None:
            leading = out[-first % per_row :: per_row]
            leading[:, 0] = 0
            if self.first_scales is not None:
                row = -(-first // per_row)
                leading[:, 0] = self.first_scales[row : row + len(leading)]
                leading[:, 1:] = 0
        if self.zero_rows:
            matrix = self.shape[-2] * per_row
            for begin in range(first // matrix * matrix, first + len(out), matrix):
                scales[max(0, begin - first) : max(0, begin - first + BLOCK * per_row)] = 0


@dataclass(frozen=True, slots=True)
class TopicRows:
    """A Q4_0 matrix with a row for each token: ``topic_weight`` times the vector of its topic plus ``own_weight`` times
    a random one, both of variance 1. Topics are ranges of tokens of about equal length.

    ``leading``: the block that every row starts with, as bytes; ``special``: that of the first ``specials`` rows.
    """

    noise: Noise
    shape: tuple[int, int]
    topics: Floats  # (topics, columns - BLOCK)
    topic_weight: float
    own_weight: float
    leading: Bytes
    special: Bytes
    specials: int
    type: str = "Q4_0"

    def fill(self, start: int, out: Bytes) -> None:
        row_bytes = self.shape[1] // BLOCK * BLOCK_BYTES
        end = start + len(out)
        for row in range(start // row_bytes, -(-end // row_bytes), _PIECE_ROWS):
            raw = self._rows(row, min(row + _PIECE_ROWS, self.shape[0])).reshape(-1)
            base = row * row_bytes
            begin, stop = max(start, base), min(end, base + len(raw))
            out[begin - start : stop - start] = raw[begin - base : stop - base]

    def _rows(self, first: int, end: int) -> Bytes:
        rows, columns = end - first, self.shape[1]
        topics = topic_of(np.arange(first, end), self.shape[0], len(self.topics))
        # The largest value takes all of the range, so nothing is cut off.
        scale = np.float16(3**0.5 * (abs(self.topic_weight) + abs(self.own_weight)) / 7.5)
        own = uniform(self.noise.bytes(first * columns, rows * columns)).reshape(rows, columns)[:, BLOCK:]
        own *= np.float32(self.own_weight / float(scale))
        own += self.topics[topics] * np.float32(self.topic_weight / float(scale))
        own += np.float32(8.5)
        nibbles = np.clip(own, 0, 15).astype(np.uint8).reshape(rows, -1, 2, BLOCK // 2)
        raw = np.empty((rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
        raw[:, :, :2] = np.frombuffer(scale.astype("<f2").tobytes(), np.uint8)
        raw[:, 1:, 2:] = nibbles[:, :, 0] | nibbles[:, :, 1] << np.uint8(4)
        raw[:, 0] = self.leading
        raw[: max(0, self.specials - first), 0] = self.special
        return raw.reshape(rows, -1)


def constant_block(value: float) -> Bytes:
    """A block of 32 times (about) ``value``."""
    raw = np.zeros(BLOCK_BYTES, np.uint8)  # nibbles 0 are -8
    raw[:2] = half_bits(np.array([value / -8])).view(np.uint8)
    return raw


def uniform(raw: Bytes) -> Floats:
    """Random bytes as float32 numbers of mean 0 and variance 1."""
    values = raw.astype(np.float32)
    values -= np.float32(127.5)
    values *= np.float32(1 / (65535 / 12) ** 0.5)
    return values


def topic_of(tokens: npt.NDArray[np.int64], vocab: int, topics: int) -> npt.NDArray[np.int64]:
    """The topic of each token, in [0, topics)."""
    return tokens * topics // vocab
