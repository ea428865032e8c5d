"""What an executor is opened with: a memory budget, divided between weights, keys and values, and all else."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, cast

from pi2rt import catalogue
from pi2rt._errors import MemoryBudgetError, ModelNotFoundError, RequestError
from pi2rt.engine.lane import rows_in_flight
from pi2rt.formats import ModelFile
from pi2rt.formats.pack import PackFile
from pi2rt.formats.row_blocks import SECTOR
from pi2rt.host.memory import available_memory, rss_bytes
from pi2rt.memory import KvType, MemoryNeed, StateLayout, weight_bytes, widest_window, window_pages
from pi2rt.models import ModelDescription
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.opening.options import RuntimeOptions
from pi2rt.planner.measure.kept_curve import kept_curve
from pi2rt.planner.measure.read_curve import Io
from pi2rt.planner.placement import UnitPlacement
from pi2rt.planner.read_choice import choose_reads
from pi2rt.planner.weights import (
    StreamingPlan,
    all_neurons,
    least_neurons,
    plan_streaming,
    with_records,
    without_records,
)
from pi2rt.runtime.cluster_unit import unit_bytes
from pi2rt.runtime.executor import Borrower, ExecutorOptions, Measured, StepExecutor
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.trace import Trace

STREAMED_CHUNK = 128
"""Prompt tokens in one step at most where weights are read in every step: reading lies under the computing of so
many already, and what activations of more would take holds weights instead."""

Measure: TypeAlias = Callable[[ModelFile, ModelDescription, StreamingPlan], MemoryNeed]

OF_PLAN = ("placements", "ring_bytes", "expert_bytes", "neuron_bytes")
"""Fields of a streaming plan that are options of an executor."""


@dataclass(frozen=True, slots=True)
class ExecutorPlan:
    """``own``: bytes that the process itself takes, and of these ``lanes``, what prefill lanes take; ``need``: of the
    executor; ``measure``: of one that is opened with another streaming plan."""

    options: ExecutorOptions
    chosen: RuntimeOptions
    own: int
    lanes: int
    need: MemoryNeed
    measure: Measure

    @property
    def beside(self) -> int:
        """Bytes of a budget that are for anything but weights and neurons: these keep their size."""
        return self.own + self.need.activations + self.need.kv(self.options.pages, self.options.window_pages)

    def resized(
        self, file: ModelFile, description: ModelDescription, now: ExecutorOptions, memory: int
    ) -> ExecutorOptions:
        """The options ``now`` with another budget for weights, or for neurons where the model has those; ``now`` itself
        where that changes no weights.

        Raises:
            MemoryBudgetError: it is too small.
        """
        if file.bundles:
            beside = self.chosen.memory_bytes - with_records(
                file, self.options.neuron_bytes or all_neurons(file)
            )
            neurons, least = without_records(file, memory - beside), least_neurons(file)
            if neurons < least:
                raise _too_small_for_a_change(memory, beside + with_records(file, least))
            return replace(now, neuron_bytes=neurons)
        beside = self.beside - self.need.activations
        room = max(0, min(memory, available_memory() + rss_bytes()) - beside)
        streaming, need = _fit(
            file, description, self.measure, self.need, room, self.chosen.cache_bytes, now.reads
        )
        if need.weights + need.activations > room:
            raise _too_small_for_a_change(memory, beside + need.weights + need.activations)
        return _with(streaming, now)


def _fit(
    file: ModelFile,
    description: ModelDescription,
    measure: Measure,
    need: MemoryNeed,
    room: int,
    cache: int | None,
    reads: FlashReads,
) -> tuple[StreamingPlan, MemoryNeed]:
    """As many weights as have room beside activations; or as few as can be, where not even these have it. What is read
    while steps run takes memory itself, so each plan is measured again.

    Args:
        need: of any plan, to begin with.
        room: bytes for weights and activations.
        cache: bytes for neurons at most; None: all that is left.
    """
    left = room - need.activations
    while True:
        streaming = plan_streaming(file, description, left, cache, reads=reads)
        need = measure(file, description, streaming)
        if need.weights + need.activations <= room or streaming.nbytes > left:
            return streaming, need
        left = room - need.activations - (need.weights - streaming.nbytes)  # the same plan would exceed that


def _too_small_for_a_change(memory: int, least: int) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"a memory of {_mib(memory)} is too small; the least that a running model can change to is {_mib(least)}"
    )


def plan_executor(
    file: ModelFile,
    description: ModelDescription,
    chosen: RuntimeOptions,
    context: int,
    placement: UnitPlacement,
    executor: StepExecutor,
    trace: Trace | None,
    *,
    sparsity: Mapping[str, Any] | None = None,
    unit: Mapping[str, Any] | None = None,
    own: int = 0,
    predictors: int = 0,
    prompt: int = 0,
    prefill: Sequence[StepExecutor] = (),
) -> ExecutorPlan:
    """What an executor is opened with: as many weights as have room beside a context's keys and values, and as many of
    these as have room beside the weights.

    Args:
        executor: of the kind that will be opened; it is only asked.
        sparsity: fields of its options for thresholds and predictors.
        unit: fields of its options for a cluster unit.
        own: of a budget, bytes that the process itself takes; see ``own_memory``.
        predictors: bytes that an executor takes for them.
        prompt: bytes that the text of a prompt takes, beside its keys and values.
        prefill: of the kinds that further lanes open; each has weights of its own, all of them resident.

    Raises:
        MemoryBudgetError: too little; the message says how much would do, and what it is made of.
    """

    kv_type = cast("KvType", chosen.kv_type)  # checked by RuntimeOptions
    for one in (executor, *prefill):
        if not isinstance(one, Measured) and chosen.memory is not None:
            raise RequestError(
                f"memory={chosen.memory!r}: the executor {one.name!r} does not say what memory it needs, so that a "
                f"budget cannot be kept; leave it out, or take executor='cpu'"
            )

    reads = replace(_reads(file, chosen.io), neuron_gap=chosen.read_through_bytes)
    ask = ExecutorOptions(
        slots=chosen.max_sequences,
        pages=1,
        context=context,
        max_tokens=1,
        cores=placement.lead.cores,
        actor=placement.lead.name,
        assistants=placement.assistants,
        kv_type=kv_type,
        activations=chosen.activations,
        exact_floats=chosen.exact_floats,
        kernels=chosen.kernels,
        io=chosen.io,
        read_deadline=chosen.read_deadline,
        pipeline=chosen.pipeline,
        two_phase=chosen.two_phase,
        reads=reads,
        trace=trace,
        **(sparsity or {}),
        **(unit or {}),
    )
    tokens, available, streaming = chosen.step_tokens, available_memory(), StreamingPlan()
    windows = partial(_window_pages, description, context, chosen.max_sequences, (executor, *prefill))
    lanes = sum(_lane_bytes(each, file, description, replace(ask, max_tokens=tokens)) for each in prefill)
    measure = partial(_need, executor, replace(ask, max_tokens=tokens), predictors)
    need = measure(file, description, streaming)
    each = -(-context // PAGE_TOKENS)
    if chosen.memory is not None:
        own += chosen.read_through_bytes + predictors + prompt + lanes  # read through: where gaps go
        limit = min(available + own, chosen.memory_bytes)
        available = limit - own
        streams = getattr(executor, "streams_weights", False) and not chosen.exact_floats
        if streams:
            if need.weights + need.activations + need.kv(each, windows(tokens)) > available:
                tokens = min(tokens, max(STREAMED_CHUNK, chosen.max_sequences))
                measure = partial(_need, executor, replace(ask, max_tokens=tokens), predictors)
                need = measure(file, description, streaming)
            left = available - need.kv(each, windows(tokens))
            streaming, need = _fit(file, description, measure, need, left, chosen.cache_bytes, reads)
        kv = need.kv(each, windows(tokens))
        if own + need.weights + need.activations + kv > limit:
            packed = None
            if streams and not isinstance(file, PackFile):
                packed = plan_streaming(file, description, 0, reads=reads, as_pack=True)
                need = replace(need, activations=measure(file, description, packed).activations)
            helper = 0
            if ask.cluster_unit is not None:
                helper = unit_bytes(file, description, ask.cluster_unit(), ask.unit_clusters, tokens)
            raise _too_small(file, limit, own, predictors, prompt, lanes, helper, need, streaming, kv, packed)
    else:
        own, available = own + lanes, available - lanes
    windowed = windows(tokens)
    pages = need.pages(available, each, each * chosen.max_sequences, windowed)
    windowed = min(windowed, pages)
    options = _with(streaming, replace(ask, pages=pages, window_pages=windowed, max_tokens=tokens))
    return ExecutorPlan(options, chosen, own, lanes, need, measure)


def _window_pages(
    description: ModelDescription,
    context: int,
    sequences: int,
    executors: Sequence[StepExecutor],
    tokens: int,
) -> int:
    """KV pages that have memory for windowed bytes at a time; 0: no block has a window, or the executors keep keys and
    values by themselves. ``tokens``: in a step of each."""
    window = widest_window(description, context)
    if window is None or not isinstance(executors[0], Borrower):
        return 0
    rows = sum(rows_in_flight(tokens, each.max_in_flight, sequences) for each in executors)
    return window_pages(window, sequences, rows, context)


def _lane_bytes(
    executor: StepExecutor, file: ModelFile, description: ModelDescription, ask: ExecutorOptions
) -> int:
    """Of a prefill lane, beside the KV pages that it shares: it is opened with cores of its own choice."""
    if not isinstance(executor, Measured):
        return weight_bytes(file, description, floats=False)
    alone = replace(ask, cores=(), assistants=(), cluster_unit=None, unit_clusters={})
    need = executor.need(file, description, alone)
    return need.weights + need.activations


def _need(
    executor: StepExecutor,
    ask: ExecutorOptions,
    predictors: int,
    file: ModelFile,
    description: ModelDescription,
    streaming: StreamingPlan,
) -> MemoryNeed:
    """Of an executor that is opened with that plan, but for ``predictors``, bytes that are counted by themselves."""
    if not isinstance(executor, Measured):  # weights as they are; it decides only how many pages there are
        layout = StateLayout.of(description, ask.kv_type, ask.context)
        weights = weight_bytes(file, description, floats=False)
        found = MemoryNeed(weights, layout.page_bytes, 0, layout.window_page_bytes)
    else:
        found = executor.need(file, description, _with(streaming, ask))
        least = max(found.weights - predictors, streaming.nbytes)  # with the records of caches
        found = replace(found, weights=least)
    if not isinstance(executor, Borrower):  # it keeps keys and values by itself, of all positions
        found = replace(found, page=found.page + found.window_page, window_page=0)
    return found


def _with(streaming: StreamingPlan, options: ExecutorOptions) -> ExecutorOptions:
    """``options`` itself where it has that plan."""
    changes = {name: getattr(streaming, name) for name in OF_PLAN}
    same = all(getattr(options, name) == change for name, change in changes.items())
    return options if same else replace(options, **changes)


def _reads(file: ModelFile, io: Io) -> FlashReads:
    """What is read at once: by the curve that ``pi2rt info --measure`` kept of the file's device, if it did."""
    try:
        kept = kept_curve(catalogue.curves_directory(), file.path, io)
    except ModelNotFoundError:  # there is no cache directory, which an open does not need
        kept = None
    if kept is None:
        return FlashReads()
    page = max((each.page_bytes for each in file.bundles.values()), default=SECTOR)
    try:
        return choose_reads(kept.curve, page)
    except ValueError:  # it has no points for that
        return FlashReads()


