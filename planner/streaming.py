"""Which weights stay in memory and which are read from flash in every step.

A dense model uses every weight once per token, in the same order: whatever is not in memory has to be read again
for each step, and which matrices those are changes nothing but the rhythm. So they are spread evenly over the
layers: reading then never pauses for long, and the reads lie under the computing of the layers between. Those that
make the ring smallest go first: one of each feed-forward operation, and the small ones; attention follows where that is
not enough. An embedding that is
not the output head as well goes before all: of it, a step reads one row for each token.

A block whose neurons a pack stores one by one (``formats/neuron_bundles.py``) needs few of them for a token: what its
gate lets through. Gates and scales stay, and the room that is left is a cache of neurons. Where that leaves less than
``FIRST_NEURONS`` of these, matrices are streamed as well: the neurons that fire most save more reading than other bytes
do, for neurons are read one by one, at a fifth of the speed.

Of a mixture's experts a step needs those that a router chose, so their matrices are not streamed but kept in pages of a
cache. Where experts have neurons of their own beside them (their gates are those matrices then), neurons get the first
``FIRST_NEURONS`` of themselves: those that fire most, of which each byte saves more reading than one of a gate does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from pi2rt.cython_kernels.program import CLUSTER
from pi2rt.formats import ModelFile, TensorInfo
from pi2rt.formats.row_blocks import ROWS, page_blocks, page_bytes
from pi2rt.models import Attention, FeedForward, MixtureOfExperts, ModelDescription, iterate_tensors

SECTOR = 4096
"""Reads and the places in the ring are whole sectors."""

LEAST_CLUSTERS = 2
"""The neurons of so many clusters have room at least: one is computed while the next one is read."""

PAGE_RECORDS, SLOT_RECORDS, PIN_RECORDS = 12, 48, 16
"""Bytes that the neuron cache keeps of each page, and of each slot that is used (``cython_kernels/neuron_cache.h``);
and that the kernel keeps of each sector of memory that is pinned for reads (``pi2_flash_register``)."""

FIRST_NEURONS = 1 / 8
"""Of the synthetic ReLU models as much of the neurons is two thirds of what fires; the next eighth is another tenth."""

AHEAD_UNITS = 1
"""Matrices of the largest size for which the ring has room beside those of one operation and a gap at its end: what
is on its way while that operation computes."""


@dataclass(frozen=True, slots=True)
class StreamingPlan:
    """``streamed``: names of the matrices that are read in every step, () where all weights stay;
    ``read_by_row``: the embedding, where its rows are read one by one; ``ring_bytes``: memory that the streamed
    pass through; ``neuron_bytes``: memory for neurons that are read when they fire, 0 where all stay;
    ``paged``: experts' matrices that are read when they are chosen, into memory of ``cluster_bytes``;
    ``resident_bytes``: weights that stay."""

    streamed: tuple[str, ...] = ()
    read_by_row: str | None = None
    ring_bytes: int = 0
    resident_bytes: int = 0
    neuron_bytes: int = 0
    paged: tuple[str, ...] = ()
    cluster_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.resident_bytes + self.ring_bytes + self.neuron_bytes + self.cluster_bytes


def operations_in_order(model: ModelDescription) -> Iterator[tuple[tuple[str, ...], bool]]:
    """(names, whether of a feed-forward block) of the matrices that one operation of a step uses together, in the
    order in which a step runs them, without the output head."""
    for layer in model.layers:
        for block in layer.blocks:
            if isinstance(block, Attention):
                yield (block.q.weight, block.k.weight, block.v.weight), False
                yield (block.out.weight,), False
            elif isinstance(block, FeedForward):
                yield tuple(each.weight for each in (block.up, block.gate) if each is not None), True
                yield (block.down.weight,), True


def matrices_in_order(model: ModelDescription) -> Iterator[tuple[str, bool]]:
    """(name, whether of a feed-forward block) of each layer's matrices, in the order in which a step uses
    them."""
    for names, feed_forward in operations_in_order(model):
        yield from ((name, feed_forward) for name in names)


def least_ring(file: ModelFile, streamed: Collection[str], model: ModelDescription) -> int:
    """Bytes of the smallest ring through which these matrices can pass: those of any operation together, and a gap
    before the end where the largest did not fit, which matrices of one size never leave."""
    size = {name: _sectors(file.tensors[name].nbytes) for name in streamed}
    together = max(sum(size.get(name, 0) for name in names) for names, _ in operations_in_order(model))
    return together + (max(size.values()) if len(set(size.values())) > 1 else 0)


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
            if isinstance(block, MixtureOfExperts):
                for each in map(block.expert, range(block.n_experts)):
                    for linears in ((each.up, each.gate), (each.down,)):
                        infos = (file.tensors[linear.weight] for linear in linears if linear is not None)
                        yield tuple(info for info in infos if as_pack or info.layout == "blocks16")


def _pages(info: TensorInfo) -> int:
    rows, columns = info.shape
    blocks = -(-rows // ROWS)
    return -(-blocks // page_blocks(info.type, rows, columns))


def plan_streaming(
    file: ModelFile, model: ModelDescription, room: int, cache: int | None = None, *, as_pack: bool = False
) -> StreamingPlan:
    """Divides the weights so that those in memory and the ring take ``room`` bytes at most; or as few as can be,
    with every layer streamed, where not even that is enough. Where the file's matrices do not lie as they are used,
    none can be streamed (``pi2rt convert`` makes a pack, where they do).

    Args:
        cache: bytes for neurons at most; None: all that is left.
        as_pack: what could be done if the file were a pack without bundles.
    """
    experts = [infos for infos in expert_operations(file, model, as_pack=as_pack) if infos]
    if not file.bundles:
        plan = _plan_matrices(file, model, room, as_pack=as_pack)
        if experts and plan.nbytes > room:
            return _plan_experts(file, model, room, cache, experts, as_pack=as_pack)
        return plan
    total, neurons = sum(file.tensors[name].nbytes for name, _ in iterate_tensors(model)), all_neurons(file)
    everything = total + with_records(file, neurons) + _page_records(file)
    if everything <= room and (cache is None or cache >= neurons):
        return StreamingPlan(resident_bytes=everything)
    least = least_neurons(file)
    records = _page_records(file)
    first = max(least, int(min(neurons * FIRST_NEURONS, neurons if cache is None else cache)))
    plan = _plan_matrices(file, model, room - with_records(file, first) - records, spare=True)
    left = without_records(file, room - records - plan.nbytes)
    if experts and plan.streamed:
        return _plan_experts(file, model, room, cache, experts)
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
    *,
    as_pack: bool = False,
) -> StreamingPlan:
    """With experts in pages, and neurons where the file has them."""
    infos = [info for operation in operations for info in operation]
    slot = max(page_bytes(info.type, *info.shape) for info in infos)
    least = max(sum(map(_pages, operation)) for operation in operations) * slot
    records = (PAGE_RECORDS + _slot_records(slot)) * sum(map(_pages, infos)) + _page_records(file)
    least_of_neurons = least_neurons(file) if file.bundles else 0
    most = max(least_of_neurons, int(all_neurons(file) * FIRST_NEURONS))
    records += with_records(file, most) - most
    absent = sum(info.nbytes for info in infos)
    room_of_rest = room - least - least_of_neurons - records
    plan = _plan_matrices(file, model, room_of_rest, spare=True, as_pack=as_pack, absent=absent)
    left = room - records - plan.nbytes
    neurons = int(min(most, left / 2))
    neurons = max(least_of_neurons, min(neurons, left if cache is None else cache)) // SECTOR * SECTOR
    return replace(
        plan,
        resident_bytes=plan.resident_bytes + records,
        neuron_bytes=neurons,
        paged=tuple(info.name for info in infos),
        cluster_bytes=max(least, left - neurons) // slot * slot,
    )


def _plan_matrices(
    file: ModelFile,
    model: ModelDescription,
    room: int,
    *,
    spare: bool = False,
    as_pack: bool = False,
    absent: int = 0,
) -> StreamingPlan:
    """Without neurons. ``spare``: memory is short even where these matrices fit, so rows of the embedding are read one
    by one. ``absent``: bytes of matrices that have a place elsewhere."""
    total = sum(file.tensors[name].nbytes for name, _ in iterate_tensors(model)) - absent
    operations = [
        ([info for name in names if (info := file.tensors[name]).layout != "neurons"], feed_forward)
        for names, feed_forward in operations_in_order(model)
    ]
    order = [info for infos, _ in operations for info in infos]
    streamable = as_pack or all(info.layout == "blocks16" for info in order)
    if (total <= room and not spare) or not streamable:
        return StreamingPlan(resident_bytes=total)
    embedding = None
    if model.embedding != model.head.weight:  # a step needs one row of it for each token
        embedding = model.embedding
        total -= file.tensors[embedding].nbytes
    if total <= room:
        return StreamingPlan(read_by_row=embedding, resident_bytes=total)
    best: tuple[int, int, list[TensorInfo]] | None = None
    for eligible in _eligible(operations):
        ring = least_ring(file, [info.name for info in eligible], model)
        ring += AHEAD_UNITS * max(_sectors(info.nbytes) for info in eligible)
        missing = total + ring - room
        chosen = _spread(eligible, missing)
        if len(eligible) == len(order):  # feed-forward first
            largest = [info for infos, feed_forward in operations if feed_forward for info in infos]
            chosen = _spread(largest, missing)
            chosen |= _spread(
                [info for info in order if info not in largest],
                missing - sum(info.nbytes for info in order if info.name in chosen),
            )
        streamed = [info for info in order if info.name in chosen]
        read = sum(info.nbytes for info in streamed)
        enough = read >= missing or len(eligible) == len(order)
        if enough and (best is None or read < best[1]):
            best = ring, read, streamed
    assert best is not None
    ring, _, streamed = best
    return StreamingPlan(
        tuple(info.name for info in streamed),
        embedding,
        ring,
        total - sum(info.nbytes for info in streamed),
    )


def _eligible(operations: list[tuple[list[TensorInfo], bool]]) -> Iterator[list[TensorInfo]]:
    """Sets of matrices that may be streamed, in the order of their use, feed-forward ones before others; all of them
    last. The ring has to hold what an operation uses together, and gaps of the largest: where small ones suffice, one
    for each operation, the ring is smaller, and so is what is read in every step."""
    feed_forward = [infos for infos, is_feed_forward in operations if is_feed_forward]
    for among in (feed_forward, [infos for infos, _ in operations]):
        for most in sorted({info.nbytes for infos in among for info in infos}):
            for together in (1, 2):
                found = [[info for info in infos if info.nbytes <= most][:together] for infos in among]
                if any(found):
                    yield [info for infos in found for info in infos]
    yield [info for infos, _ in operations for info in infos]


def _spread(infos: list[TensorInfo], missing: int) -> set[str]:
    """Evenly over the list, so much of it that ``missing`` bytes are in it, or all."""
    total = sum(info.nbytes for info in infos)
    if missing <= 0 or not total:
        return set()
    share = min(1.0, missing / total)
    chosen: set[str] = set()
    due = taken = 0.0
    for info in infos:
        due += share * info.nbytes
        if due - taken >= info.nbytes / 2 or share == 1.0:
            chosen.add(info.name)
            taken += info.nbytes
    for info in sorted(infos, key=lambda info: -info.nbytes):  # rounding may have left it short
        if taken >= missing:
            break
        if info.name not in chosen:
            chosen.add(info.name)
            taken += info.nbytes
    return chosen


def _sectors(nbytes: int) -> int:
    return -(-nbytes // SECTOR) * SECTOR
