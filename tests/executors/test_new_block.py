"""What a new kind of block touches outside of its own files: one line in each executor's table. It calls public names.

The kind here is a linear map of the normalised stream, "x = x + W norm(x)". Its description, its architecture and what
each executor does with it are in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from pi2rt import open_runtime
from pi2rt._errors import UnsupportedModelError
from pi2rt.executors.cpu import blocks
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.cpu.layer_walk import WALKS, Factors, walk
from pi2rt.executors.cpu.program_builder import ProgramBuilder
from pi2rt.executors.reference import model as reference_model
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.executors.reference.model import Place, ReferenceModel
from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.formats.placement import Placement
from pi2rt.formats.quants import dequantize
from pi2rt.memory import StateLayout, StateStore
from pi2rt.models import (
    Block,
    FeedForward,
    Layer,
    Linear,
    ModelDescription,
    Norm,
    Operation,
    describe,
    load,
)
from pi2rt.models.llama import describe_llama
from pi2rt.models.parts import Named
from pi2rt.models.stream_pieces import cut
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.step import Floats
from tests.executors.test_sparse import one_by_one
from tests.support.running import all_logits, opened
from tests.support.tiny_models import TinyModel, write_gguf

MODEL = TinyModel("llama", dim=64, hidden=128, layers=3, heads=4, kv_heads=2, head_dim=16)
TOKENS = np.arange(3, 60, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class LinearMap(Block):
    kind: ClassVar[str] = "linear map"

    norm: Norm
    map: Linear
    post_norm: Norm | None = None

    def own_tensors(self, dim: int) -> Named:
        yield from self.map.tensors(dim, dim)

    def operations(self) -> Iterator[Operation]:
        yield Operation((self.map.weight,))


def describe_mapped(file: ModelFile, context: int | None) -> ModelDescription:
    """Llama, with such a block behind each layer's others."""
    plain = describe_llama(file, context)
    layers = (
        Layer(
            (*layer.blocks, LinearMap(Norm(f"blk.{i}.map_norm.weight", 1e-5), Linear(f"blk.{i}.map.weight")))
        )
        for i, layer in enumerate(plain.layers)
    )
    return replace(plain, layers=tuple(layers))


def compute(reference: ReferenceModel, block: LinearMap, x: Floats, place: Place) -> Floats:
    return reference.linear(block.map, x)


def build(builder: ProgramBuilder, block: LinearMap, index: int, number: int) -> None:
    # Not straight into x: of few rows each thread normalises x by itself, while others would add to it already.
    mixed = builder.is_mixed(block.map)
    builder.program.linear(
        index, builder.norm(block.norm), "x", "y", [builder.matrix(block.map)], mixed=mixed
    )
    builder.program.add(index, builder.norm(block.post_norm))


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "ARCHITECTURES", {"llama": describe_mapped})


