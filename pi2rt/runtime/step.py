"""The work item of inference: one pass of a model over some tokens of some sequences.

A step is as large as the plan allows: for a resident model it is the whole decode step of all running
sequences, so that the control plane is crossed once per step and not once per layer (the two planes,
``docs/design.md``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one slot picks its tokens. Fields as in ``SamplingParams``; ``seed`` is always set.

    ``temperature == 0`` is greedy. The random number for a token depends on (seed, position) alone, so the
    text does not depend on what else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int = -1  # -1: none; 0: of the chosen token; n: and of the n most probable


@dataclass(frozen=True, slots=True)
class Bind:
    """Makes ``slot`` belong to a new sequence, before the step that carries it runs.

    ``history``: token ids that the penalties count as already there (the prompt). ``ends``: token ids that end the
    sequence when they are sampled; ``limit``: tokens that it may have, the prompt included; None: no limit. Once it has
    ended, slices "the token sampled last" of this slot are skipped until the next bind (``Skipped``).
    """

    slot: int
    sampling: Sampling
    history: Int32s
    ends: frozenset[int] = frozenset()
    limit: int | None = None

    def ended(self, token: int, position: int) -> bool:
        """Whether ``token``, sampled to stand at ``position``, is the last one of the sequence."""
        return token in self.ends or (self.limit is not None and position + 1 >= self.limit)


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive tokens of one sequence, at positions ``start .. start + count``.

    ``pages``: the sequence's page table, int32, at least ``ceil((start + count) / PAGE_TOKENS)`` entries;
    position p lives in page ``pages[p // PAGE_TOKENS]``. Pages that other sequences share are only read. Of a block
    with a window, positions that none of the slice's sees may be gone: what is read there is finite, and means nothing.
    ``tokens``: int32 (count,). Empty means: one token, the one sampled last for this slot by the step before,
    which may still be running (that is how the engine runs ahead). Where that was the last one, it is skipped.
    ``sample``: sample the token after the last one. ``drafts``: so many of the last ``tokens`` are guesses at what
    would be sampled. The token after the last one that is none is sampled, and the token after each draft as long as
    drafts are right (``Verified``). Executors with an attribute ``verifies_drafts``, which is true, take these.
    ``masked``: the token is sampled from those that a mask allows. The mask is given after ``submit``, while the step
    waits, runs, or has done all else (``Masking.mask``). Executors with an attribute ``takes_masks``, which is true,
    take these; never with drafts.
    ``targets``: int32 (count,), return the log probability of each target after its token (perplexity); negative
    entries are skipped. ``logits``: return the logits of every token. A mask changes neither.
    """

    slot: int
    start: int
    pages: Int32s
    tokens: Int32s
    sample: bool = False
    drafts: int = 0
    masked: bool = False
    targets: Int32s | None = None
    logits: bool = False

    @property
    def count(self) -> int:
        return max(1, len(self.tokens))


@dataclass(frozen=True, slots=True)
class StateCopy:
    """Replaces state by other state: a fork, a snapshot or a roll-back.

    ``kind`` "page": all bytes of KV page ``target`` by those of ``source``. "slot": all fixed arrays of slot ``target``
    of the state store by those of ``source``.
    """

    kind: Literal["page", "slot"]
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Step:
    """One pass. No two slices share a slot.

    ``copies`` are made in their order, before any slice reads or writes state and after all steps before. Where the
    step is stopped, their targets are undefined.
    """

    id: int
    slices: tuple[Slice, ...]
    binds: tuple[Bind, ...] = ()
    copies: tuple[StateCopy, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(s.count for s in self.slices)

    def __repr__(self) -> str:
        return f"<Step {self.id}: {self.tokens} tokens of {len(self.slices)} sequences>"


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token sampled for one slice. Log probabilities (natural) are of the distribution after temperature-free
    softmax of the penalised logits; NaN and () where they were not asked for. With a mask they are of what it allows:
    minus infinity for all other tokens."""

    token: int
    logprob: float = float("nan")
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Unusable:
    """Instead of ``Sampled``, where the logits of one slice leave no token to pick: one is NaN or plus infinity, or
    none is finite. The other slices of the step are not concerned, and the slot can be bound again.

    ``parameters``: names of those fields of ``Sampling`` that made them so, before these "token_mask" where a mask
    did, or was not given in time; () where the model's own logits are. A later slice that continues this one ("the
    token sampled last") may compute anything: its result is discarded.
    """

    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """Instead of ``Sampled``, where a slice "the token sampled last" came behind the end of its sequence, as ``Bind``
    told it. It has computed nothing, and the state of the sequence is that of its end: so steps may run ahead of a
    state that every token changes."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Instead of ``Sampled``, for a slice with drafts: what single steps would have brought one after another, the
    penalties' counts included. Outcome i was sampled after draft i, all drafts up to there being right; outcome 0 after
    the last token that is no draft. They end behind the first draft that is wrong, at a token that ends the sequence,
    at ``Unusable``, or behind the last draft. The sequence goes on with the last outcome; KV entries of drafts behind
    the right ones are undefined."""

    outcomes: tuple[Sampled | Unusable, ...]


Outcome: TypeAlias = Sampled | Unusable | Skipped | Verified
"""What a slice brought that was to sample; ``Skipped`` also where it was not."""


@dataclass(frozen=True, slots=True)
class NeuronUse:
    """What a step took of neurons that are read when they are active. ``nbytes``: of those that were active, with their
    scales. In pages of the pack, each of one neuron or several: ``asked``, those with a neuron that were active;
    ``missed``, of these, those that the cache did not have and that had to be read, ``missed_bytes``;
    ``foreseen``, of the missed, those whose read had begun before they were asked for. ``reads``, ``read_bytes``:
    what flash gave meanwhile, in vain or not; neighbouring pages come in one read. ``read_through``,
    ``read_through_bytes``: of that, pages and bytes of gaps between pages, read to make one read of two."""

    nbytes: int
    asked: int
    missed: int
    foreseen: int
    missed_bytes: int
    reads: int
    read_bytes: int
    read_through: int = 0
    read_through_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gives back. ``sampled``, ``scores``, ``logits`` are aligned with ``Step.slices``. Logits that
    cannot be used are no failure of the step: see ``Unusable``.

    ``stopped``: the step was cancelled on its way; nothing in it is valid; its sequences' KV entries from ``start`` on
    and the targets of its copies are undefined. Times are ``time.perf_counter_ns``; ``kernel_ns`` is time inside
    kernels, averaged over threads. ``weight_bytes``: of the weights that the step computed with; ``streamed_bytes``:
    read of matrices, for this step or ahead for the next."""

    id: int
    sampled: tuple[Outcome | None, ...] = ()
    scores: tuple[Floats | None, ...] = ()
    logits: tuple[Floats | None, ...] = ()  # each (count, vocab_size)
    stopped: bool = False
    started_ns: int = 0
    finished_ns: int = 0
    kernel_ns: int = 0
    weight_bytes: int = 0
    streamed_bytes: int = 0
    neurons: NeuronUse | None = None
