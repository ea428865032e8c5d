"""Which actor runs on which cores, before anything was measured.

Every class of cores gets an actor. The best class leads: its executor holds the program, and the others
assist it within each layer, so that a layer is shared without a hop through the control plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pi2rt._errors import RequestError
from pi2rt.host.topology import CoreClass, Topology


@dataclass(frozen=True, slots=True)
class PlacedActor:
    """``cores``: a thread is pinned to each, in order. ``lead``: owns the executor; the others assist it."""

    name: str
    cores: tuple[int, ...]
    lead: bool


@dataclass(frozen=True, slots=True)
class UnitPlacement:
    """At least one actor; the first one leads, and no core is in two."""

    actors: tuple[PlacedActor, ...]

    def named(self, executor: str) -> UnitPlacement:
        """The same for an executor of this name: only the CPU's lead is named after a class of cores."""
        if executor == "cpu":
            return self
        return UnitPlacement((replace(self.lead, name=executor), *self.actors[1:]))

    @property
    def lead(self) -> PlacedActor:
        return self.actors[0]

    @property
    def assistants(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name, cores) of the others, as ``ExecutorOptions.assistants`` has them."""
        return tuple((actor.name, actor.cores) for actor in self.actors[1:])

    @property
    def threads(self) -> int:
        return sum(len(actor.cores) for actor in self.actors)


def default_placement(
    topology: Topology, threads: int | None = None, cores: Sequence[CoreClass] = ()
) -> UnitPlacement:
    """Threads for the physical cores, best first, but no more than the quota of CPU time feeds: threads
    beyond it spin at barriers while the kernel holds back the one they wait for.

    Args:
        topology: what there is.
        threads: how many threads; None for one on each physical core (of ``cores``, where given). More than
            there are physical cores goes to second hardware threads, best class first.
        cores: the user's own classes (``parse_core_classes``), in place of those of the topology; the first
            leads.

    Raises:
        RequestError: fewer than one thread, or more than there are hardware threads or ``cores``.
    """
    classes = tuple(cores) or topology.classes
    available = sum(len(cls.cores) + len(cls.siblings) for cls in classes)
    if threads is None:
        threads = sum(len(cls.cores) for cls in classes)
        if topology.quota_cores is not None and not cores:
            threads = max(1, min(threads, int(topology.quota_cores)))
    elif threads < 1:
        raise RequestError(f"threads={threads}: at least one is needed")
    elif threads > available:
        what = "the cores chosen give" if cores else "this process may use"
        raise RequestError(
            f"threads={threads}: {what} only {available} hardware threads; ask for {available}"
        )
    chosen: dict[str, list[int]] = {cls.name: [] for cls in classes}
    ranked = [(cls, cls.cores) for cls in classes] + [(cls, cls.siblings) for cls in classes]
    for cls, numbers in ranked:
        taken = numbers[:threads]
        chosen[cls.name] += taken
        threads -= len(taken)
    used = [(name, tuple(numbers)) for name, numbers in chosen.items() if numbers]
    return UnitPlacement(tuple(PlacedActor(name, numbers, i == 0) for i, (name, numbers) in enumerate(used)))