@pytest.fixture
def tables(architecture: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is touched."""
    monkeypatch.setitem(reference_model.BLOCKS, LinearMap, compute)
    monkeypatch.setitem(blocks.BLOCKS, LinearMap, build)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    extra: dict[str, Floats] = {}
    for i in range(MODEL.layers):
        extra[f"blk.{i}.map_norm.weight"] = (1 + rng.standard_normal(64) / 8).astype(np.float32)
        extra[f"blk.{i}.map.weight"] = (rng.standard_normal((64, 64)) / 8).astype(np.float32)
    return write_gguf(tmp_path_factory.mktemp("mapped") / "m.gguf", MODEL, weight_type="Q8_0", extra=extra)


async def logits(executor: StepExecutor, path: Path, **options: object) -> Floats:
    async with opened(executor, path, **options) as each:
        return await all_logits(each, TOKENS)


async def test_both_executors_run_it(tables: None, source: Path) -> None:
    expected = await logits(ReferenceExecutor(), source)
    exact = await logits(CpuExecutor(), source)
    np.testing.assert_allclose(exact, expected, atol=1e-4 * np.abs(expected).max())


async def test_any_chunking_and_any_number_of_threads_give_the_same_bits(tables: None, source: Path) -> None:
    expected = await logits(CpuExecutor(), source, exact_floats=False, cores=(0,))
    async with opened(CpuExecutor(), source, exact_floats=False, cores=(0, 1, 0)) as executor:
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
        for _ in range(5):
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)


async def test_streamed_from_a_pack_it_gives_the_same_bits(
    tables: None, source: Path, tmp_path: Path
) -> None:
    pack = tmp_path / "m.pi2"
    convert(source, pack)
    reads = FlashReads(stream_bytes=4096, stream_depth=4)
    with open_model_file(pack) as file:
        model = describe(file)
        names = tuple(name for layer in model.layers for block in layer.blocks for name in _matrices(block))
        ring = cut(file, model, names, reads.stream_bytes).ring + 4 * reads.stream_bytes
    assert "blk.1.map.weight" in names
    resident = await logits(CpuExecutor(), source, exact_floats=False)
    placements = dict.fromkeys(names, Placement.STREAMED)
    streamed = await logits(
        CpuExecutor(), pack, exact_floats=False, placements=placements, ring_bytes=ring, reads=reads
    )
    np.testing.assert_array_equal(streamed, resident)


def _matrices(block: Block) -> Iterator[str]:
    for operation in block.operations():
        yield from operation.matrices


def test_its_memory_is_known(tables: None, source: Path) -> None:
    options = ExecutorOptions(slots=1, pages=1, context=64, max_tokens=16)
    with open_model_file(source) as file:
        model = describe(file)
        found = [
            executor.need(file, model, options).weights for executor in (CpuExecutor(), ReferenceExecutor())
        ]
        assert found[0] == sum(info.nbytes for info in file.tensors.values())
        assert found[1] > 3 * found[0]


@pytest.mark.parametrize("make", [CpuExecutor, ReferenceExecutor])
async def test_a_kind_that_is_in_no_table_is_refused_by_name(
    architecture: None, source: Path, make: type[CpuExecutor | ReferenceExecutor]
) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=rf"layer 0: has a block of the kind 'linear map', which the executor '{make.name}' does not run; it",
    ):
        await logits(make(), source)


async def test_the_runtime_gives_no_executor_a_kind_that_it_does_not_name(
    architecture: None, source: Path
) -> None:
    class Attentive(SimulatedExecutor):
        block_kinds = frozenset({"attention", "feed-forward"})

    async with open_runtime(source, executor=SimulatedExecutor, context=64):  # which names none: it takes all
        pass
    with pytest.raises(
        UnsupportedModelError,
        match=r"m\.gguf: layer 0: has a block of the kind 'linear map', which the executor 'simulated' does not run; "
        r"it runs 'attention', 'feed-forward'$",
    ):
        async with open_runtime(source, executor=Attentive, context=64):
            pass


def test_calibration_goes_through_it(tables: None, source: Path) -> None:
    """It has no neurons, so that its line in the reference executor's table is enough."""
    seen: list[str] = []

    def observe(layer: int, block: FeedForward, weights: Mapping[str, Floats], of: Iterator[Factors]) -> None:
        seen.append(block.down.weight)
        factors.extend(of)

    factors: list[Factors] = []
    with open_model_file(source) as file:
        model = describe(file)
        walk(file, model, [TOKENS], observe, lambda *_: None)
        assert seen == [each.down.weight for each in model.feed_forwards()]
        weights = {
            name: np.asarray(dequantize(each.type, file.read(name), each.shape))
            for name, each in file.tensors.items()
        }
    reference = Watched(model, weights, StateStore(StateLayout.of(model, "f32"), 1))
    reference.gates = []
    reference.forward(TOKENS, 0, np.zeros(1, np.int32))
    for found, expected in zip(factors, reference.gates, strict=True):
        np.testing.assert_allclose(found.gate, expected, rtol=1e-4, atol=1e-5)


class Watched(ReferenceModel):
    """Remembers the activated gates of its feed-forward blocks."""

    gates: list[Floats]

    def factors(self, block: FeedForward, x: Floats) -> tuple[Floats, Floats | None]:
        gate, up = super().factors(block, x)
        self.gates.append(gate)
        return gate, up


def test_calibration_refuses_neurons_that_it_would_pass_over(
    tables: None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(WALKS, FeedForward)
    with open_model_file(source) as file:
        with pytest.raises(
            UnsupportedModelError,
            match="layer 0: has a block of the kind 'feed-forward', whose neurons cannot be calibrated; those of "
            "'mixture of experts' can",
        ):
            walk(file, describe(file), [TOKENS], lambda *_: None, lambda *_: None)


def test_calibration_refuses_what_the_reference_executor_does_not_run(
    architecture: None, source: Path
) -> None:
    with open_model_file(source) as file:
        with pytest.raises(
            UnsupportedModelError, match="'linear map', which the executor 'reference' does not"
        ):
            walk(file, describe(file), [TOKENS], lambda *_: None, lambda *_: None)
