"""What ``pi2rt calibrate`` learned of a pack: which neurons may be inactive at which cost. A file of its own, beside
the pack.

``docs/calibration-format.md`` has the byte layout. Decoding is typed and bounded, as that of a pack's header is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats.model_file import printable
from pi2rt.formats.neuron_order import Order, decode_order
from pi2rt.formats.pack import PackFile
from pi2rt.formats.predictor import PredictorRecord, StoredPredictors
from pi2rt.formats.regular_file import RegularFile
from pi2rt.host.output_file import OutputFile

MAGIC = b"PI2\x00CALI"
VERSION = 1
MAX_BYTES = 1 << 30
DIGEST_BYTES = 32

PREAMBLE = struct.Struct("<8sIIQ32s")
"""Magic, version, flags (0), bytes of the body, digest of all before it and of the body."""

Floats: TypeAlias = npt.NDArray[np.float32]
Method = Literal["cats", "chess"]
Kind = Literal["cats", "chess", "predicted"]
METHODS: tuple[Method, ...] = ("cats", "chess")

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Mean = Annotated[float, msgspec.Meta(ge=0, le=1 << 24)]
_Perplexity = Annotated[float, msgspec.Meta(ge=1, le=1e30)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Thresholds(msgspec.Struct, frozen=True):
    """Of one block by one method. ``values``: float32, little endian, one for all neurons or one for each;
    ``frequency``: as ``BlockCalibration`` has it, of being active with these thresholds."""

    values: bytes
    frequency: bytes


class Reading(msgspec.Struct, frozen=True):
    """What a token's active neurons take to read, means over held-out text: ``pages``; ``reads``, neighbouring pages
    being one; ``through``, with gaps of ``Calibration.gap`` bytes read through, too."""

    pages: _Mean
    reads: _Mean
    through: _Mean


class Readings(msgspec.Struct, frozen=True):
    """With bundles in the ``own`` order of the pack that was calibrated, and ``ordered``; where none is in memory, and
    where the ``half`` of the pages is that are active most."""

    own: Reading
    ordered: Reading
    own_half: Reading
    ordered_half: Reading


class BlockCalibration(msgspec.Struct, frozen=True):
    """A feed-forward block. ``down``: name of its down tensor; ``frequency``: for each neuron, float16, little endian,
    the share of the calibration text's tokens for which its activated gate was not zero; ``order``: that of bundles in
    which neurons that are active together lie together, for ``neuron_order.decode_order``, None where it gains nothing;
    ``readings``: what it is worth; ``tokens`` of the calibration text that it computed, where that is known: of an
    expert those that chose it. Where these are 0, nothing is known, and the rest says only that."""

    layer: _Count
    down: _Name
    neurons: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    frequency: bytes
    thresholds: dict[Method, Thresholds]
    predictor: PredictorRecord | None = None
    order: bytes | None = None
    readings: Readings | None = None
    tokens: _Count | None = None

    def firing(self, method: Method | None = None) -> Floats:
        """Frequencies with thresholds of that method, or exactly: float32 (neurons,)."""
        return _shares(self.frequency if method is None else self.thresholds[method].frequency)

    def resting(self, method: Method) -> float:
        """The share of neurons, over all tokens, that thresholds of that method make inactive."""
        return 1 - float(np.mean(self.firing(method), dtype=np.float64))

    def vector(self, method: Method) -> Floats:
        """The thresholds of that method, one for each neuron: float32 (neurons,)."""
        values = np.frombuffer(self.thresholds[method].values, "<f4").astype(np.float32)
        return np.full(self.neurons, values[0], np.float32) if len(values) == 1 else values


class Cost(msgspec.Struct, frozen=True):
    """What thresholds of one method cost: ``resting``, share of all neurons on the calibration text; ``perplexity``
    of the held-out text with them."""

    resting: _Share
    perplexity: _Perplexity


class Calibration(msgspec.Struct, frozen=True):
    """``source``: ``PackFile.source_digest``; ``wanted``: share of neurons that were to be inactive; ``tokens`` that
    were looked at, ``scored`` tokens of the held-out text, and its ``exact`` perplexity; ``costs``: by method;
    ``method``: the one to use; ``gap``: see ``Reading``."""

    source: _Digest
    wanted: _Share
    tokens: _Count
    scored: _Count
    exact: _Perplexity
    method: Method
    costs: dict[Method, Cost]
    blocks: Annotated[tuple[BlockCalibration, ...], msgspec.Meta(min_length=1, max_length=1 << 17)]
    predicted: Cost | None = None
    gap: _Count = 0

    def orders(self) -> dict[str, Order]:
        """By the name of the down tensor, of the blocks that have one."""
        return {
            block.down: decode_order(block.order, block.neurons)
            for block in self.blocks
            if block.order is not None
        }

    def predictors(self, path: Path, wanted: Iterable[str]) -> StoredPredictors:
        """Those of ``wanted`` down tensors. ``path``: where this was read from just now.

        Raises:
            KeyError: a block has none.
        """
        records = {block.down: block.predictor for block in self.blocks if block.predictor is not None}
        return StoredPredictors(path, {name: records[name] for name in wanted}, PREAMBLE.size)

    def reading(self, which: Literal["own", "ordered", "own_half", "ordered_half"]) -> Reading:
        """Of all blocks together; zeros where none was measured."""
        found = [getattr(block.readings, which) for block in self.blocks if block.readings is not None]
        return Reading(*(sum(getattr(each, name) for each in found) for name in Reading.__struct_fields__))

    def thresholds(self) -> dict[str, Floats]:
        """By the name of the down tensor, of the method to use."""
        return {block.down: block.vector(self.method) for block in self.blocks}

    def does_nothing(self, method: Method) -> bool:
        """Whether its thresholds are all zero: as many neurons as were asked for are inactive without them."""
        return not any(block.vector(method).any() for block in self.blocks)

    def cost(self, kind: Kind) -> Cost:
        """Of thresholds by a method, or of the predictors, if there are any.

        Raises:
            ValueError: there are none.
        """
        if kind != "predicted":
            return self.costs[kind]
        if self.predicted is None:
            raise ValueError("there are no predictors")
        return self.predicted

    def increase(self, kind: Kind) -> float:
        """By how much of itself the perplexity rose on held-out text: 0.06 is 6 %."""
        return self.cost(kind).perplexity / self.exact - 1

    def summary(self, kind: Kind) -> str:
        """One line: what it saves and costs."""
        what = "are not read" if kind == "predicted" else "are inactive"
        return (
            f"{kind}: {self.cost(kind).resting:.0%} of neurons {what}, perplexity {self.increase(kind):+.1%} on "
            f"held-out text"
        )


def calibration_path(pack: Path) -> Path:
    """Where the calibration of a pack is looked for."""
    return pack.with_name(f"{pack.name}.calibration")


def write_calibration(to: Path | OutputFile, calibration: Calibration, *, overwrite: bool = False) -> None:
    """Writes it, whole or not at all. ``overwrite``: whether a file at this path may be replaced.

    Raises:
        RequestError: it is there already, or cannot be written to.
        OutputError: writing failed, such as for a full disk.
    """
    output = to if isinstance(to, OutputFile) else OutputFile(to, overwrite=overwrite)
    body = msgspec.msgpack.encode(calibration)
    head = PREAMBLE.pack(MAGIC, VERSION, 0, len(body), bytes(DIGEST_BYTES))[:-DIGEST_BYTES]
    with output:
        output.write(head + _digest(head, body))
        output.write(body)
        output.commit()


def read_calibration(path: Path, pack: PackFile) -> Calibration:
    """The calibration at ``path``, which goes with ``pack``: every block whose neurons the pack stores is in it.

    Raises:
        ModelNotFoundError: it cannot be opened.
        ModelFormatError: it is malformed, or of another model; the message says what to do.
        UnsupportedModelError: it is of another version.
    """
    calibration = open_calibration(path)
    if calibration.source != pack.source_digest:
        raise ModelFormatError(
            path, "source", f"is another model than that of {pack.path}; calibrate again (pi2rt calibrate)"
        )
    blocks = {block.down: block for block in calibration.blocks}
    for down, bundles in pack.bundles.items():
        neurons = blocks[down].neurons if down in blocks else 0
        if neurons != bundles.neurons:
            raise ModelFormatError(
                path,
                "blocks",
                f"have {neurons} neurons of {printable(down)}, the pack has {bundles.neurons}; calibrate again "
                f"(pi2rt calibrate)",
            )
    return calibration


def open_calibration(path: Path) -> Calibration:
    """The calibration at ``path``, of whatever model. Raises as ``read_calibration`` does."""
    file = RegularFile(path)
    try:
        if file.size < PREAMBLE.size:
            raise ModelFormatError(
                path, "preamble", f"needs {PREAMBLE.size} bytes, but the file ends at {file.size}"
            )
        preamble = bytes(file.read(0, PREAMBLE.size))
        magic, version, flags, length, digest = PREAMBLE.unpack(preamble)
        if magic != MAGIC:
            raise ModelFormatError(path, "magic", f"is {magic!r}, not {MAGIC!r}: this is no calibration")
        if version != VERSION:
            raise UnsupportedModelError(
                path,
                "version",
                f"is {version}; this pi2rt reads calibrations of version {VERSION}: calibrate again",
            )
        if flags:
            raise UnsupportedModelError(path, "flags", f"are {flags:#x}; this pi2rt knows none")
        if length > MAX_BYTES:
            raise ModelFormatError(path, "length", f"is {length} bytes; at most {MAX_BYTES} are allowed")
        if PREAMBLE.size + length != file.size:
            problem = "truncated" if file.size < PREAMBLE.size + length else "longer than it was written"
            raise ModelFormatError(
                path, "length", f"is {file.size} bytes, not {PREAMBLE.size + length}: it is {problem}"
            )
        body = bytes(file.read(PREAMBLE.size, length))
    finally:
        file.close()
    if _digest(preamble[:-DIGEST_BYTES], body) != digest:
        raise ModelFormatError(path, "digest", "does not match: the file is damaged; calibrate again")
    try:
        calibration = msgspec.msgpack.decode(body, type=Calibration)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelFormatError(path, "body", f"is malformed: {printable(str(error))}") from None
    _check(path, calibration)
    return calibration


def _check(path: Path, calibration: Calibration) -> None:
    """Raises ModelFormatError where a record does not go with another."""
    methods = set(calibration.costs)
    if calibration.method not in methods:
        raise ModelFormatError(path, "method", f"{calibration.method} has no costs")
    seen: set[str] = set()
    for block in calibration.blocks:
        field = f"block {printable(block.down)}"
        if block.down in seen:
            raise ModelFormatError(path, field, "is there twice")
        seen.add(block.down)
        _check_shares(path, f"{field}: frequency", block.frequency, block.neurons)
        if set(block.thresholds) != methods:
            raise ModelFormatError(path, f"{field}: thresholds", f"are not those of {_list(methods)}")
        _check_predictor(path, f"{field}: predictor", block)
        if block.order is not None:
            try:
                decode_order(block.order, block.neurons)
            except ValueError as error:
                raise ModelFormatError(path, f"{field}: order", str(error)) from None
        for method, each in block.thresholds.items():
            _check_shares(path, f"{field}: frequency with {method}", each.frequency, block.neurons)
            sizes = (4, 4 * block.neurons)
            if len(each.values) not in sizes or not _within(np.frombuffer(each.values, "<f4"), np.inf):
                raise ModelFormatError(
                    path,
                    f"{field}: thresholds of {method}",
                    f"are not 1 or {block.neurons} finite numbers (float32) of at least 0",
                )


def _check_predictor(path: Path, field: str, block: BlockCalibration) -> None:
    each = block.predictor
    if each is None:
        return
    sizes = [2 * each.rank * each.dim, 2 * block.neurons * each.rank, 4 * block.neurons]
    if [len(each.first), len(each.second), len(each.bias)] != sizes:
        raise ModelFormatError(
            path, field, f"is not of {block.neurons} neurons, rank {each.rank} and width {each.dim}"
        )
    if not all(np.isfinite(values).all() for values in each.predictor.arrays):
        raise ModelFormatError(path, field, "holds NaN or infinity")


def _check_shares(path: Path, field: str, raw: bytes, neurons: int) -> None:
    if len(raw) != 2 * neurons or not _within(_shares(raw), 1):
        raise ModelFormatError(path, field, f"is not {neurons} numbers from 0 to 1 (float16)")


def _shares(raw: bytes) -> Floats:
    return np.frombuffer(raw, "<f2").astype(np.float32)


def _within(values: npt.NDArray[np.floating], most: float) -> bool:
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values <= most).all())


def _list(names: set[Method]) -> str:
    return ", ".join(sorted(names)) or "no method"


def _digest(head: bytes, body: bytes) -> bytes:
    digest = hashlib.blake2b(head, digest_size=DIGEST_BYTES)
    digest.update(body)
    return digest.digest()


def recorded(values: Floats, frequency: Floats) -> Thresholds:
    """Thresholds (float32, one or one for each neuron) and frequencies as a block's record has them."""
    return Thresholds(np.ascontiguousarray(values, "<f4").tobytes(), recorded_shares(frequency))


def recorded_shares(frequency: Floats) -> bytes:
    """Frequencies of being active as records have them."""
    return np.ascontiguousarray(frequency, "<f2").tobytes()
