"""The arithmetic of neuron clusters. Put your own unit here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pi2rt.runtime.cluster_unit import ClusterWeights

Floats = npt.NDArray[np.float32]

ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: (
        x / 2 * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)))
    ),
}


class NumpyUnit:
    """See ``pi2rt.runtime.cluster_unit.ClusterUnit``."""

    name = "numpy"

    def __init__(self) -> None:
        self._layers: dict[int, ClusterWeights] = {}

    def need(self, neurons: int, dim: int, gated: bool) -> int:
        return (3 if gated else 2) * neurons * dim * 4  # the arrays of load, as they are

    def load(self, layer: int, weights: ClusterWeights) -> None:
        for activation in (weights.activation, weights.up_activation):
            if activation not in ACTIVATIONS:
                raise ValueError(f"unknown activation {activation!r}")
        self._layers[layer] = weights

    def multiply(self, layer: int, x: Floats, out: Floats) -> None:
        w = self._layers[layer]
        up = x @ w.up.T
        if w.gate is None:
            hidden = ACTIVATIONS[w.activation](up)
        else:
            hidden = ACTIVATIONS[w.activation](x @ w.gate.T) * ACTIVATIONS[w.up_activation](up)
        out += hidden @ w.down

    def close(self) -> None:
        self._layers.clear()
