"""The pieces in which matrices are read that are not in memory, in the order in which a step computes with them.

A piece is about as much as one read takes. Threads compute with it as soon as it is there, and what it lay in is free
for others then: so the memory that streamed matrices pass through holds what is on its way, and not whole matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pi2rt.formats import ModelFile, TensorInfo
from pi2rt.formats.neuron_order import CLUSTER
from pi2rt.formats.row_blocks import ROWS, SECTOR, row_block_bytes
from pi2rt.models.blocks import Operation
from pi2rt.models.description import ModelDescription

TILE_BLOCKS = 16
"""Row blocks of which larger pieces are a multiple, and of which smaller ones have a half, a fourth or an eighth: so a
tile of a product with many rows lies in one piece (``cython_kernels/plane/ops_streamed.c``)."""


def operations_in_order(model: ModelDescription) -> Iterator[Operation]:
    """In the order in which a step runs them, without the output head."""
    for layer in model.layers:
        for block in layer.blocks:
            yield from block.operations()


def matrices_in_order(model: ModelDescription) -> Iterator[tuple[str, bool]]:
    """(name, whether of a feed-forward block) of each layer's matrices, in the order in which a step uses
    them."""
    for each in operations_in_order(model):
        yield from ((name, each.feed_forward) for name in each.matrices)


@dataclass(frozen=True, slots=True)
class Piece:
    """``bytes`` at ``offset`` of the file, both whole sectors, of which the first ``skip`` belong to something else."""

    matrix: str
    offset: int
    bytes: int
    skip: int


@dataclass(frozen=True, slots=True)
class StreamedMatrix:
    """Its pieces are ``first``, ``first + stride`` and so on, each of ``blocks`` row blocks but for the last."""

    first: int
    stride: int
    blocks: int


@dataclass(frozen=True, slots=True)
class StreamPieces:
    """``together``: bytes of those that have to be in memory at the same time, at most; ``ring``: of the smallest
    memory in which they can follow each other in a circle: before its end is a gap where the next one did not fit."""

    pieces: tuple[Piece, ...]
    matrices: dict[str, StreamedMatrix]
    together: int

    @property
    def ring(self) -> int:
        return self.together + max((piece.bytes for piece in self.pieces), default=0)


def cut(
    file: ModelFile, model: ModelDescription, streamed: Collection[str], piece_bytes: int
) -> StreamPieces:
    """Pieces of at most ``piece_bytes``, or of two row blocks where these are more, for activations of the rows of
    two are integers that belong together. Those of up and gate take turns: they are used together."""
    pieces: list[Piece] = []
    matrices: dict[str, StreamedMatrix] = {}
    together = 0
    for operation in operations_in_order(model):
        infos = [file.tensors[name] for name in operation.matrices if name in streamed]
        if not infos:
            continue
        first = len(pieces)
        if operation.feed_forward and len(infos) > 1:
            blocks = min(_blocks(info, piece_bytes) for info in infos)
            for turn in itertools.zip_longest(*(_pieces(info, blocks) for info in infos)):
                pieces.extend(turn)
            for i, info in enumerate(infos):
                matrices[info.name] = StreamedMatrix(first + i, len(infos), blocks)
            at_once = len(infos)
        else:
            at_once = min(2, len(operation.matrices))  # of a tile that begins in q, and ends in k
            for info in infos:
                blocks = _blocks(info, piece_bytes)
                matrices[info.name] = StreamedMatrix(len(pieces), 1, blocks)
                pieces.extend(_pieces(info, blocks))
                if operation.down in file.bundles:
                    at_once = -(-CLUSTER // ROWS // blocks) + 1  # wherever the cluster begins
        together = max(together, at_once * max(piece.bytes for piece in pieces[first:]))
    return StreamPieces(tuple(pieces), matrices, together)


def _blocks(info: TensorInfo, piece_bytes: int) -> int:
    """Row blocks of a piece of this matrix."""
    rows, columns = info.shape
    most = max(2, (piece_bytes - 2 * SECTOR) // row_block_bytes(info.type, columns))
    step = min(TILE_BLOCKS, 1 << most.bit_length() - 1)
    return min(most // step * step, -(-rows // ROWS))


def _pieces(info: TensorInfo, blocks: int) -> Iterator[Piece]:
    rows, columns = info.shape
    size, total = row_block_bytes(info.type, columns), -(-rows // ROWS)
    for block in range(0, total, blocks):
        begin, end = info.offset + block * size, info.offset + min(block + blocks, total) * size
        offset = begin // SECTOR * SECTOR
        yield Piece(info.name, offset, -(-(end - offset) // SECTOR) * SECTOR, begin - offset)
