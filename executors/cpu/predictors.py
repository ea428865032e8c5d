"""Predictors as the native program reads them: two small matrices for each feed-forward block, in memory of their
own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pi2rt._errors import RequestError
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.matrices import Matrix
from pi2rt.formats import ModelFile
from pi2rt.formats.predictor import Predictor
from pi2rt.runtime.step import Floats

TYPE = "F16"

Halves: TypeAlias = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class LoadedPredictor:
    """``first`` (rank, dim) and ``second`` (neurons, rank), which has the bias."""

    first: Matrix
    second: Matrix


def predictor_bytes(predictor: Predictor) -> int:
    """What it takes in memory."""
    return _bytes(predictor.first) + _bytes(predictor.second) + predictor.bias.nbytes


def predictor_shapes(predictors: Mapping[str, Predictor], address: int) -> dict[str, LoadedPredictor]:
    """By the name of the down tensor, for a program that is only measured. ``address``: of all that is not loaded."""
    return {
        name: LoadedPredictor(*(_matrix(values, address, bias) for values, bias in _parts(predictors[name])))
        for name in predictors
    }


class LoadedPredictors:
    """Those of one model, by the name of the down tensor.

    Args:
        file: a pack with neuron bundles.
        predictors: see ``ExecutorOptions``; () for none.

    Raises:
        RequestError: one does not go with its block, or the block's gates are not in its bundles.
    """

    def __init__(self, file: ModelFile, predictors: Mapping[str, Predictor]) -> None:
        self.by_down: dict[str, LoadedPredictor] = {}
        self._memories: list[native.Memory] = []
        self.nbytes = 0
        try:
            for name in predictors:
                self._load(file, name, predictors[name])
        except BaseException:
            self.close()
            raise

    def _load(self, file: ModelFile, name: str, predictor: Predictor) -> None:
        bundles = file.bundles.get(name)
        if bundles is None or bundles.gate is None:
            raise RequestError(f"{file.path}: the gates of {name} are not in bundles: nothing to predict")
        shapes = [predictor.first.shape, predictor.second.shape, predictor.bias.shape]
        rank, (neurons, dim) = len(predictor.first), file.tensors[bundles.gate].shape
        if shapes != [(rank, dim), (neurons, rank), (neurons,)]:
            raise RequestError(f"{file.path}: a predictor of shapes {shapes} for {neurons} x {dim} of {name}")
        memory = native.Memory(_bytes(predictor.first) + _bytes(predictor.second))
        self._memories.append(memory)
        self.nbytes += memory.nbytes + predictor.bias.nbytes
        matrices, address = [], memory.address
        for values, bias in _parts(predictor):
            rows, columns = values.shape
            raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            if native.repack(TYPE, raw, rows, columns, address) is not None:
                raise RequestError(f"{file.path}: the predictor of {name} holds NaN or infinity")
            matrices.append(_matrix(values, address, bias))
            address += _bytes(values)
        self.by_down[name] = LoadedPredictor(*matrices)

    def close(self) -> None:
        """Only after the threads that compute have ended."""
        self.by_down.clear()
        for memory in self._memories:
            memory.close()
        self._memories.clear()


def _parts(predictor: Predictor) -> tuple[tuple[Halves, None], tuple[Halves, Floats]]:
    return (predictor.first, None), (predictor.second, predictor.bias)


def _matrix(values: Halves, address: int, bias: Floats | None) -> Matrix:
    rows, columns = values.shape
    return Matrix(native.TYPE_IDS[TYPE], rows, columns, address, bias)


def _bytes(values: Halves) -> int:
    rows, columns = values.shape
    return native.matrix_bytes(TYPE, rows, columns)
