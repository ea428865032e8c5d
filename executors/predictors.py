"""Predictors as the native program reads them: two small matrices for each feed-forward block, in memory of their
own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pi2rt._errors import RequestError
from pi2rt.cython_kernels import native, program
from pi2rt.formats import ModelFile
from pi2rt.runtime.executor import Predictor

TYPE = "F16"


@dataclass(frozen=True, slots=True)
class LoadedPredictor:
    """``first`` (rank, dim) and ``second`` (neurons, rank), which has the bias."""

    first: program.Matrix
    second: program.Matrix


class LoadedPredictors:
    """Those of one model, by the name of the down tensor.

    Args:
        file: a pack with neuron bundles.
        predictors: see ``ExecutorOptions``; () for none.

    Raises:
        RequestError: one does not go with its block, or the block's gates are not in its bundles.
    """

    def __init__(self, file: ModelFile, predictors: Mapping[str, Predictor]) -> None:
        for name, each in predictors.items():
            bundles = file.bundles.get(name)
            if bundles is None or bundles.gate is None:
                raise RequestError(f"{file.path}: the gates of {name} are not in bundles: nothing to predict")
            shapes = [each.first.shape, each.second.shape, each.bias.shape]
            rank, (neurons, dim) = len(each.first), file.tensors[bundles.gate].shape
            if shapes != [(rank, dim), (neurons, rank), (neurons,)]:
                raise RequestError(
                    f"{file.path}: a predictor of shapes {shapes} for {neurons} x {dim} of {name}"
                )
        sizes = {name: [_bytes(each.first), _bytes(each.second)] for name, each in predictors.items()}
        self.nbytes = sum(map(sum, sizes.values())) + sum(each.bias.nbytes for each in predictors.values())
        self._memory = native.Memory(max(1, sum(map(sum, sizes.values()))))
        address = self._memory.address
        self.by_down: dict[str, LoadedPredictor] = {}
        for name, each in predictors.items():
            matrices = []
            for values, bias in ((each.first, None), (each.second, each.bias)):
                rows, columns = values.shape
                raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
                if native.repack(TYPE, raw, rows, columns, address) is not None:
                    raise RequestError(f"{file.path}: the predictor of {name} holds NaN or infinity")
                matrices.append(program.Matrix(native.TYPE_IDS[TYPE], rows, columns, address, bias))
                address += _bytes(values)
            self.by_down[name] = LoadedPredictor(*matrices)

    def close(self) -> None:
        """Only after the threads that compute have ended."""
        self._memory.close()
        self.by_down.clear()


def _bytes(values: npt.NDArray[np.float16]) -> int:
    rows, columns = values.shape
    return native.matrix_bytes(TYPE, rows, columns)
