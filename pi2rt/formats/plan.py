"""A plan: what runs where, what lies where, and how it is read. JSON, versioned, safe to read from strangers.

``docs/plan-format.md`` has every field. A plan changes speed, never text: precision and inexact units are the user's
choices, which it records.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from pi2rt._errors import RequestError
from pi2rt.formats.model_file import ModelFile
from pi2rt.formats.placement import Placement, placed
from pi2rt.formats.regular_file import RegularFile
from pi2rt.host.output_file import OutputFile

VERSION = 1

MOST_BYTES = 32 << 20
"""Of a plan file. One of a model of 128 experts in 94 layers has 3 MB."""

Count: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 24)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 24)]
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 50)]
PluginValue: TypeAlias = Annotated[str, Meta(max_length=4096)] | int | float | bool | None
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200)]


class PlanModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model the plan is for. ``fingerprint``: of the names, types, shapes and layouts of its tensors."""

    architecture: Name
    name: Annotated[str, Meta(max_length=1000)]
    tensors: Positive
    nbytes: Bytes
    fingerprint: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]


class PlanUnit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An actor of native threads: one on each of ``cores``, pinned; [] leaves that to the executor."""

    name: Name
    cores: Annotated[list[Count], Meta(max_length=4096)]


class PlanLane(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What runs at the same time as other lanes. ``units``: of its executor, the leading one first. ``max_tokens``: in
    a step; ``in_flight``: steps at once. The first lane decodes, with ``mixed_chunk`` prompt tokens beside it at most.
    Others compute prompts of at least ``least_tokens``, all tokens but the last."""

    name: Name
    executor: Name
    role: Literal["decode", "prefill"]
    units: Annotated[list[Name], Meta(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 16)]
    in_flight: Annotated[int, Meta(ge=1, le=1 << 16)]
    mixed_chunk: Annotated[int, Meta(ge=0, le=1 << 16)] = 0
    least_tokens: Count = 0


class PlanClusterUnit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What computes neuron clusters beside the lane that decodes. ``name``: of its actor; ``unit``: an entry point of
    the group ``pi2rt.cluster_units``; ``clusters``: numbers of those that it computes, ascending, by the name of the
    down tensor of their block."""

    name: Name
    unit: Name
    clusters: Annotated[
        dict[Name, Annotated[list[Count], Meta(min_length=1, max_length=1 << 15)]],
        Meta(min_length=1, max_length=1 << 12),
    ]


class PlanSegments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of memory by use. ``process``: interpreter, libraries, tokenizer and what a prompt's text takes, 0 where
    there is no budget; ``lanes``: weights and activations of prefill lanes; ``experts``, ``neurons``: caches; ``kv``:
    all pages, of blocks with a window those that have memory at a time; ``unit``: a cluster unit."""

    process: Bytes
    lanes: Bytes
    resident: Bytes
    ring: Bytes
    experts: Bytes
    neurons: Bytes
    kv: Bytes
    activations: Bytes
    unit: Bytes = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__struct_fields__)


