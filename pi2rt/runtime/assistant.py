"""An assistant: an actor whose unit works inside another actor's steps.

Two classes of cores share each layer of a model, taking rows from the same native cursors, because a hop through
the control plane costs as much as a layer. So an assistant has no inbox and no executor of its own: it takes part
in every step of its leader, opens, fails and closes with it, and what can be told of it is told by the leader's
executor.
"""

from __future__ import annotations

from dataclasses import replace

from pi2rt.runtime.actor import ActorStatistics
from pi2rt.runtime.executor_statistics import ExecutorStatistics


def assistant_statistics(leader: ActorStatistics) -> tuple[ActorStatistics, ...]:
    """One snapshot for each assistant of ``leader``, in the order of their threads.

    ``executor`` counts the steps shared, and as ``kernel_ns`` the mean over the assistant's own threads;
    ``bytes`` is empty, for the memory is the leader's. ``busy``: share of the time in which these threads
    computed. ``inbox`` is the leader's.
    """
    whole = leader.executor
    names = dict.fromkeys(thread.actor for thread in whole.threads if thread.actor != leader.name)
    return tuple(_assistant(leader, name) for name in names)


def _assistant(leader: ActorStatistics, name: str) -> ActorStatistics:
    whole = leader.executor
    threads = tuple(thread for thread in whole.threads if thread.actor == name)
    kernel_ns = sum(thread.kernel_ns for thread in threads) // len(threads)
    executor = ExecutorStatistics(
        steps=whole.steps,
        tokens=whole.tokens,
        in_flight=whole.in_flight,
        busy_ns=whole.busy_ns,
        kernel_ns=kernel_ns,
        finished_ns=whole.finished_ns,
        threads=threads,
        kernels=whole.kernels,
    )
    share = kernel_ns / whole.busy_ns if whole.busy_ns else 0.0
    return replace(leader, name=name, busy=leader.busy * share, executor=executor)
