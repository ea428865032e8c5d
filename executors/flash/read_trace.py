"""How reads of a cache are drawn in a trace: hundreds may be in flight at once, so they are not drawn one by one.

What is read for one block without a longer pause becomes one span, a *batch*, with the counts as its arguments: on
the lane "neurons" where the block asked for it, on "neurons ahead" where it was foreseen from the block before.
Batches that overlap get another lane of that name. Beside them a curve shows how many reads are in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pi2rt.runtime.trace import Nanoseconds, Trace

PAUSE_NS = 100_000
"""A pause of so long ends a batch."""

SAMPLE_NS = 100_000
"""The curve has one value for so long, the largest; and one more where it falls to nothing."""

SAMPLE_READS = 4
"""The curve is rounded up to multiples of it, so that it is a line where flash is kept busy."""


class ReadTrace:
    """Draws what ``NeuronCache.take_reads`` gives.

    Args:
        trace: where to.
        process: name of the actor that reads.
        blocks: a name for each region of the cache (``"layer 3"``).
        what: is read: "neurons" or "experts".
    """

    def __init__(self, trace: Trace, process: str, blocks: Sequence[str], what: str = "neurons") -> None:
        self._trace, self._process, self._blocks, self._what = trace, process, blocks, what
        self._lanes: dict[str, list[int]] = {}  # by name: where the last batch of each ended
        self._changes = np.empty((0, 2), np.int64)  # (nanoseconds, +1 or -1) that the curve does not show yet
        self._in_flight = self._shown = 0

    def draw(self, reads: npt.NDArray[np.void], horizon: int) -> None:
        """``reads``: of ``neuron_cache.RECORD``; all that began before ``horizon`` have been given by now."""
        for name, chosen in (
            (self._what, reads[reads["foreseen"] == 0]),
            (f"{self._what} ahead", reads[reads["foreseen"] > 0]),
        ):
            for batch in sorted(_batches(chosen), key=lambda batch: int(batch["begin"][0])):
                self._draw_batch(batch, name)
        self._draw_curve(reads, horizon)

    def _draw_batch(self, batch: npt.NDArray[np.void], lane: str) -> None:
        begin, end = int(batch["begin"][0]), int(batch["end"].max())
        microseconds = (batch["end"] - batch["begin"]) / 1000
        self._trace.track(self._process, self._lane(lane, begin, end)).span(
            f"{self._blocks[batch['region'][0]]} {self._what}",
            begin,
            end,
            reads=len(batch),
            pages=int(batch["pages"].sum()),
            foreseen=int(batch["foreseen"].sum()),
            median_us=round(float(np.median(microseconds)), 1),
            longest_us=round(float(microseconds.max()), 1),
        )

    def _lane(self, name: str, begin: int, end: int) -> str:
        lanes = self._lanes.setdefault(name, [])
        number = next((i for i, free in enumerate(lanes) if free <= begin), len(lanes))
        lanes[number:] = [end, *lanes[number + 1 :]]
        return name if number == 0 else f"{name} {number + 1}"

    def _draw_curve(self, reads: npt.NDArray[np.void], horizon: int) -> None:
        ups, downs = reads["begin"], reads["end"]
        new = np.stack([np.r_[ups, downs], np.repeat([1, -1], len(reads))], axis=1).astype(np.int64)
        changes = np.concatenate([self._changes, new])
        changes = changes[np.lexsort((-changes[:, 1], changes[:, 0]))]
        known = int(np.searchsorted(changes[:, 0], horizon // SAMPLE_NS * SAMPLE_NS))  # whole samples
        self._changes = changes[known:]
        if not known:
            return
        times: Nanoseconds = changes[:known, 0]
        values = self._in_flight + np.cumsum(changes[:known, 1])
        sample = times // SAMPLE_NS
        starts = np.flatnonzero(np.r_[True, sample[1:] != sample[:-1]])
        lasts = np.r_[starts[1:], known] - 1
        for first, last, most in zip(
            starts.tolist(), lasts.tolist(), np.maximum.reduceat(values, starts).tolist(), strict=True
        ):
            self._show(int(times[first]), -(-most // SAMPLE_READS) * SAMPLE_READS)
            if not values[last]:  # that there are none any more must not be lost in a maximum
                self._show(int(times[last]), 0)
        self._in_flight = int(values[-1])

    def _show(self, ns: int, value: int) -> None:
        if value != self._shown:
            self._trace.counter(f"reads of {self._what} in flight", ns, value, self._process)
            self._shown = value


def _batches(reads: npt.NDArray[np.void]) -> Iterator[npt.NDArray[np.void]]:
    """Cuts reads by region, and where there is a pause; each batch in the order of its beginnings."""
    for region in np.unique(reads["region"]):
        mine = reads[reads["region"] == region]
        mine = mine[np.argsort(mine["begin"], kind="stable")]
        pauses = mine["begin"][1:] > np.maximum.accumulate(mine["end"])[:-1] + PAUSE_NS
        yield from np.split(mine, np.flatnonzero(pauses) + 1)
