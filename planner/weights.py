"""Which weights are resident and which are streamed: read from flash in every step.

A dense model uses every weight once per token, in the same order: whatever is not in memory has to be read again
for each step, and which matrices those are changes nothing but the rhythm. So they are spread evenly over the
layers: reading then never pauses for long, and the reads lie under the computing of the layers between. Feed-forward
ones go first; attention follows where these are not enough, and with its small matrices makes up what a large one would
exceed. All pass through a ring in pieces of one read (``pi2rt/models/stream_pieces.py``), so that it holds what is on
its way. An embedding that is not the output head as well goes before all: of it, a step reads one row for each token.

A block whose neurons a pack stores one by one (``formats/neuron_bundles.py``) needs few of them for a token: what its
gate lets through. Gates and scales stay, and the room that is left is a cache of neurons. Where that leaves less than
``FIRST_NEURONS`` of these, matrices are streamed as well: the most active neurons save more reading than other bytes
do, for neurons are read one by one, at a fifth of the speed.

Of a mixture's experts a step needs those that a router chose, so their matrices are not streamed but kept in pages of a
cache. Where experts have neurons of their own beside them (their gates are those matrices then), neurons get the first
``FIRST_NEURONS`` of themselves: the most active ones, of which each byte saves more reading than one of a gate does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pi2rt.cython_kernels.plane.program import CLUSTER
from pi2rt.formats import ModelFile, TensorInfo
from pi2rt.formats.placement import Placement, placed
from pi2rt.formats.row_blocks import ROWS, SECTOR, page_blocks, page_bytes
from pi2rt.models import ModelDescription, iterate_tensors
from pi2rt.models.stream_pieces import cut, matrices_in_order
from pi2rt.runtime.flash_reads import FlashReads

DEFAULT_READS = FlashReads()

LEAST_CLUSTERS = 2
"""The neurons of so many clusters have room at least: one is computed while the next one is read."""

PAGE_RECORDS, SLOT_RECORDS, PIN_RECORDS = 12, 48, 16
"""Bytes that the neuron cache keeps of each page, and of each slot that is used
(``cython_kernels/flash/neuron_cache.h``); and that the kernel keeps of each sector of memory that is pinned for reads
(``pi2_flash_register``)."""

FIRST_NEURONS = 1 / 8
"""Of the synthetic ReLU models as much of the neurons is two thirds of the active ones; the next eighth is a tenth."""


AHEAD_SHARE, LEAST_AHEAD = 12, 2
"""What the ring has room for beside the pieces that are computed: as many reads as may be in flight, but a twelfth of
what a step reads at most, for so many bytes more are read then, and no more than there is room for; two reads at
least."""


@dataclass(frozen=True, slots=True)
class StreamingPlan:
    """``placements``: of the tensors that are not resident; those of neurons are not among them, for ``neuron_bytes``
    says whether any are read. ``ring_bytes``: memory that streamed ones pass through; ``neuron_bytes``: memory for
    neurons that are read when they are active, 0 where all stay; ``expert_bytes``: for expert pages;
    ``resident_bytes``: weights that stay."""

    placements: Mapping[str, Placement] = field(default_factory=dict)
    ring_bytes: int = 0
    resident_bytes: int = 0
    neuron_bytes: int = 0
    expert_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.resident_bytes + self.ring_bytes + self.neuron_bytes + self.expert_bytes

    def placed(self, where: Placement) -> tuple[str, ...]:
        """Names of the tensors that are there, in the order of use."""
        return placed(self.placements, where)


def least_neurons(file: ModelFile) -> int:
    """Bytes that the smallest neuron cache takes."""
    pages = max(-(-CLUSTER // each.neurons_per_page) + 1 for each in file.bundles.values())
    return LEAST_CLUSTERS * pages * _slot_bytes(file)


def all_neurons(file: ModelFile) -> int:
    """Bytes of all neurons in a cache."""
    return _neuron_pages(file) * _slot_bytes(file)


def with_records(file: ModelFile, neuron_bytes: int) -> int:
    """What so many bytes of neurons take with the records of their slots."""
    slot = _slot_bytes(file)
    return neuron_bytes + (neuron_bytes // slot * _slot_records(slot) if slot else 0)


def without_records(file: ModelFile, room: int) -> int:
    """The most bytes of neurons that take ``room`` with the records of their slots."""
    slot = _slot_bytes(file)
    return max(0, room) // (slot + _slot_records(slot)) * slot


def _slot_records(slot: int) -> int:
    return SLOT_RECORDS + slot // SECTOR * PIN_RECORDS


def _slot_bytes(file: ModelFile) -> int:
    return max((each.page_bytes for each in file.bundles.values()), default=0)


def _neuron_pages(file: ModelFile) -> int:
    return sum(each.pages for each in file.bundles.values())


def _page_records(file: ModelFile) -> int:
    return PAGE_RECORDS * _neuron_pages(file)


def expert_operations(
    file: ModelFile, model: ModelDescription, *, as_pack: bool = False
) -> Iterator[tuple[TensorInfo, ...]]:
    """The matrices that one operation of an expert uses together, of those that lie in row blocks. None of shared
    experts, which every token uses."""
    for layer in model.layers:
        for block in layer.blocks:
            for operation in block.routed_operations():
                infos = map(file.tensors.__getitem__, operation.matrices)
                yield tuple(info for info in infos if as_pack or info.layout == "blocks16")


def _pages(info: TensorInfo) -> int:
    rows, columns = info.shape
    blocks = -(-rows // ROWS)
    return -(-blocks // page_blocks(info.type, rows, columns))


def least_experts(operations: Sequence[tuple[TensorInfo, ...]]) -> int:
    """Bytes of the pages that the largest of these operations uses together."""
    slot = max(page_bytes(info.type, *info.shape) for operation in operations for info in operation)
    return max(sum(map(_pages, operation)) for operation in operations) * slot


def plan_streaming(
    file: ModelFile,
    model: ModelDescription,
    room: int,
    cache: int | None = None,
    *,
    reads: FlashReads = DEFAULT_READS,
    as_pack: bool = False,
) -> StreamingPlan:
    """Divides the weights so that those in memory and the ring take ``room`` bytes at most; or as few as can be,
    with every layer streamed, where not even that is enough. Where the file's matrices do not lie as they are used,
    none can be streamed (``pi2rt convert`` makes a pack, where they do).

    Args:
        cache: bytes for neurons at most; None: all that is left.
        reads: how much of what is streamed is read at once.
        as_pack: what could be done if the file were a pack without bundles.
    """
    experts = [infos for infos in expert_operations(file, model, as_pack=as_pack) if infos]
    if not file.bundles:
        plan = _plan_matrices(file, model, room, reads, as_pack=as_pack)
        if experts and plan.nbytes > room:
            return _plan_experts(file, model, room, cache, experts, reads, as_pack=as_pack)
        return plan
    total, neurons = sum(file.tensors[name].nbytes for name, _ in iterate_tensors(model)), all_neurons(file)
    everything = total + with_records(file, neurons) + _page_records(file)
    if everything <= room and (cache is None or cache >= neurons):
        return StreamingPlan(resident_bytes=everything)
    least = least_neurons(file)
    records = _page_records(file)
    first = max(least, int(min(neurons * FIRST_NEURONS, neurons if cache is None else cache)))
    plan = _plan_matrices(file, model, room - with_records(file, first) - records, reads, spare=True)
    left = without_records(file, room - records - plan.nbytes)
    if experts and plan.placed(Placement.STREAMED):
        return _plan_experts(file, model, room, cache, experts, reads)
    left = max(least, left)
    if cache is not None:
        left = max(least, min(left, cache))
    records += with_records(file, left) - left
    return replace(plan, resident_bytes=plan.resident_bytes + records, neuron_bytes=left // SECTOR * SECTOR)


def _plan_experts(
    file: ModelFile,
    model: ModelDescription,
    room: int,
    cache: int | None,
    operations: list[tuple[TensorInfo, ...]],
    reads: FlashReads,
    *,
    as_pack: bool = False,
) -> StreamingPlan:
    """With experts in pages, and neurons where the file has them."""
    infos = [info for operation in operations for info in operation]
    slot = max(page_bytes(info.type, *info.shape) for info in infos)
    least = least_experts(operations)
    records = (PAGE_RECORDS + _slot_records(slot)) * sum(map(_pages, infos)) + _page_records(file)
    least_of_neurons = least_neurons(file) if file.bundles else 0
    most = max(least_of_neurons, int(all_neurons(file) * FIRST_NEURONS))
    records += with_records(file, most) - most
    absent = sum(info.nbytes for info in infos)
    room_of_rest = room - least - least_of_neurons - records
    plan = _plan_matrices(file, model, room_of_rest, reads, spare=True, as_pack=as_pack, absent=absent)
    left = room - records - plan.nbytes
    neurons = int(min(most, left / 2))
    neurons = max(least_of_neurons, min(neurons, left if cache is None else cache)) // SECTOR * SECTOR
    return replace(
        plan,
        resident_bytes=plan.resident_bytes + records,
        neuron_bytes=neurons,
        placements={**plan.placements, **{info.name: Placement.PAGED for info in infos}},
        expert_bytes=max(least, left - neurons) // slot * slot,
    )


def _plan_matrices(
    file: ModelFile,
    model: ModelDescription,
    room: int,
    reads: FlashReads,
    *,
    spare: bool = False,
    as_pack: bool = False,
    absent: int = 0,
) -> StreamingPlan:
    """Without neurons. ``spare``: memory is short even where these matrices fit, so rows of the embedding are read one
    by one. ``absent``: bytes of matrices that have a place elsewhere."""
    total = sum(file.tensors[name].nbytes for name, _ in iterate_tensors(model)) - absent
    order = [info for name, _ in matrices_in_order(model) if (info := file.tensors[name]).layout != "neurons"]
    streamable = as_pack or all(info.layout == "blocks16" for info in order)
    if (total <= room and not spare) or not streamable:
        return StreamingPlan(resident_bytes=total)
    by_row: dict[str, Placement] = {}
    if model.embedding != model.head.weight:  # a step needs one row of it for each token
        by_row[model.embedding] = Placement.BY_ROW
        total -= file.tensors[model.embedding].nbytes
    if total <= room:
        return StreamingPlan(by_row, resident_bytes=total)
    pieces = cut(file, model, [info.name for info in order], reads.stream_bytes)
    left = room - pieces.ring - (total - sum(info.nbytes for info in order))  # where all of them are streamed
    ahead = min((total - room) // AHEAD_SHARE, left) // reads.stream_bytes
    ring = pieces.ring + reads.stream_bytes * min(reads.stream_depth, max(LEAST_AHEAD, ahead))
    ring = max(pieces.ring, min(ring, sum(piece.bytes for piece in pieces.pieces)))
    chosen = _choose(
        order, {name for name, feed_forward in matrices_in_order(model) if feed_forward}, total + ring - room
    )
    streamed = [info for info in order if info.name in chosen]
    return StreamingPlan(
        by_row | {info.name: Placement.STREAMED for info in streamed},
        ring,
        total - sum(info.nbytes for info in streamed),
    )


def _choose(order: Sequence[TensorInfo], feed_forward: Collection[str], missing: int) -> set[str]:
    """Names of matrices of ``missing`` bytes, or all: feed-forward ones before others, spread over the layers, and of
    what is still left those that exceed it by the least."""
    chosen: set[str] = set()
    for infos in (
        [info for info in order if info.name in feed_forward],
        [info for info in order if info.name not in feed_forward],
    ):
        found = _spread(infos, missing)
        chosen |= {info.name for info in found}
        missing -= sum(info.nbytes for info in found)
        if len(found) < len(infos):
            break
    left = sorted((info for info in order if info.name not in chosen), key=lambda info: info.nbytes)
    while missing > 0 and left:
        smaller = [info for info in left if info.nbytes <= missing]
        info = smaller[-1] if smaller else left[0]
        left.remove(info)
        chosen.add(info.name)
        missing -= info.nbytes
    return chosen


def _spread(infos: Sequence[TensorInfo], most: int) -> list[TensorInfo]:
    """Evenly over the list, so much of it that there are at most so many bytes."""
    total = sum(info.nbytes for info in infos)
    if most >= total:
        return list(infos)
    chosen: list[TensorInfo] = []
    due = taken = 0
    for info in infos:
        due += info.nbytes
        if due * most >= (taken + info.nbytes) * total:
            chosen.append(info)
            taken += info.nbytes
    return chosen
