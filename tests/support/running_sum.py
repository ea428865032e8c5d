"""A kind of block with fixed arrays, for tests: ``s = s / 2 + W norm(x)``, ``x = x + s``, and it counts its tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from pi2rt.executors.reference.model import Place, ReferenceModel
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.models import (
    Block,
    Fixed,
    FixedArray,
    Layer,
    Linear,
    ModelDescription,
    Norm,
    describe,
)
from pi2rt.models.parts import Named
from pi2rt.models.states import State
from pi2rt.runtime.step import Floats
from tests.support.tiny_models import TinyModel, write_gguf

MODEL = TinyModel(seed=11, layers=4)


@dataclass(frozen=True, slots=True)
class RunningSum(Block):
    kind: ClassVar[str] = "running sum"

    norm: Norm
    map: Linear
    dim: int
    post_norm: Norm | None = None

    def own_tensors(self, dim: int) -> Named:
        yield from self.map.tensors(dim, dim)

    def state(self) -> State | None:
        return Fixed((FixedArray("sum", (self.dim,)), FixedArray("tokens", (3, 1), "int32")))


def compute(reference: ReferenceModel, block: RunningSum, x: Floats, place: Place) -> Floats:
    y = reference.linear(block.map, x)
    arrays = reference.arrays(place)
    total = arrays["sum"]
    for row in y:
        total[:] = total / 2 + row
        row[:] = total
    arrays["tokens"] += len(x)
    return y


def open_running_sum(folder: Path) -> tuple[ModelFile, ModelDescription]:
    """Llama, with such a block behind each layer's others."""
    path = folder / "running_sum.gguf"
    if not path.exists():
        random = np.random.RandomState(3)
        extra: dict[str, Floats] = {}
        for i in range(MODEL.layers):
            extra[f"sums.{i}.norm.weight"] = np.ones(MODEL.dim, np.float32)
            extra[f"sums.{i}.weight"] = (random.standard_normal((MODEL.dim, MODEL.dim)) / 8).astype(
                np.float32
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_gguf(path, MODEL, extra=extra)
    file = open_model_file(path)
    plain = describe(file)
    layers = (
        Layer(
            (
                *layer.blocks,
                RunningSum(Norm(f"sums.{i}.norm.weight", 1e-5), Linear(f"sums.{i}.weight"), MODEL.dim),
            )
        )
        for i, layer in enumerate(plain.layers)
    )
    return file, replace(plain, layers=tuple(layers))
