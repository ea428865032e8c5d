"""The steps from options to what actors and an engine are made of, and what a change of the memory budget does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import trio

from pi2rt import catalogue
from pi2rt._errors import ClosedError, RequestError, UnsupportedModelError
from pi2rt.cython_kernels.kernels.native import trim_heap
from pi2rt.engine import EngineOptions
from pi2rt.engine.prompt_encoder import prompt_bytes
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.formats.plan import Plan, read_plan
from pi2rt.host.limits import limits_explained
from pi2rt.host.topology import CoreClass, own_cores, parse_core_classes, read_topology
from pi2rt.memory import StateStore
from pi2rt.models import ModelDescription, describe
from pi2rt.models.block_check import check_blocks
from pi2rt.opening.executor_plan import ExecutorPlan, plan_executor
from pi2rt.opening.model_info import ModelInfo, model_info
from pi2rt.opening.options import RuntimeKeywords, RuntimeOptions
from pi2rt.opening.own_memory import OWN
from pi2rt.opening.plan_making import (
    check_budget,
    check_plan,
    executor_options,
    make_plan,
    unit_options,
    with_plan,
)
from pi2rt.opening.sparsity import Lossy, load_sparsity
from pi2rt.planner.cluster_units import choose_clusters
from pi2rt.planner.placement import PlacedActor, UnitPlacement, default_placement
from pi2rt.runtime.actor import Actor
from pi2rt.runtime.executor import Borrower, ExecutorOptions, StepExecutor, make_store
from pi2rt.runtime.registry import load_executor
from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer, load_tokenizer

T = TypeVar("T")


class Opening:
    """An open model file, its plan, and the executors that are opened by it: ``await Opening.of(options)``, later
    ``close``.

    Attributes:
        chosen: the options, with those of a plan file.
        file, description, info: of the model.
        plan: what is done.
        options: of each lane, what its next executor is opened with.
        store: the state of sequences, which outlives executors that borrow it; None before the first executor, and of
            executors that keep it by themselves.
        tokenizer: where it was needed to divide a budget.
    """

    def __init__(self, chosen: RuntimeOptions, given_plan: Plan | None, trace: Trace | None) -> None:
        self.chosen, self.trace = chosen, trace
        self._given = given_plan
        if isinstance(chosen.executor, str):
            self._make = load_executor(chosen.executor, chosen.executor_options)
        else:
            self._make = chosen.executor
        self.executor = self._make()  # to be asked; constructing one acquires nothing
        self._cores = own_cores()
        if given_plan is None:
            self._units = default_placement(read_topology(), chosen.threads, _core_classes(chosen.cores))
            self._units = self._units.named(self.executor.name)
        else:
            self._units = _units(given_plan)
        self._stack = ExitStack()
        self._file: ModelFile | None = None
        self._resizing = trio.Lock()
        self._lossy: Lossy | None = None
        self._divided: ExecutorPlan | None = None
        self.tokenizer: Tokenizer | None = None
        self.store: StateStore | None = None
        self.description: ModelDescription
        self.info: ModelInfo
        self.plan: Plan
        self.options: list[ExecutorOptions] = []

    @classmethod
    async def of(
        cls,
        model: str | os.PathLike[str],
        options: RuntimeKeywords,
        *,
        prefill: Sequence[str] = (),
        cluster_unit: str | None = None,
        trace: Trace | None = None,
    ) -> Opening:
        """Goes all the steps. Arguments and errors as ``open_runtime``.

        Args:
            prefill: executors of further lanes, for a plan that is made here.
            cluster_unit: "NAME" or "NAME=CLUSTERS", see ``choose_clusters``; for a plan that is made here.
        """
        chosen, plan = RuntimeOptions(**options), None
        if chosen.plan is not None:
            plan = chosen.plan if isinstance(chosen.plan, Plan) else await in_thread(read_plan, chosen.plan)
            chosen = with_plan(chosen, options, plan)
        opening = cls(chosen, plan, trace)
        try:
            await opening._open_file(model)
            await opening._divide(prefill, cluster_unit)
        except BaseException:
            opening.close()
            raise
        return opening

    @property
    def file(self) -> ModelFile:
        if self._file is None:
            raise ClosedError("the engine is closed")
        return self._file

    async def _open_file(self, model: str | os.PathLike[str]) -> None:
        path = catalogue.resolve(model)
        if self.chosen.memory is not None:
            await in_thread(OWN.give_up_unused)
        self._file = self._stack.enter_context(await in_thread(open_model_file, path))
        self.description, self.info = await in_thread(_describe, self.file, self.chosen.context)
        self._lossy = await in_thread(load_sparsity, self.file, self.chosen)
        if self._lossy is not None:
            self.info = replace(self.info, sparsity=self._lossy.label)

    async def _divide(self, prefill: Sequence[str], cluster_unit: str | None) -> None:
        """Divides the memory, and makes the plan, unless there is one."""
        if self._given is not None:
            check_plan(self._given, self.file, self.description, self._cores)
        self._check_neurons()
        names = prefill if self._given is None else [lane.executor for lane in self._given.lanes[1:]]
        unit = None
        self._check_plugin_options(names, cluster_unit)
        if cluster_unit is not None:
            threads = sum(len(actor.cores) for actor in self._units.actors)
            choose = partial(
                choose_clusters,
                self.file,
                self.description,
                cluster_unit,
                threads,
                self.chosen.kernels,
                self.chosen.executor_options,
            )
            unit = await in_thread(choose)
        of_choice = {} if unit is None else unit.options
        unit_fields = of_choice if self._given is None else unit_options(self._given)
        if unit_fields and not getattr(self.executor, "takes_cluster_units", False):
            raise RequestError(
                f"the executor {self.executor.name!r} works with no cluster unit; take executor='cpu', or leave the "
                f"unit out"
            )
        predictors = None if self._lossy is None else self._lossy.predictors
        divide = partial(
            plan_executor,
            self.file,
            self.description,
            self.chosen,
            self.info.context,
            self._units,
            self.executor,
            self.trace,
            sparsity=self._lossy_options,
            unit=unit_fields,
            predictors=0 if predictors is None else predictors.nbytes,
            prefill=[load_executor(name, self.chosen.executor_options)() for name in names],
        )
        chosen = self.chosen
        if chosen.memory is None:
            divided = divide()
        else:  # a budget is divided once it is known what the tokenizer takes, up to 100 MB
            own = await in_thread(OWN.before_tokenizer, self.description)
            if own > chosen.memory_bytes:  # or the tokenizer alone would exceed it
                divide(own=own)  # raises
            self.tokenizer = await in_thread(load_tokenizer, self.file)
            own = await in_thread(OWN.with_tokenizer, self.description)
            divided = divide(own=own, prompt=prompt_bytes(self.tokenizer, self.info.context))
        if self._given is not None:
            check_budget(self._given, self.file, self.description, chosen, divided.own)
        self._divided = divided
        self.plan = self._given or make_plan(
            self.file, self.description, divided, self._units, self._cores, self.executor, prefill, unit
        )
        unplanned = {**self._lossy_options, "mask_deadline": chosen.mask_deadline}
        self.options = [executor_options(self.plan, lane, unplanned, self.trace) for lane in self.plan.lanes]

    @property
    def _lossy_options(self) -> Mapping[str, Any]:
        if self._lossy is None:
            return {}
        return {"thresholds": self._lossy.thresholds, "predictors": self._lossy.predictors or {}}

    def _check_plugin_options(self, prefill: Sequence[str], cluster_unit: str | None) -> None:
        """Options of what the plan does not have are a mistake."""
        first = self.chosen.executor
        used = {*prefill, *([first] if isinstance(first, str) else [])}
        if cluster_unit is not None:
            used.add(cluster_unit.partition("=")[0])
        if self._given is not None and self._given.cluster_unit is not None:
            used.add(self._given.cluster_unit.unit)
        for name in self.chosen.executor_options:
            if name not in used:
                raise RequestError(
                    f"executor_options of {name!r}: the plan has no such executor or cluster unit; it has "
                    f"{', '.join(map(repr, sorted(used)))}"
                )

    def _check_neurons(self) -> None:
        chosen = self.chosen
        for_neurons = (
            chosen.cache is not None
            or chosen.pipeline != "cluster"
            or chosen.two_phase
            or chosen.read_through_bytes
        )
        if for_neurons and not (self.file.bundles and chosen.memory):
            raise RequestError(
                "cache, pipeline, two_phase and read_through are for neurons that are read when they are active: that "
                "takes a memory budget, and a pack with neuron bundles"
            )

    def actors(self) -> list[Actor]:
        """One for each lane, not started yet."""
        return [
            Actor(
                lane.name,
                load_executor(lane.executor, self.chosen.executor_options) if number else self._make,
                partial(self._open_executor, number),
                self.trace,
            )
            for number, lane in enumerate(self.plan.lanes)
        ]

    async def _open_executor(self, number: int, executor: StepExecutor) -> None:
        """Opens an executor of a lane. Errors: those of ``StepExecutor.open``; also

        Raises:
            UnsupportedModelError, RequestError: the executor lacks what the file, an option or a lane needs.
        """
        file, sparsity, options = self.file, self.chosen.sparsity, self.options[number]
        if file.bundles and not getattr(executor, "reads_bundles", False):
            raise UnsupportedModelError(
                file.path,
                "bundles",
                f"are there, matrices stored by neuron, which the executor {executor.name!r} cannot read; convert "
                f"the model again with --bundles off",
            )
        if (kinds := getattr(executor, "block_kinds", None)) is not None:
            check_blocks(file.path, self.description, kinds, executor.name)
        if sparsity not in getattr(executor, "sparsities", ("exact",)):
            raise RequestError(
                f"sparsity={sparsity!r}: the executor {executor.name!r} does not have it; take executor='cpu'"
            )
        if len(self.plan.lanes) > 1 and not isinstance(executor, Borrower):
            raise RequestError(
                f"the executor {executor.name!r} keeps the state of sequences by itself: it cannot share that with the "
                f"lane {self.plan.lanes[not number].name!r}"
            )
        if self.store is None:
            self.store = make_store(executor, self.description, options)
        await executor.open(file, self.description, options, self.store, self.chosen.on_load or _ignore)

    def engine_options(self) -> EngineOptions:
        plan = self.plan
        return EngineOptions(
            vocab_size=self.description.vocab_size,
            slots=plan.choices.max_sequences,
            pages=plan.kv_pages,
            context=plan.choices.context,
            max_tokens=plan.lanes[0].max_tokens,
            mixed_chunk=min(plan.lanes[0].mixed_chunk, plan.lanes[0].max_tokens),
            max_queue=self.chosen.max_queue,
            mask_deadline=self.chosen.mask_deadline,
        )

    async def resize(self, actor: Actor, memory: int) -> None:
        """Another budget, of the executor that decodes and of those that come after it. See ``Runtime.resize``.

        Where the executor cannot be opened with it, the new budget holds for the next attempt all the same.
        """
        file, chosen = self.file, self.chosen
        if self._divided is None or chosen.memory is None or chosen.exact_floats:
            raise RequestError(
                "the memory of this model cannot change while it runs: that takes a memory budget, and weights as "
                "they are in the file"
            )
        async with self._resizing:  # in the order of the calls: each plans with what the one before has left
            before = self.options[0]
            after = self._divided.resized(file, self.description, before, memory)
            change = partial(self._take, after)
            if file.bundles:
                try:
                    await actor.resize(after.neuron_bytes, change)
                except RequestError:  # the executor has no such memory, and goes on as it was
                    self._take(before)
                    raise
            elif after is not before:
                await actor.reopen(change)

    def _take(self, options: ExecutorOptions) -> None:
        """What the next executor of the lane that decodes is opened with."""
        self.options[0] = options

    def close(self, *, stuck: bool = False) -> None:
        """Lets go of the file and the tokenizer, of up to 100 MB each, however long somebody keeps the actors, and of
        the state of sequences. ``stuck``: an executor could not be stopped, and may still write to that."""
        self._file = self.tokenizer = None
        self._stack.close()
        store, self.store = self.store, None
        if store is not None and stuck:
            store.abandon()
        elif store is not None:
            store.close()


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """Runs it on a worker thread; where the system gives no more of those, SystemLimitError says so."""
    with limits_explained():
        return await trio.to_thread.run_sync(function, *args)


def load_tokenizer_trimmed(file: ModelFile) -> Tokenizer:
    """The tokenizer, without what reading it has left in the heap."""
    tokenizer = load_tokenizer(file)
    trim_heap()
    return tokenizer


def _describe(file: ModelFile, context: int) -> tuple[ModelDescription, ModelInfo]:
    own = describe(file).context_length
    context = min(context, own)
    description = describe(file, context)
    return description, model_info(file, description, context, own)


def _core_classes(cores: Mapping[str, Sequence[int]] | None) -> tuple[CoreClass, ...]:
    if cores is None:
        return ()
    lists = {name: ",".join(map(str, numbers)) for name, numbers in cores.items()}
    return parse_core_classes([f"{name}={numbers}" for name, numbers in lists.items()])


def _units(plan: Plan) -> UnitPlacement:
    """The actors of the lane that decodes."""
    units = map(plan.unit, plan.lanes[0].units)
    return UnitPlacement(
        tuple(PlacedActor(unit.name, tuple(unit.cores), i == 0) for i, unit in enumerate(units))
    )


def _ignore(done: int, total: int) -> None: ...
