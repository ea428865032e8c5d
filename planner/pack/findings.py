"""What ``convert`` takes from a calibration: where bundles lie, and which blocks are not worth storing by neuron."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pi2rt._errors import RequestError
from pi2rt.formats.calibration import open_calibration
from pi2rt.formats.neuron_order import Order
from pi2rt.host.topology import read_topology
from pi2rt.planner.measure.crossover import crossover
from pi2rt.planner.pack.bundling import Bundled


@dataclass(frozen=True, slots=True)
class Dense:
    """A block whose matrices stay whole: of the neurons of ``down`` the share ``firing`` is active, more than
    ``above``."""

    down: str
    firing: float
    above: float


@dataclass(frozen=True, slots=True)
class Findings:
    """By the names of down tensors: ``orders`` of bundles, and ``firing``, the shares of active neurons.
    ``dense_above``: see ``convert``. ``source``: ``PackFile.source_digest`` of the model they are of, where that is
    known; ``name``: for messages."""

    orders: Mapping[str, Order] = field(default_factory=dict)
    firing: Mapping[str, float] = field(default_factory=dict)
    dense_above: float | None = None
    source: bytes | None = None
    name: str = "order"

    @classmethod
    def of(cls, path: str | os.PathLike[str], dense_above: float | None) -> Self:
        """Of a calibration file.

        Raises:
            RequestError: ``dense_above`` is not a share.
            Others: as ``open_calibration``.
        """
        if dense_above is not None and not 0 < dense_above < 1:
            raise RequestError(f"dense_above={dense_above!r}: a share above 0 and below 1 is needed")
        found = open_calibration(Path(path))
        firing = {block.down: float(block.firing().mean()) for block in found.blocks if block.tokens != 0}
        return cls(found.orders(), firing, dense_above, found.source, os.fspath(path))

    def dense(self, blocks: Iterable[Bundled]) -> Iterator[Dense]:
        """Those of the blocks whose neurons are active too often to be computed one by one."""
        measured: dict[tuple[str | None, str, tuple[int, ...]], float] = {}
        for each in blocks:
            firing = self.firing.get(each.down.name)
            if firing is None or not each.rests:
                continue
            above = self.dense_above
            if above is None:
                up_type = None if each.up is None else each.up.type
                shape = (up_type, each.down.type, each.down.shape)
                if shape not in measured:
                    measured[shape] = crossover(
                        up_type, each.down.type, each.down.shape[0], each.bundles, len(read_topology().cores)
                    )
                above = measured[shape]
            if firing > above:
                yield Dense(each.down.name, firing, above)

    def refuse(self, problem: str) -> RequestError:
        return RequestError(f"{self.name}: {problem}")
