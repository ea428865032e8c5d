"""The neurons of a pack's feed-forward blocks as one executor holds them: in a cache, with the scales in memory.

All neurons of all blocks share one cache, so that a layer whose neurons are active more gets more of it.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pi2rt._errors import ClosedError, RequestError, UnsupportedModelError
from pi2rt.cython_kernels.flash.neuron_cache import NeuronCache
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.matrices import Bundles
from pi2rt.executors.cpu.weights import PlacedWeights
from pi2rt.executors.flash.page_cache import PageCache
from pi2rt.formats import ModelFile, neuron_bundles, neuron_order
from pi2rt.host.read_errors import read_failure
from pi2rt.models import FeedForward, ModelDescription
from pi2rt.runtime.cluster_unit import cluster_count
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.step import Floats

REFILL_PAGES = 256
"""Pages that are read ahead of what steps ask for while a cache that has grown is filled: a few milliseconds."""

REFILL_PAUSE_S = 0.001

FILL_PAGES = 4096
"""Pages that are read between two reports of progress."""


class NeuronBlocks:
    """The feed-forward blocks of a model whose neurons a pack stores one by one, in the order of their regions.

    Attributes:
        bundles: of each block.
        regions: (offset, bytes of a page, bytes of all) of each.
        heads: of each, bytes of a page that a first phase reads; 0: all.
        layers: names of the layers that they are of.

    Raises:
        UnsupportedModelError: bundles are not of the model.
        RequestError: ``two_phase``, and there is nothing that a second phase could save.
    """

    def __init__(self, file: ModelFile, model: ModelDescription, *, two_phase: bool) -> None:
        numbered = [
            (number, each)
            for number, layer in enumerate(model.layers)
            for block in layer.blocks
            for each in block.feed_forwards()
        ]
        blocks = [block for _, block in numbered]
        for block in blocks:
            bundles = file.bundles.get(block.down.weight)
            gate = None if block.gate is None else block.gate.weight
            if bundles is not None and (
                (bundles.up is None) != (gate is None) or bundles.gate not in (None, gate)
            ):
                raise UnsupportedModelError(
                    file.path,
                    f"bundles {bundles.name}",
                    "do not go with the block; convert the model again",
                )
        self.bundles = [
            file.bundles[block.down.weight] for block in blocks if block.down.weight in file.bundles
        ]
        self.heads = [each.head_bytes if two_phase else 0 for each in self.bundles]
        if two_phase and not any(self.heads):
            size = max(each.page_bytes for each in self.bundles)
            raise RequestError(
                f"{file.path}: two_phase is for bundles with gates that take more than one sector (convert --bundles "
                f"gates); those of this pack have {'no gates' if self.bundles[0].gate is None else f'{size} bytes'}"
            )
        self.layers = tuple(
            f"layer {number}" for number, block in numbered if block.down.weight in file.bundles
        )
        self.regions = [(each.offset, each.page_bytes, each.nbytes) for each in self.bundles]
        self._numbers = {each.down: number for number, each in enumerate(self.bundles)}

    def block(
        self,
        block: FeedForward,
        weights: PlacedWeights,
        thresholds: Floats | None,
        elsewhere: Sequence[int] = (),
    ) -> Bundles:
        """What a program needs to know of one block.

        Args:
            thresholds: float32 (hidden,); see ``ExecutorOptions``.
            elsewhere: clusters that a cluster unit computes.
        """
        bundles = self.bundles[self._numbers[block.down.weight]]
        marks = None
        if elsewhere:
            marks = np.zeros(cluster_count(bundles), np.uint8)
            marks[list(elsewhere)] = 1
        down_type, down_scales = weights.scales[block.down.weight]
        down_group = neuron_bundles.down_scales(down_type, weights.dim)
        up = None
        if block.gate is not None:
            up_type, up_scales = weights.scales[block.up.weight]
            up = (native.TYPE_IDS[up_type], up_scales, neuron_bundles.up_scales(up_type, weights.dim))
        gate = gate_bias = None
        if block.gate is not None and bundles.gate is not None:
            gate_type, gate_scales = weights.scales[block.gate.weight]
            gate = (native.TYPE_IDS[gate_type], gate_scales, neuron_bundles.up_scales(gate_type, weights.dim))
            gate_bias = None if block.gate.bias is None else weights.vectors[block.gate.bias]
        biased = block.up.bias if block.gate is not None else None
        return Bundles(
            self._numbers[block.down.weight],
            up,
            (native.TYPE_IDS[down_type], down_scales, down_group),
            down_plane=down_group // 2,
            neurons=bundles.neurons,
            per_page=bundles.neurons_per_page,
            neuron_bytes=bundles.neuron_bytes,
            up_bytes=bundles.gate_bytes + bundles.up_bytes,
            gate=gate,
            gate_bytes=bundles.gate_bytes,
            gate_bias=gate_bias,
            up_bias=None if biased is None else weights.vectors[biased],
            down_bias=None if block.down.bias is None else weights.vectors[block.down.bias],
            thresholds=thresholds,
            order=None if bundles.order is None else neuron_order.bundle_order(bundles),
            elsewhere=marks,
        )


@dataclass(frozen=True, slots=True)
class CachedNeurons:
    """What a program needs to know of neurons. ``cache``: None, where the program is only measured."""

    blocks: NeuronBlocks
    cache: NeuronCache | None


class Neurons(PageCache):
    """The neuron cache of one model.

    Args:
        file: a pack with bundles; stays open as long as this.
        model: what is in it.
        nbytes: memory for neurons; 0 where all of them stay.
        io: "auto", "uring" or "preadv".
        deadline: seconds; see ``NeuronCache``.
        reads: how many at once.
        two_phase: see ``ExecutorOptions``.

    Raises:
        UnsupportedModelError, RequestError: as ``NeuronBlocks``.
    """

    def __init__(
        self,
        file: ModelFile,
        model: ModelDescription,
        nbytes: int,
        io: str,
        deadline: float | None,
        reads: FlashReads,
        *,
        two_phase: bool = False,
    ) -> None:
        self.blocks = NeuronBlocks(file, model, two_phase=two_phase)
        self.layers = self.blocks.layers
        self._bundles = self.blocks.bundles
        self._lock = threading.Lock()  # of its size, its memory and its end
        self._sizes, self._closed = 0, False
        super().__init__(
            file,
            self.blocks.regions,
            nbytes,
            io=io,
            deadline=deadline,
            depth=reads.neuron_depth,
            heads=self.blocks.heads,
            read_through=reads.neuron_gap,
        )
        self.cached = CachedNeurons(self.blocks, self.cache)

    @property
    def resident(self) -> bool:
        """Whether all neurons have a place."""
        return self.slots == self.pages

    def load(self, report: Callable[[int], None]) -> None:
        """Reads neurons until all slots are used, of each block alike. Blocks: for a worker thread. ``report`` is
        called with the bytes read since; what it raises ends the work.

        Raises:
            OSError: the file cannot be read.
        """
        for number, bundles in enumerate(self._bundles):
            share = bundles.pages * self.slots // self.pages
            for first in range(0, share, FILL_PAGES):
                count = min(FILL_PAGES, share - first)
                self.cache.fill(number, first, count)
                report(count * bundles.page_bytes)

    def resize(self, nbytes: int) -> None:
        """Another size, also while steps run: what no longer fits is given up. Blocks until its memory is free, or
        until ``close``. One call at a time: two would each give up what the other holds.

        Raises:
            ClosedError: closed before or meanwhile.
            OSError: ETIMEDOUT: reads go to that memory, and none has ended for the deadline.
        """
        slots = min(self.pages, nbytes // self.slot_bytes)
        reads, since = -1, 0.0
        while True:
            with self._lock:  # not for longer: closing must not wait for a device that does not answer
                if self._closed:
                    raise ClosedError("the neurons' cache is closed")
                self._sizes += reads < 0
                if self.cache.resize(slots):
                    self._memory.discard(slots * self.slot_bytes, (self.pages - slots) * self.slot_bytes)
                    self.slots = slots
                    return
                ended = self.cache.counters.reads
            now = time.monotonic()
            if ended != reads:
                reads, since = ended, now
            elif self.cache.deadline is not None and now - since > self.cache.deadline:
                raise read_failure("weights", errno.ETIMEDOUT, self.cache.path, self.cache.deadline)

    def refill(self, check: Callable[[], None]) -> None:
        """Reads neurons into slots that have come with another size, those that were used most of late, while steps
        run. Ends early when the size changes again, or when the cache is closed. Blocks: for a worker thread. ``check``
        is called every few milliseconds; what it raises ends the work, and what was read stays."""
        with self._lock:
            size = self._sizes
            if self._closed:
                return
            uses = self.cache.absent()
        place = np.concatenate([np.arange(each.pages) / each.pages for each in self._bundles])
        wanted = np.lexsort((place, -uses))[: np.count_nonzero(uses >= 0)].astype(np.int32)
        for first in range(0, len(wanted), REFILL_PAGES):
            batch = np.sort(wanted[first : first + REFILL_PAGES])  # neighbours are read together
            while True:
                check()
                with self._lock:
                    if self._closed or self._sizes != size:
                        return
                    if not self.cache.waiting:  # steps come first
                        if not self.cache.fetch(batch):
                            return
                        break
                time.sleep(REFILL_PAUSE_S)

    def close(self) -> None:
        """Joins the reader, then frees the memory that it wrote to. Only after the threads that compute have ended."""
        with self._lock:
            self._closed = True
            super().close()
