"""One block after another over all texts is all blocks over one text after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt._errors import ModelFormatError
from pi2rt.executors.cpu.layer_walk import Factors, walk
from pi2rt.executors.reference.model import ReferenceModel, activate
from pi2rt.formats import open_model_file
from pi2rt.formats.quants import dequantize
from pi2rt.memory import StateLayout, StateStore
from pi2rt.models import FeedForward, describe
from pi2rt.models.tensors import iterate_tensors
from pi2rt.planner.pack.bundling import Bundling
from pi2rt.planner.pack.convert import convert
from tests.support.sparse_model import poke
from tests.support.tiny_models import TinyModel, write_gguf

Floats = npt.NDArray[np.float32]
TEXTS = [np.arange(3, 90, dtype=np.int32), np.arange(300, 240, -1, dtype=np.int32)]
MODELS = {
    "llama": TinyModel(seed=5),
    "gemma": TinyModel("gemma3_text", seed=6),
    "without gate": TinyModel(seed=7, gated=False, config={"hidden_act": "relu2", "mlp_bias": True}),
    "dReLU": TinyModel(seed=8, config={"hidden_act": "drelu"}),
    "experts": TinyModel("mixtral", seed=9, config={"hidden_act": "drelu"}),
    "shared expert": TinyModel("qwen2_moe", seed=10, expert_hidden=64, shared_hidden=96),
}


class Watched(ReferenceModel):
    """Remembers what its feed-forward blocks were computed from."""

    seen: dict[str, tuple[Floats, Floats | None]]

    def factors(self, block: FeedForward, x: Floats) -> tuple[Floats, Floats | None]:
        self.seen[block.down.weight] = super().factors(block, x)
        return self.seen[block.down.weight]


def expected(path: Path) -> list[dict[str, tuple[Floats, Floats | None]]]:
    """For each text, of each block and of each expert that it chose."""
    with open_model_file(path) as file:
        model = describe(file)
        weights = {
            name: dequantize(file.tensors[name].type, file.read(name), file.tensors[name].shape)
            for name, _ in iterate_tensors(model)
        }
    out = []
    for text in TEXTS:
        reference = Watched(model, weights, StateStore(StateLayout.of(model, "f32"), 2))
        reference.seen = {}
        reference.forward(text, 0, np.arange(2, dtype=np.int32))
        out.append(reference.seen)
    return out


@pytest.mark.parametrize(
    ("name", "bundles"),
    [
        *((name, bundles) for name in MODELS for bundles in (None, "off", "all")),
        ("dReLU", "gates"),
        ("experts", "gates"),
    ],
)
def test_the_same_activations(tmp_path: Path, name: str, bundles: Bundling | None) -> None:
    source = path = write_gguf(tmp_path / "m.gguf", MODELS[name], weight_type="Q4_0")
    if bundles is not None:
        path = tmp_path / "m.pi2"
        convert(source, path, bundles=bundles)
    found: dict[str, list[tuple[Floats, Floats | None]]] = {}
    layers: list[int] = []
    reports: list[tuple[int, int]] = []

    def observe(
        layer: int, block: FeedForward, weights: Mapping[str, Floats], factors: Iterator[Factors]
    ) -> None:
        layers.append(layer)
        assert block.down.weight in weights
        mine = found.setdefault(block.down.weight, [])
        for each in factors:
            mine.append((each.gate, each.up))
            if block.gate is not None:
                x, product = each.product()
                np.testing.assert_allclose(x @ weights[block.gate.weight].T, product, rtol=1e-3, atol=1e-4)
                np.testing.assert_array_equal(activate(block.activation, product), each.gate)

    with open_model_file(path) as file:
        model = describe(file)
        walk(file, model, TEXTS, observe, lambda done, total: reports.append((done, total)))
    blocks = [
        (number, each.down.weight)
        for number, layer in enumerate(model.layers)
        for block in layer.blocks
        for each in block.feed_forwards()
    ]
    assert layers == [number for number, _ in blocks]
    assert list(found) == [name for _, name in blocks]
    total = len(model.layers) + len(blocks)  # attention, and these
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    for number, text in enumerate(expected(source)):
        for block in found.keys() - text.keys():  # an expert that no token of this text chose
            assert len(found[block][number][0]) == 0
        for block, (gate, up) in text.items():
            np.testing.assert_allclose(found[block][number][0], gate, rtol=1e-4, atol=1e-5)
            if up is None:
                assert found[block][number][1] is None
            else:
                np.testing.assert_allclose(found[block][number][1], up, rtol=1e-4, atol=1e-5)


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel(), weight_type="F32")
    convert(source, tmp_path / "m.pi2")
    with open_model_file(tmp_path / "m.pi2") as file:
        info = file.tensors["blk.1.ffn_up.weight"]
        poke(tmp_path / "m.pi2", info.offset + 4, np.array(np.nan, "<f4").tobytes())
        with pytest.raises(ModelFormatError, match=r"tensor blk\.1\.ffn_up\.weight: holds NaN"):
            walk(file, describe(file), TEXTS, lambda *_: list(_[3]) and None, lambda *_: None)