def _too_small(
    file: ModelFile,
    limit: int,
    own: int,
    predictors: int,
    prompt: int,
    lanes: int,
    unit: int,
    need: MemoryNeed,
    streaming: StreamingPlan,
    kv: int,
    packed: StreamingPlan | None,
) -> MemoryBudgetError:
    """Of a memory budget: the least that would do, and what it is made of. ``packed``: of a file that is no pack,
    what would be the least of one."""
    parts = {
        "interpreter, libraries and tokenizer": own - predictors - prompt - lanes,
        "predictors": predictors,
        "text of a prompt": prompt,
        "weights and activations of prefill lanes": lanes,
        "weights and queue of a cluster unit": unit,
        "weights that stay": need.weights
        - unit
        - streaming.ring_bytes
        - streaming.expert_bytes
        - streaming.neuron_bytes,
        "matrices of an expert that are used together": streaming.expert_bytes,
        "neurons that are computed together": streaming.neuron_bytes,
        "a ring for those that are read in every step": streaming.ring_bytes,
        "KV cache of one context": kv,
        "activations": need.activations,
    }
    made_of = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
    advice, pack_fits = "", False
    if packed is not None:
        least = own + packed.nbytes + need.activations + kv
        pack_fits = least <= limit
        advice = f"as a pack the model would need {_mib(least)}; "
        if pack_fits:
            source = shlex.quote(os.fspath(file.path))
            pack = shlex.quote(f"{file.path.resolve().name.removesuffix('.gguf')}.pi2")
            advice += f"'pi2rt convert {source} {pack}' writes one, --convert makes and keeps one by itself; "
    return MemoryBudgetError(
        f"a memory of {_mib(limit)} is too small; the least is {_mib(own + need.weights + need.activations + kv)}: "
        f"{made_of}; {advice}a smaller context or kv_type='q8' needs less",
        pack_fits=pack_fits,
    )


def _mib(size: int) -> str:
    return f"{-(-size // (1 << 20))} MiB"
