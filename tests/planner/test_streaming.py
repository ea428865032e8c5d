"""Which weights are streamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from pi2rt.formats import ModelFile, open_model_file
from pi2rt.formats.placement import Placement
from pi2rt.models import describe, iterate_tensors
from pi2rt.models.stream_pieces import cut, matrices_in_order
from pi2rt.planner.pack.convert import convert
from pi2rt.planner.weights import (
    AHEAD_SHARE,
    FIRST_NEURONS,
    LEAST_AHEAD,
    SECTOR,
    all_neurons,
    least_neurons,
    plan_streaming,
    with_records,
)
from pi2rt.runtime.flash_reads import FlashReads
from tests.support.tiny_models import TinyModel, write_gguf


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelFile]:
    folder = tmp_path_factory.mktemp("streaming")
    model = TinyModel("llama", dim=64, hidden=256, layers=12, heads=4, kv_heads=2, head_dim=16)
    convert(write_gguf(folder / "m.gguf", model, weight_type="Q8_0"), folder / "m.pi2")
    with open_model_file(folder / "m.pi2") as file:
        yield file


READS = FlashReads(stream_bytes=4096, stream_depth=8)
"""So that a matrix has several pieces."""


def sizes(file: ModelFile) -> tuple[int, int, int]:
    """All weights but the embedding; those of layers' matrices; the ring where all of these are read."""
    description = describe(file)
    names = {name for name, _ in iterate_tensors(description)} - {description.embedding}
    total = sum(file.tensors[name].nbytes for name in names)
    order = [name for name, _ in matrices_in_order(description)]
    layers = sum(file.tensors[name].nbytes for name in order)
    ring = cut(file, description, order, READS.stream_bytes).ring
    return total, layers, ring + READS.stream_bytes * READS.stream_depth


def test_what_fits_stays(pack: ModelFile) -> None:
    total = sizes(pack)[0] + pack.tensors["token_embd.weight"].nbytes
    plan = plan_streaming(pack, describe(pack), total)
    assert (plan.placements, plan.ring_bytes, plan.nbytes) == ({}, 0, total)


def test_rows_of_the_embedding_are_read_first(pack: ModelFile, tmp_path: Path) -> None:
    total = sizes(pack)[0]
    plan = plan_streaming(pack, describe(pack), total)
    assert (plan.placements, plan.nbytes) == ({"token_embd.weight": Placement.BY_ROW}, total)
    model = TinyModel(layers=1, config={"tie_word_embeddings": True})
    convert(write_gguf(tmp_path / "m.gguf", model), tmp_path / "m.pi2")
    with open_model_file(tmp_path / "m.pi2") as file:  # the output head needs all of them
        plan = plan_streaming(file, describe(file), 1)
        assert set(plan.placements.values()) == {Placement.STREAMED}


@pytest.mark.parametrize("percent", [1, 10, 37, 50, 80, 99])
def test_the_room_is_kept_and_nearly_filled(pack: ModelFile, percent: int) -> None:
    total, layers, ring = sizes(pack)
    room = total - layers + ring + layers * percent // 100
    plan = plan_streaming(pack, describe(pack), room, reads=READS)
    assert plan.nbytes <= room
    largest = max(pack.tensors[name].nbytes for name, _ in matrices_in_order(describe(pack)))
    assert plan.nbytes > min(total, room) - largest
    embedding = 0 if plan.placed(Placement.BY_ROW) else pack.tensors["token_embd.weight"].nbytes
    streamed = sum(pack.tensors[name].nbytes for name in plan.placed(Placement.STREAMED))
    assert plan.resident_bytes + streamed == total + embedding