class PlanReads(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As ``pi2rt.runtime.flash_reads.FlashReads``."""

    stream_bytes: Annotated[int, Meta(ge=4096, le=1 << 30)]
    stream_depth: Annotated[int, Meta(ge=1, le=4096)]
    neuron_depth: Annotated[int, Meta(ge=1, le=4096)]
    cluster_depth: Annotated[int, Meta(ge=1, le=4096)]
    neuron_gap: Annotated[int, Meta(ge=0, le=1 << 20, multiple_of=4096)]
    measured: bool


class PlanChoices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the user chose; a planner changes none of it. Fields as in ``RuntimeOptions``; ``memory``, ``cache`` in
    bytes."""

    context: Annotated[int, Meta(ge=1, le=1 << 24)]
    max_sequences: Annotated[int, Meta(ge=1, le=4096)]
    memory: Bytes | None
    cache: Bytes | None
    kv_type: Literal["f16", "q8"]
    activations: Literal["int16", "mixed", "int8"]
    exact_floats: bool
    sparsity: Literal["exact", "predicted", "thresholded"]
    kernels: Annotated[str, Meta(max_length=100)] | None
    io: Literal["auto", "uring", "preadv"]
    read_deadline: Annotated[float, Meta(gt=0, le=1e6)] | None
    pipeline: Literal["cluster", "matrix", "none"]
    two_phase: bool
    executor_options: Annotated[
        dict[Name, Annotated[dict[Name, PluginValue], Meta(max_length=100)]], Meta(max_length=100)
    ] = msgspec.field(default_factory=dict)


class Prediction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``low`` to ``high`` of ``unit``, and what that rests on. None: not known; ``basis`` says what would have to be
    measured for that."""

    what: Name
    unit: Name
    low: float | None
    high: float | None
    basis: Annotated[str, Meta(max_length=1000)]


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``placements``: of each tensor that is not resident, in the order of use; of all others it is RESIDENT.
    ``window_pages``: KV pages that have memory for the keys and values of blocks with a window at a time; 0: all."""

    version: int
    model: PlanModel
    cores: Annotated[list[Count], Meta(max_length=4096)]
    """That the process may use: a plan is for such a machine."""
    choices: PlanChoices
    units: Annotated[list[PlanUnit], Meta(min_length=1, max_length=64)]
    lanes: Annotated[list[PlanLane], Meta(min_length=1, max_length=16)]
    placements: Annotated[dict[Name, Placement], Meta(max_length=1 << 20)]
    segments: PlanSegments
    reads: PlanReads
    kv_pages: Positive
    predictions: Annotated[list[Prediction], Meta(max_length=100)]
    cluster_unit: PlanClusterUnit | None = None
    window_pages: Count = 0

    def placed(self, placement: Placement) -> tuple[str, ...]:
        """Names of the tensors that are there, in the order of use."""
        return placed(self.placements, placement)

    def unit(self, name: str) -> PlanUnit:
        return next(unit for unit in self.units if unit.name == name)


def plan_model(file: ModelFile, name: str) -> PlanModel:
    """What a plan says of an open model file."""
    digest = hashlib.sha256()
    for tensor in sorted(file.tensors):
        info = file.tensors[tensor]
        digest.update(f"{tensor}\0{info.type}\0{info.shape}\0{info.layout}\n".encode())
    return PlanModel(
        architecture=file.architecture,
        name=name[:1000],
        tensors=len(file.tensors),
        nbytes=sum(info.nbytes for info in file.tensors.values()),
        fingerprint=digest.hexdigest()[:16],
    )


def write_plan(to: str | os.PathLike[str] | OutputFile, plan: Plan) -> None:
    """Writes it, whole or not at all.

    Raises:
        RequestError, OutputError: it cannot be written.
    """
    with to if isinstance(to, OutputFile) else OutputFile(to) as output:
        output.write(plan_text(plan).encode())
        output.commit()


def plan_text(plan: Plan) -> str:
    """One value on each line, always in the same order."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() + "\n"


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan from anybody.

    Raises:
        ModelNotFoundError: it cannot be opened.
        RequestError: the file is too large, or no plan; the message names the field.
    """
    with closing(RegularFile(Path(path))) as file:
        if file.size > MOST_BYTES:
            raise RequestError(f"plan {os.fspath(path)!r}: larger than {MOST_BYTES} bytes")
        data = bytes(file.read(0, file.size))
    try:
        return parse_plan(data)
    except ValueError as error:
        raise RequestError(f"plan {os.fspath(path)!r}: {error}") from error


def parse_plan(data: bytes) -> Plan:
    """Raises ValueError: it is no plan of this version, or contradicts itself."""
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != VERSION:
            raise ValueError(
                f"version {version} is not {VERSION}, this pi2rt's: make it again with 'pi2rt plan'"
            )
        plan = msgspec.json.decode(data, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    _check(plan)
    return plan


class _Version(msgspec.Struct):
    version: int


def _check(plan: Plan) -> None:
    """What no single field shows."""
    names = [unit.name for unit in plan.units]
    _unique("units", names)
    _unique("lanes", [lane.name for lane in plan.lanes])
    used = [unit for lane in plan.lanes for unit in lane.units]
    _unique("units of lanes", used)
    for lane in plan.lanes:
        for unit in lane.units:
            if unit not in names:
                raise ValueError(f"lane {lane.name!r} has unit {unit!r}, which is not among the units")
    if unused := set(names) - set(used):
        raise ValueError(f"unit {min(unused)!r} is in no lane")
    roles = [lane.role for lane in plan.lanes]
    if roles != ["decode"] + ["prefill"] * (len(roles) - 1):
        raise ValueError(
            f"lanes have the roles {', '.join(roles)}: the first one decodes, all others prefill"
        )
    if plan.cluster_unit is not None:
        if plan.cluster_unit.name in names:
            raise ValueError(f"cluster_unit: the name {plan.cluster_unit.name!r} is that of a unit")
        for name, numbers in plan.cluster_unit.clusters.items():
            if numbers != sorted(set(numbers)):
                raise ValueError(f"clusters of {name!r}: {numbers} do not ascend")
    cores = [core for unit in plan.units for core in unit.cores]
    _unique("cores of units", cores)
    decode = plan.lanes[0]
    if decode.mixed_chunk < 1:
        raise ValueError("mixed_chunk of the lane that decodes: at least 1 is needed")
    if decode.max_tokens < plan.choices.max_sequences:
        raise ValueError(
            f"max_tokens={decode.max_tokens} of the lane that decodes: at least max_sequences="
            f"{plan.choices.max_sequences} is needed"
        )
    for lane in plan.lanes[1:]:
        if lane.least_tokens < 1:
            raise ValueError(f"least_tokens of lane {lane.name!r}: at least 1 is needed")
    if plan.window_pages > plan.kv_pages:
        raise ValueError(f"window_pages={plan.window_pages}: more than kv_pages={plan.kv_pages}")
    if plan.kv_pages * 64 < plan.choices.context:
        raise ValueError(
            f"kv_pages={plan.kv_pages}: fewer than a context of {plan.choices.context} tokens needs"
        )


def _unique(what: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what}: {value!r} is there twice")
        seen.add(value)


def differences(plan: Plan, model: PlanModel, cores: Iterable[int]) -> list[str]:
    """Why the plan is not for this model and machine; [] where it is."""
    found = [
        f"{name}: {getattr(plan.model, name)!r} in the plan, {getattr(model, name)!r} in the model"
        for name in model.__struct_fields__
        if name != "name" and getattr(plan.model, name) != getattr(model, name)
    ]
    available = set(cores)
    for unit in plan.units:
        if missing := sorted(set(unit.cores) - available):
            listed = ", ".join(map(str, missing))
            found.append(
                f"cores of unit {unit.name!r}: {listed} in the plan, not among those of this process"
            )
    return found
