"""How the executors of one open model are opened: the first one, and each that its actor makes in its place."""

from __future__ import annotations

from dataclasses import replace

import trio

from pi2rt._errors import ClosedError, RequestError, UnsupportedModelError
from pi2rt.formats import ModelFile
from pi2rt.memory import StateStore
from pi2rt.models import ModelDescription
from pi2rt.opening.executor_plan import ExecutorPlan
from pi2rt.opening.sparsity import Lossy
from pi2rt.runtime.actor import Actor
from pi2rt.runtime.executor import Executor, ExecutorOptions, Progress, make_store


class ExecutorOpening:
    """Opens executors with what ``plan`` found, until a resize changes that.

    Args:
        file: stays open as long as this is used.
        lossy: thresholds or predictors of neurons; None where the model is computed exactly.
        on_load: told about the loading of the weights; None: nobody.

    Attributes:
        options: what the next executor is opened with.
        store: the state of sequences, which outlives executors that borrow it; None before the first, and of executors
            that keep it by themselves.
    """

    def __init__(
        self,
        file: ModelFile,
        description: ModelDescription,
        plan: ExecutorPlan,
        lossy: Lossy | None,
        on_load: Progress | None,
    ) -> None:
        self._file: ModelFile | None = file
        self._description, self._plan = description, plan
        self._on_load = on_load or _ignore
        self._resizing = trio.Lock()
        self.store: StateStore | None = None
        self.options: ExecutorOptions = plan.options
        if lossy is not None:
            self.options = replace(
                plan.options, thresholds=lossy.thresholds, predictors=lossy.predictors or {}
            )

    async def open(self, executor: Executor) -> None:
        """Opens it. Errors: those of ``Executor.open``; also

        Raises:
            UnsupportedModelError, RequestError: the executor lacks what the file or an option needs.
        """
        file, sparsity = self._open_file(), self._plan.chosen.sparsity
        if file.bundles and not getattr(executor, "reads_bundles", False):
            raise UnsupportedModelError(
                file.path,
                "bundles",
                f"are there, matrices stored by neuron, which the executor {executor.name!r} cannot read; convert "
                f"the model again with --bundles off",
            )
        if sparsity not in getattr(executor, "sparsities", ("exact",)):
            raise RequestError(
                f"sparsity={sparsity!r}: the executor {executor.name!r} does not have it; take executor='cpu'"
            )
        if self.store is None:
            self.store = make_store(executor, self._description, self.options)
        await executor.open(file, self._description, self.options, self.store, self._on_load)

    async def resize(self, actor: Actor, memory: int) -> None:
        """Another budget, of the executor that is open and of those that come after it. See ``Runtime.resize``.

        Where the executor cannot be opened with it, the new budget holds for the next attempt all the same.
        """
        file, chosen = self._open_file(), self._plan.chosen
        if chosen.memory is None or chosen.exact_floats:
            raise RequestError(
                "the memory of this model cannot change while it runs: that takes a memory budget, and weights as "
                "they are in the file"
            )
        async with self._resizing:  # in the order of the calls: each plans with what the one before has left
            before = self.options
            after = self._plan.resized(file, self._description, before, memory)

            def change() -> None:
                self.options = after

            if file.bundles:
                try:
                    await actor.resize(after.neuron_bytes, change)
                except RequestError:  # the executor has no such memory, and goes on as it was
                    self.options = before
                    raise
            elif after is not before:
                await actor.reopen(change)

    def close(self, *, stuck: bool = False) -> None:
        """Lets go of the file, whose metadata takes up to 100 MB, however long somebody keeps the actor, and of the
        state of sequences. ``stuck``: an executor could not be stopped, and may still write to that."""
        self._file = None
        store, self.store = self.store, None
        if store is not None and stuck:
            store.abandon()
        elif store is not None:
            store.close()

    def _open_file(self) -> ModelFile:
        if self._file is None:
            raise ClosedError("the engine is closed")
        return self._file


def _ignore(done: int, total: int) -> None: ...