def test_streamed_matrices_come_in_order_and_spread_over_the_layers(pack: ModelFile) -> None:
    total, layers, ring = sizes(pack)
    plan = plan_streaming(pack, describe(pack), total + ring - layers // 4, reads=READS)
    order = [name for name, _ in matrices_in_order(describe(pack))]
    places = [order.index(name) for name in plan.placed(Placement.STREAMED)]
    assert places == sorted(places)
    large = [
        place for name, place in zip(plan.placed(Placement.STREAMED), places, strict=True) if ".ffn_" in name
    ]
    assert len(large) >= len(places) - 5  # the others make up what a large one would exceed
    assert (
        max(b - a for a, b in itertools.pairwise(large)) <= 15
    )  # two layers and one place: a quarter of all is read


def test_the_ring_has_room_for_what_is_in_flight_but_little_where_little_is_read(pack: ModelFile) -> None:
    total, layers, ring = sizes(pack)
    least = ring - READS.stream_bytes * READS.stream_depth
    much = plan_streaming(pack, describe(pack), total + ring - layers, reads=READS)
    assert much.ring_bytes == ring
    missing = layers // 2
    little = plan_streaming(pack, describe(pack), total - missing, reads=READS)
    ahead = missing // (AHEAD_SHARE * READS.stream_bytes)
    assert LEAST_AHEAD < ahead < READS.stream_depth
    assert little.ring_bytes == least + ahead * READS.stream_bytes
    least_of_all = plan_streaming(pack, describe(pack), total - 1, reads=READS)
    assert least_of_all.ring_bytes == least + LEAST_AHEAD * READS.stream_bytes


def test_attention_follows_where_feed_forward_is_not_enough(pack: ModelFile) -> None:
    total, layers, ring = sizes(pack)
    plan = plan_streaming(pack, describe(pack), total - layers + ring, reads=READS)
    assert list(plan.placed(Placement.STREAMED)) == [name for name, _ in matrices_in_order(describe(pack))]


def test_the_least_where_nothing_is_enough(pack: ModelFile) -> None:
    """A ring with room for the fewest reads then, and for as many more as there is memory."""
    total, layers, ring = sizes(pack)
    least = ring - (READS.stream_depth - LEAST_AHEAD) * READS.stream_bytes
    for more, ahead in ((-1, 0), (0, 0), (READS.stream_bytes - 1, 0), (READS.stream_bytes, 1)):
        plan = plan_streaming(pack, describe(pack), total - layers + least + more, reads=READS)
        assert plan.ring_bytes == least + ahead * READS.stream_bytes
        assert sum(pack.tensors[name].nbytes for name in plan.placed(Placement.STREAMED)) == layers
    for room in (0, -5):
        plan = plan_streaming(pack, describe(pack), room, reads=READS)
        assert plan.nbytes == total - layers + least
        assert sum(pack.tensors[name].nbytes for name in plan.placed(Placement.STREAMED)) == layers


def test_rows_of_a_gguf_are_not_streamed(tmp_path: Path) -> None:
    with open_model_file(write_gguf(tmp_path / "m.gguf", TinyModel())) as file:
        plan = plan_streaming(file, describe(file), 1)
        assert (plan.placements, plan.ring_bytes) == ({}, 0)


def test_order_is_that_of_the_program(tmp_path: Path) -> None:
    with open_model_file(write_gguf(tmp_path / "m.gguf", TinyModel(layers=1))) as file:
        names = [
            name.removeprefix("blk.0.").removesuffix(".weight")
            for name, _ in matrices_in_order(describe(file))
        ]
    assert names == ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down"]


def test_the_neurons_that_fire_most_come_before_matrices(tmp_path: Path) -> None:
    """Where gates and all else do not fit, some matrices are streamed, and an eighth of the neurons has room all the
    same; less only where all matrices are streamed already."""
    model = TinyModel(
        "llama",
        dim=256,
        hidden=4096,
        layers=8,
        heads=4,
        kv_heads=2,
        head_dim=64,
        config={"hidden_act": "drelu"},
    )
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="Q4_0"), tmp_path / "m.pi2")
    with open_model_file(tmp_path / "m.pi2") as file:
        description = describe(file)
        first = int(all_neurons(file) * FIRST_NEURONS)
        total = sum(file.tensors[name].nbytes for name, _ in iterate_tensors(description))
        embedding = file.tensors[description.embedding].nbytes
        ample = plan_streaming(file, description, total - embedding + 2 * with_records(file, first))
        assert ample.placements == {description.embedding: Placement.BY_ROW}
        assert ample.neuron_bytes > first
        short = plan_streaming(file, description, total - embedding + first // 2)
        assert short.placed(Placement.STREAMED)
        assert short.neuron_bytes >= first - 2 * SECTOR
        assert short.nbytes <= total - embedding + first // 2
        least = plan_streaming(file, description, 0)
        assert least.neuron_bytes == least_neurons(file)
        little = plan_streaming(file, description, least.nbytes + first // 2)
        assert set(little.placed(Placement.STREAMED)) == set(least.placed(Placement.STREAMED))
        assert least.neuron_bytes < little.neuron_bytes < first
