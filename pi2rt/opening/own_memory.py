"""What the process itself takes of a memory budget: all but the weights, neurons, KV cache and activations of the model
that is being opened.

A budget is what the whole process may take. So whatever is resident counts, also what the host program holds and what
another open engine holds. Garbage, and memory that the heap keeps although it is free, are given up before the process
is measured: else an engine that was closed would count as need of the next one.

The first engine makes the process grow for good: loading touches code and leaves small objects on pages of the heap,
whether it succeeds or not; running makes stacks and heaps of threads. A budget keeps OWN_MEMORY for that. When a later
engine is opened, this growth is resident already, and is not kept a second time: so what was accepted once is accepted
again (measured with SmolLM2: 2 to 3 MiB after 5 times, and no more after 300).
"""

from __future__ import annotations

import gc
import os

from pi2rt.cython_kernels.kernels.native import fix_heap_thresholds, trim_heap
from pi2rt.host.memory import rss_bytes
from pi2rt.models import ModelDescription

OWN_MEMORY = 4 << 20
"""Bytes of a budget for what the first engine of a process makes it grow by."""

OWN_MEMORY_LOADED = 1 << 20
"""The same once a tokenizer was loaded, and no engine has run."""

TOKEN_BYTES = 480
"""Bytes of a tokenizer for each token, rounded up: measured were 442 for Llama's 32,000, 420 for SmolLM2's 49,152."""

HEAP_THRESHOLD = 128 << 10
"""Bytes. glibc begins with this, and raises it to what was freed: a thread's heap that was given 5 MB once then keeps
up to 10 MB, which ``malloc_trim`` does not give back. Of SmolLM2's tokenizer, that is 4 MiB for each engine."""

_TUNED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which users choose thresholds themselves."""


class OwnMemory:
    """Of this process. Its methods block, for worker threads."""

    def __init__(self) -> None:
        self._grown = False  # an engine has run
        self._loaded: dict[int, int] = {}  # by the size of a vocabulary: own bytes with its tokenizer

    def give_up_unused(self) -> None:
        """Collects garbage and gives free heap memory back to the system. Holds the GIL while it collects: 10 ms of
        pi2rt's own objects, 0.1 to 0.2 s for each million of the host program's."""
        if not any(name in os.environ for name in _TUNED):
            fix_heap_thresholds(HEAP_THRESHOLD)
        gc.collect()
        trim_heap()

    def before_tokenizer(self, model: ModelDescription) -> int:
        """An estimate of ``with_tokenizer``, before the tokenizer is loaded."""
        resident = rss_bytes()
        known = self._loaded.get(model.vocab_size, 0)  # it will take what is free in the heap
        return known if known > resident else resident + TOKEN_BYTES * model.vocab_size + self._reserve

    def with_tokenizer(self, model: ModelDescription) -> int:
        """Bytes that the process takes beside a model, once its tokenizer is loaded."""
        trim_heap()
        own = rss_bytes() + self._reserve
        self._loaded[model.vocab_size] = own
        return own

    def has_grown(self) -> None:
        """An engine has run."""
        self._grown = True

    @property
    def _reserve(self) -> int:
        if self._grown:
            return 0
        return OWN_MEMORY_LOADED if self._loaded else OWN_MEMORY


OWN = OwnMemory()
"""The one of this process, which has one heap, however many engines there are."""
