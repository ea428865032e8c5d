"""How a runtime is opened: the keywords that ``open_runtime``, ``AsyncEngine`` and ``Engine`` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from pi2rt._errors import RequestError
from pi2rt.formats.plan import Plan
from pi2rt.formats.row_blocks import SECTOR
from pi2rt.memory import parse_size
from pi2rt.runtime.executor import Progress, StepExecutor
from pi2rt.runtime.plugin_options import PluginOptions

KV_TYPES = ("f16", "q8")
"""What may be asked for. An executor may take float32 instead (``Borrower.page_type``)."""

MIXED_CHUNK = 64
"""Prompt tokens in a step that also decodes: what a long prompt of one request may cost the others per
token."""


MOST_READ_THROUGH = 1 << 20
"""Bytes of one read of neurons, at most."""


class RuntimeKeywords(TypedDict, total=False):
    """As ``RuntimeOptions``, all of them optional."""

    context: int
    max_sequences: int
    executor: str | Callable[[], StepExecutor]
    threads: int | None
    cores: Mapping[str, Sequence[int]] | None
    kv_type: Literal["f16", "q8"]
    activations: Literal["int16", "mixed", "int8"]
    kernels: str | None
    memory: int | str | None
    io: Literal["auto", "uring", "preadv"]
    read_deadline: float | None
    mask_deadline: float
    cache: int | str | None
    pipeline: Literal["cluster", "matrix", "none"]
    two_phase: bool
    read_through: int | str | None
    sparsity: Literal["exact", "predicted", "thresholded"]
    calibration: str | os.PathLike[str] | None
    exact_floats: bool
    trace: str | os.PathLike[str] | None
    on_load: Progress | None
    prefill_chunk: int
    content_control_tokens: bool
    max_queue: int
    plan: str | os.PathLike[str] | Plan | None
    executor_options: PluginOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """Raises RequestError for a value out of its range."""

    context: int = 4096
    """Tokens per sequence, prompt and answer together; the model's own context where that is smaller."""
    max_sequences: int = 8
    """Requests that run at once; ``max_queue`` more wait their turn."""
    executor: str | Callable[[], StepExecutor] = "cpu"
    """An entry point of the group ``pi2rt.executors``, or what makes an executor."""
    threads: int | None = None
    """Threads that compute; None: one for each physical core."""
    cores: Mapping[str, Sequence[int]] | None = None
    """Cores by class, one actor each, the first one leading: ``{"big": [0, 1], "little": [2, 3]}``. None:
    as found."""
    kv_type: Literal["f16", "q8"] = "f16"
    """Element type of the KV cache; q8 takes about half the memory."""
    activations: Literal["int16", "mixed", "int8"] = "mixed"
    """What activations become where they meet quantised weights: "mixed" is int8, but int16 for the largest blocks of
    32. Prefill and many sequences are faster with "int8", and more exact with "int16". Against float32, SmolLM2-135M's
    top-1 token is another at 4 % of positions with int8, 1.3 % with mixed, 0.1 % with int16."""
    kernels: str | None = None
    """A kernel variant by name; None: the best for this processor."""
    memory: int | str | None = None
    """What the whole process may take, in bytes or as "600M"; None: what is free. Weights of a pack (``pi2rt
    convert``) that do not fit are read from it in every step."""
    io: Literal["auto", "uring", "preadv"] = "auto"
    """How they are read: "auto" is io_uring where the system permits it, else threads with preadv."""
    read_deadline: float | None = 30.0
    """Seconds. Where none of the reads in flight ends for so long, requests that wait for them fail; None: never."""
    mask_deadline: float = 10.0
    """Seconds. A step that has done all else waits so long for the ``token_mask`` of a request; then that request fails
    alone. Others wait with it once: a request whose function is slow is left out of steps until its mask is there."""
    cache: int | str | None = None
    """Of a pack with neuron bundles, memory for neurons at most, in bytes or as "600M"; "off": as little as will do.
    None: all that ``memory`` leaves."""
    pipeline: Literal["cluster", "matrix", "none"] = "cluster"
    """How far reading neurons overlaps with computing. For measuring: the others are slower."""
    two_phase: bool = False
    """Of a pack whose gates are in its bundles, first only the sectors with a neuron's gate are read, and the rest once
    that has let it through: fewer bytes in more reads."""
    read_through: int | str | None = None
    """Of a pack with neuron bundles, bytes between two neurons (or as "16K") read for nothing, at most, to make
    one read of two: fewer reads of more bytes. Worth it below the device's bytes per second over its reads per second.
    None: 0."""
    sparsity: Literal["exact", "predicted", "thresholded"] = "exact"
    """Which neurons of a pack are inactive: "exact", those whose output is zero; "thresholded", those too whose
    activated gate is below a threshold; "predicted", of a pack whose gates are in its bundles, those of which a
    predictor says that they will be zero. ``pi2rt calibrate`` finds thresholds and predictors. Both change the text;
    ``Runtime.model.sparsity`` says by how much."""
    calibration: str | os.PathLike[str] | None = None
    """The file with thresholds and predictors; None: the one beside the pack."""
    exact_floats: bool = False
    """Weights and activations as float32, for tests; slow."""
    trace: str | os.PathLike[str] | None = None
    """A file (or a FIFO, a device) to write a trace to at the end, for ui.perfetto.dev."""
    on_load: Progress | None = None
    """``on_load(done, total)``, in bytes, while the model loads."""
    prefill_chunk: int = 192
    """Prompt tokens in one step at most, while nothing else runs. More take memory for activations and are no
    faster: those of 512 leave L2 (SmolLM2 and a model of 1.1 B were a tenth slower)."""
    content_control_tokens: bool = False
    """Whether a control token that is spelled out in a message becomes that token, as if the chat template had written
    it. Only for messages that nobody else has written: their authors can end their turn and begin another's."""
    max_queue: int = 128
    """Requests that wait while ``max_sequences`` run, at most; the next one gets BusyError at once. 0: none waits. The
    default is sixteen rounds of eight: longer queues make everybody wait for minutes, and a waiting request costs no
    more than its tokens, 4 bytes each."""
    plan: str | os.PathLike[str] | Plan | None = None
    """A plan, or the file of one that ``pi2rt plan`` has written: what runs where and what lies where. None: the one
    that ``pi2rt plan`` would write with the same options. Other options may repeat what it says, not contradict it."""

    executor_options: PluginOptions = field(default_factory=dict)
    """Of executors and cluster units, by name: what their constructors take, ``{"npu": {"device": "GPU"}}``. ``pi2rt
    info`` lists those there are."""

    def __post_init__(self) -> None:
        if not isinstance(self.content_control_tokens, bool):
            raise RequestError(
                f"content_control_tokens={self.content_control_tokens!r}: True or False is needed"
            )
        for name, least, most in (
            ("context", 1, 1 << 24),
            ("max_sequences", 1, 4096),
            ("prefill_chunk", 1, 1 << 16),
            ("max_queue", 0, 1 << 20),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise RequestError(f"{name}={value!r}: an integer from {least} to {most} is needed")
        if self.kv_type not in KV_TYPES:
            raise RequestError(f"kv_type={self.kv_type!r}: one of {', '.join(map(repr, KV_TYPES))} is needed")
        if self.io not in ("auto", "uring", "preadv"):
            raise RequestError(f"io={self.io!r}: one of 'auto', 'uring', 'preadv' is needed")
        if self.read_deadline is not None and not 0 < self.read_deadline <= 1e6:
            raise RequestError(
                f"read_deadline={self.read_deadline!r}: seconds, up to a million, or None are needed"
            )
        deadline = self.mask_deadline
        if isinstance(deadline, bool) or not isinstance(deadline, int | float) or not 0 < deadline <= 1e6:
            raise RequestError(f"mask_deadline={deadline!r}: seconds, up to a million, are needed")
        if self.pipeline not in ("cluster", "matrix", "none"):
            raise RequestError(f"pipeline={self.pipeline!r}: one of 'cluster', 'matrix', 'none' is needed")
        if self.sparsity not in ("exact", "predicted", "thresholded"):
            raise RequestError(
                f"sparsity={self.sparsity!r}: one of 'exact', 'predicted', 'thresholded' is needed"
            )
        if self.calibration is not None and self.sparsity == "exact":
            raise RequestError(
                f"calibration={os.fspath(self.calibration)!r}: nothing of it is used with sparsity='exact'"
            )
        if self.memory is not None and self.memory_bytes < 1:
            raise RequestError(f"memory={self.memory!r}: at least one byte is needed")
        if self.cache not in (None, "off") and self.cache_bytes is not None and self.cache_bytes < 1:
            raise RequestError(f"cache={self.cache!r}: at least one byte is needed, or 'off'")
        if not 0 <= self.read_through_bytes <= MOST_READ_THROUGH:
            raise RequestError(
                f"read_through={self.read_through!r}: from 0 to {MOST_READ_THROUGH} bytes are needed"
            )
        if self.read_through_bytes and self.two_phase:
            raise RequestError(
                f"read_through={self.read_through!r}: with two_phase, what lies between is left out on purpose; take "
                f"one of the two"
            )
        if not isinstance(self.executor_options, Mapping) or not all(
            isinstance(name, str) and isinstance(each, Mapping)
            for name, each in self.executor_options.items()
        ):
            raise RequestError(
                f"executor_options={self.executor_options!r}: options by the name of an executor are needed, such as "
                f"{{'npu': {{'device': 'GPU'}}}}"
            )
        if self.activations not in ("int16", "mixed", "int8"):
            raise RequestError(f"activations={self.activations!r}: one of 'int16', 'mixed', 'int8' is needed")

    @property
    def memory_bytes(self) -> int:
        """The memory asked for; 0 where none was."""
        return _size("memory", self.memory) or 0

    @property
    def cache_bytes(self) -> int | None:
        """The memory for neurons asked for; None where none was."""
        return 0 if self.cache == "off" else _size("cache", self.cache)

    @property
    def read_through_bytes(self) -> int:
        """Of a gap, at most, in whole sectors."""
        return (
            (0 if self.read_through == "off" else _size("read_through", self.read_through) or 0)
            // SECTOR
            * SECTOR
        )

    @property
    def step_tokens(self) -> int:
        """Tokens in one step at most: there is always room for one of each sequence."""
        return max(self.prefill_chunk, self.max_sequences)


def _size(name: str, given: int | str | None) -> int | None:
    if isinstance(given, str):
        return parse_size(given)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
        raise RequestError(f"{name}={given!r}: a number of bytes or a text such as '600M' is needed")
    return given
