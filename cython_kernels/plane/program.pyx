"""A program: a model's operations, and the steps that run them on a gang of threads (program.h)."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from pi2rt.cython_kernels.kernels.declarations cimport *
from pi2rt.cython_kernels.plane.declarations cimport *
from pi2rt.cython_kernels.plane.operations cimport Operations
from pi2rt.cython_kernels.plane.sampler cimport outcome

import numpy as np

from pi2rt._errors import BusyError, InternalError, RequestError
from pi2rt.host.limits import memory_failure
from pi2rt.host.read_errors import read_failure
from pi2rt.runtime.cluster_unit import ClusterUnitError
from pi2rt.runtime.step import NeuronUse, Skipped, StepResult, Verified
from pi2rt.runtime.token_mask import mask_problem

MOST_IN_FLIGHT = PI2_QUEUE
CLUSTER = PI2_CLUSTER  # neurons that are asked for together


cdef class Posted:
    """A step in flight, its run, and what results of its slices go to."""

    cdef pi2_run *run
    cdef object step
    cdef list held


cdef class Program(Operations):
    """Operations, built and prepared, that steps run: ``post`` steps and take the ``result`` of each in order.

    ``pages``: KV pages that steps may name. The rest is as ``Operations`` has it."""

    cdef list waiting
    cdef list busy_ns
    cdef int64_t pages, page_bytes, window_page_bytes, state_slots, slot_bytes
    cdef uintptr_t page_memory, window_memory, slot_memory

    def __init__(self, gang, kernels, *, int64_t pages, **options):
        Operations.__init__(self, gang, kernels, **options)
        self.pages = pages
        self.waiting = []
        self.busy_ns = [0] * self.p.threads

    def state(self, *, uintptr_t pages, int64_t page_bytes, uintptr_t windowed=0, int64_t window_page_bytes=0,
              uintptr_t slots=0, int64_t n_slots=0, int64_t slot_bytes=0):
        """Where the first page lies, its part in the windowed area, and the first of ``n_slots`` slots of fixed arrays:
        what steps may copy."""
        self.page_memory, self.page_bytes = pages, page_bytes
        self.window_memory, self.window_page_bytes = windowed, window_page_bytes
        self.slot_memory, self.state_slots, self.slot_bytes = slots, n_slots, slot_bytes

    cdef int add_copy(self, pi2_run *r, copy) except -1:
        cdef bint paged = copy.kind == "page"
        cdef int64_t count = self.pages if paged else self.state_slots
        cdef int64_t nbytes = self.page_bytes if paged else self.slot_bytes
        cdef int64_t source = copy.source, target = copy.target
        cdef uintptr_t base = self.page_memory if paged else self.slot_memory
        if not (0 <= source < count and 0 <= target < count):
            raise InternalError(f"{copy!r}: there are {count} of that kind")
        self.add_bytes(r, base, nbytes, source, target)
        if paged:
            self.add_bytes(r, self.window_memory, self.window_page_bytes, source, target)
        return 0

    cdef int add_bytes(self, pi2_run *r, uintptr_t base, int64_t nbytes, int64_t source, int64_t target) except -1:
        if nbytes and pi2_copies_add(&r.copies, <const uint8_t *>(base + source * nbytes),
                                     <uint8_t *>(base + target * nbytes), nbytes):
            raise memory_failure("copies of state")
        return 0

    def lend(self, int64_t nbytes, *, uintptr_t kv, int64_t kv_bytes, int64_t kv_page_bytes, int64_t kv_used):
        """Lets the stream keep units in ``nbytes`` of its reclaimable memory, at most (``Stream.borrow``): instead of
        what is rarely used, and of a KV cache at ``kv`` of which pages are used in their order, the first ``kv_used``
        bytes already. After ``prepare``."""
        self.p.kv_used = kv_used
        self.p.kv, self.p.kv_bytes, self.p.kv_page_bytes, self.p.loan_bytes = kv, kv_bytes, kv_page_bytes, nbytes

    @property
    def thread_ns(self):
        """Nanoseconds that each thread has spent in kernels, of the steps whose results were taken."""
        return tuple(self.busy_ns)

    @property
    def taken(self):
        """Units of work that each thread took: (row blocks, neuron clusters, units of attention)."""
        if not self.prepared:
            return ((0, 0, 0),) * self.p.threads
        return tuple((self.p.scratch[t].taken.row_blocks, self.p.scratch[t].taken.clusters,
                      self.p.scratch[t].taken.attention) for t in range(self.p.threads))

    def bind(self, bind):
        """Gives a slot to a new sequence. The slot must not be part of a run in flight."""
        cdef int slot = bind.slot
        cdef pi2_slot *s
        cdef const int32_t[::1] history = bind.history
        cdef int64_t i
        if not 0 <= slot < self.p.max_slots:
            raise InternalError(f"slot {slot} of {self.p.max_slots}")
        s = &self.p.slots[slot]
        o = bind.sampling
        s.temperature, s.top_k, s.top_p, s.min_p = o.temperature, o.top_k, o.top_p, o.min_p
        s.repetition, s.presence, s.frequency = o.repetition_penalty, o.presence_penalty, o.frequency_penalty
        s.seed, s.logprobs, s.last = o.seed & 0xffffffffffffffff, min(o.logprobs, self.p.vocab), 0
        free(s.bias_ids)
        free(s.bias)
        free(s.ends)
        s.bias_ids, s.bias, s.counts, s.n_bias = NULL, NULL, NULL, 0
        s.ends, s.n_ends, s.limit, s.ended = NULL, 0, 0 if bind.limit is None else bind.limit, 0
        if bind.ends:
            s.ends = <int32_t *>malloc(len(bind.ends) * 4)
            if s.ends == NULL:
                raise memory_failure("tokens that end a sequence")
            for token in bind.ends:
                s.ends[s.n_ends] = token
                s.n_ends += 1
        for token, _ in o.logit_bias:
            if not 0 <= token < self.p.vocab:
                raise RequestError(f"logit_bias: token {token} is outside the vocabulary of {self.p.vocab}")
        if o.logit_bias:
            n = len(o.logit_bias)
            s.bias_ids = <int32_t *>malloc(n * 4)
            s.bias = <float *>malloc(n * 4)
            if s.bias_ids == NULL or s.bias == NULL:
                raise memory_failure("a logit bias")
            for j, (token, value) in enumerate(o.logit_bias):
                s.bias_ids[j], s.bias[j] = token, value
            s.n_bias = n
        if o.repetition_penalty != 1 or o.presence_penalty or o.frequency_penalty:
            s.counts = self.p.counts + slot * self.p.vocab
            memset(s.counts, 0, self.p.vocab * sizeof(int32_t))
            for i in range(history.shape[0]):
                if 0 <= history[i] < self.p.vocab:
                    s.counts[history[i]] += 1

    def post(self, step, bint trace=False):
        """Starts a step; BusyError when too many are unfinished."""
        cdef pi2_run *r
        cdef pi2_slice *s
        cdef const int32_t[::1] tokens, pages, targets
        cdef float[:, ::1] logits
        cdef int64_t row = 0, page_room = self.p.context // PI2_PAGE + 1, i, count, needed, index = 0
        cdef pi2_slot *slot
        if not self.prepared:
            raise InternalError("program was not prepared")
        r = pi2_run_new(&self.p)
        if r == NULL:
            raise BusyError(f"{PI2_QUEUE} steps are in flight")
        if len(step.slices) > self.p.max_slots or step.tokens > self.p.max_rows:
            raise InternalError(f"{step!r} exceeds {self.p.max_slots} slots or {self.p.max_rows} tokens")
        for bind in step.binds:
            self.bind(bind)
        for copy in step.copies:
            self.add_copy(r, copy)
        held = []
        for sl in step.slices:
            s = &r.slices[index]
            memset(s, 0, sizeof(pi2_slice))
            tokens, pages = sl.tokens, sl.pages
            count = max(1, tokens.shape[0])
            s.slot, s.start, s.count, s.row, s.sample = sl.slot, sl.start, <int32_t>count, <int32_t>row, sl.sample
            needed = (s.start + count + PI2_PAGE - 1) // PI2_PAGE
            if not (0 <= s.slot < self.p.max_slots and s.start >= 0 and s.start + count <= self.p.context
                    and needed <= pages.shape[0] and needed <= page_room):
                raise InternalError(f"slice {sl!r} does not fit its pages or the context")
            for i in range(needed):
                if not 0 <= pages[i] < self.pages:
                    raise InternalError(f"page {pages[i]} of {self.pages}")
            s.pages = r.pages + index * page_room
            index += 1
            memcpy(<void *>s.pages, &pages[0], needed * 4)
            if tokens.shape[0] == 0:
                r.token[row] = -1
            else:
                r.urgent = 1
                for i in range(count):
                    if not 0 <= tokens[i] < self.p.vocab:
                        raise RequestError(f"token {tokens[i]} is outside the vocabulary of {self.p.vocab}")
                    r.token[row + i] = tokens[i]
            score = None
            if sl.targets is not None:
                targets = sl.targets
                if targets.shape[0] != count:
                    raise InternalError("targets and tokens differ in length")
                for i in range(count):
                    r.targets[row + i] = targets[i] if targets[i] < self.p.vocab else -1
                s.targets = r.targets + row
                s.scores = r.scores + row
                for i in range(count):
                    s.scores[i] = 0
            rows = None
            if sl.logits:
                rows = np.empty((count, self.p.vocab), np.float32)
                logits = rows
                s.want_logits, s.logits = 1, &logits[0, 0]
            top = None
            slot = &self.p.slots[s.slot]
            if not 0 <= sl.drafts < max(1, tokens.shape[0]) or (sl.drafts and not sl.sample):
                raise InternalError(f"{sl.drafts} drafts of {tokens.shape[0]} tokens; sample={sl.sample}")
            s.drafts = sl.drafts
            if sl.masked:
                if sl.drafts or not sl.sample:
                    raise InternalError(f"a mask for a slice with {sl.drafts} drafts; sample={sl.sample}")
                s.masked, s.mask = 1, r.masks + index * self.p.mask_words - self.p.mask_words
                r.n_masked += 1
            if s.drafts:
                s.picks = r.picks + row
            if sl.sample and slot.logprobs > 0:
                top = np.empty((1 + s.drafts, slot.logprobs, 2), np.int32)  # pi2_pick: int32 and float32
                s.top = <pi2_pick *><uintptr_t>top.ctypes.data
            held.append((rows, top, slot.logprobs))
            row += count
        r.n_rows, r.n_slices, r.trace = <int>row, <int>len(step.slices), trace
        if pi2_run_post(r):
            raise InternalError("the gang has no place for a step")
        posted = Posted()
        posted.run, posted.step, posted.held = r, step, held
        self.waiting.append(posted)

    def stop(self, step_id):
        """Asks a step in flight to end at its next barrier."""
        cdef Posted posted
        for posted in self.waiting:
            if posted.step.id == step_id:
                pi2_run_stop(posted.run)

    def mask(self, step_id, slot, allowed):
        """What the masked slice of a slot in a step in flight may sample; see ``pi2rt.runtime.executor.Masking``."""
        cdef Posted posted
        cdef const uint32_t[::1] words
        cdef pi2_run *r
        cdef int i
        if allowed is not None and (problem := mask_problem(allowed, self.p.vocab)) is not None:
            raise InternalError(f"step {step_id}, the mask of slot {slot}: {problem}")
        for posted in self.waiting:
            if posted.step.id != step_id:
                continue
            r = posted.run
            for i in range(r.n_slices):
                if r.slices[i].slot == slot:
                    words = None if allowed is None else np.ascontiguousarray(allowed)
                    pi2_mask_give(r, &r.slices[i], NULL if words is None else &words[0])

    @property
    def in_flight(self):
        return len(self.waiting)

    def ready(self):
        """Whether the oldest step has finished."""
        return bool(self.waiting) and bool((<Posted>self.waiting[0]).run.done)

    def result(self):
        """StepResult of the oldest step, which has finished; and, where it was traced, (begin, end) nanoseconds of
        every operation on every thread, int64 (threads, operations), and for each thread (begin, end) of its waits
        within operations, int64 (waits, 2)."""
        cdef pi2_run *r
        cdef pi2_slice *s
        cdef int i, t, error, n = self.p.n_ops
        cdef uint64_t busy = 0
        cdef double ns_per_tick
        if not self.ready():
            raise InternalError("no finished step")
        cdef Posted posted = self.waiting.pop(0)
        r, step, held = posted.run, posted.step, posted.held
        for t in range(self.p.threads):
            busy += r.busy[t]
        ns_per_tick = (r.end_ns - r.begin_ns) / max(1.0, <double>(r.end_ticks - r.begin_ticks))
        for t in range(self.p.threads):
            self.busy_ns[t] += <int64_t>(r.busy[t] * ns_per_tick)
        kernel_ns = <int64_t>(busy * ns_per_tick / self.p.threads)
        error = r.error  # atomic: clang 14 takes no switch over it
        if error == PI2_UNIT_FAILED or error == PI2_UNIT_LATE:
            raise ClusterUnitError("failed" if error == PI2_UNIT_FAILED else "has not answered in time")
        if error:
            readers = [each for each in (self.neurons, self.clusters, self.stream, self.rows) if each is not None]
            reader = readers[0]  # all read the same file; one of them knows where it ended
            raise read_failure("weights", error, reader.path, reader.deadline, max(each.ended_at for each in readers))
        if r.stopped:
            return StepResult(step.id, stopped=True, started_ns=r.begin_ns, finished_ns=r.end_ns,
                              kernel_ns=kernel_ns), None
        sampled, scores, logits = [], [], []
        for i, (rows, top, logprobs) in enumerate(held):
            s = &r.slices[i]
            if s.skipped:
                sampled.append(Skipped())
                scores.append(None)
                logits.append(None)
                continue
            if s.drafts:
                sampled.append(Verified(tuple([outcome(s.picks[j], None if top is None else top[j])
                                               for j in range(s.n_picks)])))
            elif s.sample:
                sampled.append(outcome(s.pick, None if top is None else top[0]))
            else:
                sampled.append(None)
            if s.targets != NULL:
                row = np.empty(s.count, np.float32)
                memcpy(<void *><uintptr_t>row.ctypes.data, s.scores, s.count * 4)
                scores.append(row)
            else:
                scores.append(None)
            logits.append(rows)
        times = None
        if r.trace:
            begin = np.empty((self.p.threads, n), np.uint64)
            end = np.empty((self.p.threads, n), np.uint64)
            memcpy(<void *><uintptr_t>begin.ctypes.data, r.op_begin, self.p.threads * n * 8)
            memcpy(<void *><uintptr_t>end.ctypes.data, r.op_end, self.p.threads * n * 8)
            to_ns = lambda x: r.begin_ns + ((x - r.begin_ticks).astype(np.int64) * ns_per_tick).astype(np.int64)
            waits = [np.empty((0 if r.n_waits == NULL else r.n_waits[t], 2), np.uint64) for t in range(self.p.threads)]
            for t in range(self.p.threads):
                memcpy(<void *><uintptr_t>waits[t].ctypes.data, r.waits + t * PI2_WAITS if r.waits != NULL else NULL,
                       waits[t].nbytes)
            times = to_ns(begin), to_ns(end), [to_ns(each) for each in waits]
        weights = self.weight_bytes - r.skipped_bytes + r.neuron_bytes if r.n_rows else 0
        streamed = 0 if self.stream is None or not r.n_rows else self.stream.lap_bytes - r.kept_bytes
        neurons = None
        if self.neurons is not None:
            neurons = NeuronUse(r.neuron_bytes, r.used.asked - r.before.asked, r.used.missed - r.before.missed,
                                r.used.foreseen - r.before.foreseen, r.used.missed_bytes - r.before.missed_bytes,
                                r.used.reads - r.before.reads, r.used.read_bytes - r.before.read_bytes,
                                r.used.gap_pages - r.before.gap_pages, r.used.gap_bytes - r.before.gap_bytes)
        return StepResult(step.id, tuple(sampled), tuple(scores), tuple(logits), False, r.begin_ns, r.end_ns, kernel_ns,
                          weights, streamed + r.cluster_bytes, neurons), times

    @property
    def waited_for(self):
        """Threads that a step waits for: all, or all but the assistants'."""
        return self.p.members

    def detach(self):
        """Lets the gang run another program, while none of this one's steps is in flight. Waits until no assistant's
        thread is at work in it."""
        if self.prepared and self.p.members < self.p.threads and self.gang.gang != NULL:
            with nogil:
                pi2_gang_assist(self.p.gang, self.p.threads, NULL, NULL)
