"""Where the gang and the thread of a cluster unit meet (cluster_unit.h)."""

from libc.stdint cimport int64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.stdlib cimport posix_memalign

from pi2rt.cython_kernels.plane.declarations cimport *

import time

import numpy as np

from pi2rt.host.limits import memory_failure
from pi2rt.runtime.cluster_unit import ClusterUnitError


cdef class Mailbox:
    """Input and output of a cluster unit, one item at a time. ``x``, ``out``: float32 (max_rows, dim); ``x`` cannot be
    written to. They stay valid as long as an array of them is kept, also after the mailbox.

    ``deadline``: seconds; an answer that takes longer is a failure; None: none is. ``failure``: what ended
    ``serve``, or None.
    """

    def __cinit__(self, int64_t max_rows, int64_t dim, *, deadline=None):
        cdef float[:, ::1] x, out
        cdef void *memory = NULL
        if posix_memalign(&memory, 64, sizeof(pi2_cluster_unit)):
            raise memory_failure("a cluster unit")
        self.unit = <pi2_cluster_unit *>memory
        memset(memory, 0, sizeof(pi2_cluster_unit))
        x = self.x = np.zeros((max_rows, dim), np.float32)
        out = self.out = np.zeros((max_rows, dim), np.float32)
        self.x.flags.writeable = False
        self.unit.x, self.unit.out = &x[0, 0], &out[0, 0]
        self.deadline = deadline
        self.unit.deadline_ns = -1 if deadline is None else <int64_t>(deadline * 1e9)

    def take(self):
        """Waits, without the GIL, for the next item: (layer, rows); None: the mailbox is closed. ``answer`` ends it."""
        cdef int more
        with nogil:
            more = pi2_unit_take(self.unit)
        return (self.unit.layer, self.unit.rows) if more else None

    def answer(self, int64_t busy_ns, *, bint failed=False):
        """``out`` has the result of the item; or it has ``failed``, and no other one will be taken."""
        pi2_unit_answer(self.unit, failed, busy_ns)

    def serve(self, multiply, times=None):
        """Answers items by ``multiply(layer, x, out)``, of whose rows it gives those of the item, until the mailbox is
        closed or that raises: then it is the ``failure``, and nothing more is taken. ``times``: a list or deque that
        gets (layer, rows, begin, end) of each, nanoseconds of ``time.perf_counter_ns``."""
        x, out = self.x, self.out  # kept as long as ``multiply`` may write to them
        while (item := self.take()) is not None:
            layer, rows = item
            begin = time.perf_counter_ns()
            try:
                multiply(layer, x[:rows], out[:rows])
            except BaseException as error:
                self.failure = error  # before anybody can ask what it was
                self.answer(time.perf_counter_ns() - begin, failed=True)
                return
            end = time.perf_counter_ns()
            if times is not None:
                times.append((layer, rows, begin, end))
            self.answer(end - begin)

    def ask(self, int layer, int rows):
        """Gives an item to who takes, as programs do; ``wait`` ends it."""
        pi2_unit_ask(self.unit, layer, rows)

    def wait(self):
        """Waits for the answer, without the GIL; raises ClusterUnitError where there is none."""
        cdef int problem, go_on = 0
        with nogil:
            problem = pi2_unit_wait(self.unit, 50000, <const void *>&go_on)
        if problem:
            raise ClusterUnitError("failed" if problem == PI2_UNIT_FAILED else "has not answered in time")

    def close(self):
        """``take`` returns None from now on. Programs that use the mailbox do not run any more."""
        pi2_unit_close(self.unit)

    @property
    def counters(self):
        """(items, their rows, nanoseconds that the unit computed, nanoseconds that the gang waited for it)"""
        return self.unit.items, self.unit.item_rows, self.unit.busy_ns, self.unit.stall_ns

    def __dealloc__(self):
        free(self.unit)
